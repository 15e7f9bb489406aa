// Chooses tiles for separable convolutions and launches them.
#include "csrc/separable/separable_forward.cuh"

namespace fastseg {
namespace separable {
namespace {

using dilated::TileList;

// For doubles, whose sums take more registers than three such blocks have.
using Tile64x64Doubles = dilated::Tile<64, 64, 32, 32, 4, 2>;

// Wide tiles exist where operands come in chunks, small ones also where they do not.
template <typename OPERAND, bool VECTORS>
struct TilesOf {
  using type = TileList<dilated::Tile128x256, dilated::Tile128x128, dilated::Tile128x64,
                        dilated::Tile64x64, dilated::Tile32x32>;
};
template <typename OPERAND>
struct TilesOf<OPERAND, false> {
  using type = TileList<dilated::Tile64x64, dilated::Tile32x32>;
};
template <>
struct TilesOf<tf32, true> {
  using type = TileList<dilated::Tile128x128Alone, dilated::Tile128x64, dilated::Tile64x64,
                        dilated::Tile32x32>;
};
template <>
struct TilesOf<float, true> {
  using type = TileList<dilated::Tile128x64SmallWarps, dilated::Tile64x64, dilated::Tile32x32>;
};
template <>
struct TilesOf<double, true> {
  using type = TileList<Tile64x64Doubles, dilated::Tile32x32>;
};
template <>
struct TilesOf<double, false> : TilesOf<double, true> {};

// use(SeparableTraits()) with the tile that is the fastest, or forced.
template <typename OPERAND, bool VECTORS, typename Use, typename... TILES>
void with_tile(TileList<TILES...>, const SeparableArgs& args, Use use) {
  const int chosen =
      choose_tile({dilated::cost_of<SeparableTraits<OPERAND, TILES, VECTORS>>()...}, args);
  int number = 0;
  ((number++ == chosen ? use(SeparableTraits<OPERAND, TILES, VECTORS>()) : void()), ...);
}

template <typename OPERAND, typename Use>
void with_tile(const SeparableArgs& args, Use use) {
  if (moves_chunks(args)) {
    with_tile<OPERAND, true>(typename TilesOf<OPERAND, true>::type(), args, use);
  } else {
    with_tile<OPERAND, false>(typename TilesOf<OPERAND, false>::type(), args, use);
  }
}

template <typename Use>
void with_tile(const SeparableArgs& args, Use use) {
  if (args.tf32) return with_tile<tf32>(args, use);
  FASTSEG_DTYPE_SWITCH(args.dtype, T, { with_tile<T>(args, use); });
}

template <typename Traits>
int64_t tiles_of(const SeparableArgs& args) {
  return to_int(ceil_div(args.N * args.P * args.Q, Traits::kRows));
}

template <typename Traits>
void launch_branches(const SeparableArgs& args, cudaStream_t stream) {
  const std::vector<SeparableBranch> branches = in_launch_order(args);
  SeparableParams params = separable_params(args);
  for (size_t begin = 0; begin < branches.size(); begin += kMaxBranches) {
    params.branch_count = static_cast<int>(std::min<size_t>(kMaxBranches, branches.size() - begin));
    int64_t column_tiles = 0;
    for (int i = 0; i < params.branch_count; ++i) {
      params.branches[i] = branch_params(args, branches[begin + i]);
      params.branches[i].first_column_tile = to_int(column_tiles);
      column_tiles += ceil_div(params.branches[i].columns, Traits::kColumns);
    }
    params.column_tiles = to_int(column_tiles);
    launch(separable_product<Traits>, grid_size(to_int(tiles_of<Traits>(args) * column_tiles)),
           dim3(Traits::kThreads), Traits::kSharedBytes, stream, params);
  }
}

}  // namespace
}  // namespace separable

int64_t separable_tiles(const SeparableArgs& args) {
  int64_t tiles = 0;
  separable::with_tile(args,
                       [&](auto traits) { tiles = separable::tiles_of<decltype(traits)>(args); });
  return tiles;
}

void separable_forward(const SeparableArgs& args, cudaStream_t stream) {
  separable::with_tile(
      args, [&](auto traits) { separable::launch_branches<decltype(traits)>(args, stream); });
}

}  // namespace fastseg
