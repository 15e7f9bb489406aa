// Launches the kernel of forward and grad_input: cuts the targets, chooses a tile.
#pragma once

#include "csrc/dilated/dilated_gather.cuh"

namespace fastseg {
namespace dilated {

// One direction, as the host knows it.
struct Gather {
  DilatedProblem problem;
  std::vector<TargetPlane> planes;
  int64_t target_channels;
  GatherParams params;  // without `rectangles`
  bool vectors;         // whether sources and weights can be copied in chunks
};

// Wide tiles exist where operands come in chunks, thin ones too; small ones also where they do not.
template <typename OPERAND, bool VECTORS>
struct TilesOf {
  using type = TileList<Tile128x256, Tile128x128, Tile128x64, Tile128x32, Tile64x64, Tile32x32>;
};
template <typename OPERAND>
struct TilesOf<OPERAND, false> {
  using type = TileList<Tile64x64, Tile32x32>;
};
template <>
struct TilesOf<tf32, true> {
  using type = TileList<Tile128x128, Tile128x64, Tile128x32, Tile64x64, Tile32x32>;
};
template <>
struct TilesOf<float, true> {
  using type = TileList<Tile128x64SmallWarps, Tile64x64, Tile32x32>;
};
template <>
struct TilesOf<double, true> {
  using type = TileList<Tile64x64, Tile32x32>;
};

// Shared memory that a table of taps takes beyond what every launch has.
inline int more_table_bytes(const std::vector<PlaneRectangle>& rectangles) {
  int64_t most = 0;
  for (const PlaneRectangle& rectangle : rectangles) most = std::max(most, rectangle.taps);
  constexpr int64_t kTapBytes = sizeof(TableTap<void>);
  return to_int(std::max<int64_t>(0, most + 1 - kUsualTaps) * kTapBytes);
}

template <typename Traits>
void launch_gather_tiles(const Gather& gather, const std::vector<PlaneRectangle>& rectangles,
                         cudaStream_t stream) {
  GatherParams params = gather.params;
  LaunchTable table(params.images, Traits::kRows, Traits::kColumns);
  const auto launch_table = [&] {
    params.rectangles = table.take();
    launch(dilated_gather<Traits>, grid_size(params.rectangles.blocks), dim3(Traits::kThreads),
           Traits::kSharedBytes + more_table_bytes(rectangles), stream, params);
  };
  std::vector<int64_t> tiles(gather.planes.size());  // of each plane so far
  for (const PlaneRectangle& rectangle : rectangles) {
    int64_t& first_tile = tiles[rectangle.plane - gather.planes.data()];
    if (!table.add(rectangle, first_tile)) {
      launch_table();
      table.add(rectangle, first_tile);
    }
    first_tile += ceil_div(rectangle.pixels(params.images), Traits::kRows);
  }
  launch_table();
}

// One variant of the kernel, chosen for a problem.
struct GatherPlan {
  void (*launch)(const Gather&, const std::vector<PlaneRectangle>&, cudaStream_t);
  int tile_rows;
};

template <typename OPERAND, bool TURNED, bool VECTORS, typename... TILES>
GatherPlan plan_tiles(TileList<TILES...>, const Gather& gather,
                      const std::vector<PlaneRectangle>& rectangles) {
  const auto time = [&](const TileCost& cost) {
    std::vector<Work> works;
    for (const PlaneRectangle& rectangle : rectangles) {
      const int64_t tiles = ceil_div(rectangle.pixels(gather.params.images), cost.rows) *
                            ceil_div(rectangle.plane->channels(), cost.columns);
      works.push_back({tiles, rectangle.depth});
    }
    return time_of(works, cost, gather.problem.multiprocessors);
  };
  const std::vector<TileCost> costs = {cost_of<GatherTraits<OPERAND, TILES, TURNED, VECTORS>>()...};
  const int chosen = choose_tile(costs, gather.problem, time);
  constexpr decltype(GatherPlan::launch) kLaunches[] = {
      launch_gather_tiles<GatherTraits<OPERAND, TILES, TURNED, VECTORS>>...};
  return {kLaunches[chosen], costs[chosen].rows};
}

template <typename OPERAND, bool TURNED>
GatherPlan plan_operand(const Gather& gather, const std::vector<PlaneRectangle>& rectangles) {
  const typename TilesOf<OPERAND, true>::type all;
  const typename TilesOf<OPERAND, false>::type small;
  return gather.vectors ? plan_tiles<OPERAND, TURNED, true>(all, gather, rectangles)
                        : plan_tiles<OPERAND, TURNED, false>(small, gather, rectangles);
}

template <bool TURNED>
GatherPlan plan_gather(const Gather& gather, const std::vector<PlaneRectangle>& rectangles) {
  if (gather.problem.tf32) return plan_operand<tf32, TURNED>(gather, rectangles);
  GatherPlan plan{};
  FASTSEG_DTYPE_SWITCH(gather.problem.dtype, T,
                       { plan = plan_operand<T, TURNED>(gather, rectangles); });
  return plan;
}

}  // namespace dilated
}  // namespace fastseg
