// Launches the grad_weight kernels: the splits' sums of each tap, then the sums of those.
#include "csrc/dilated/dilated_grad_weight.cuh"

namespace fastseg {
namespace dilated {
namespace {

// The outputs at which each tap of one axis is live.
std::vector<TapParams> tap_params(const Axis& axis) {
  std::vector<TapParams> taps;
  for (const Tap& tap : axis.classes[0].taps) {
    const LiveRange live = live_range(axis, tap, axis.targets);
    TapParams params{};
    params.count.divisor = 0;
    if (live.begin < live.end) {
      params.output = to_int(live.begin);
      params.input = to_int(live.begin * axis.step + tap.source);
      params.count = Divider(to_int(live.end - live.begin));
    }
    taps.push_back(params);
  }
  return taps;
}

// The pixels of each tap, in every image.
struct TapPixels {
  std::vector<int64_t> counts;
  int64_t most;
};

TapPixels count_pixels(const DilatedProblem& problem) {
  const Axes axes = output_axes(problem.shape);
  TapPixels pixels{{}, 0};
  for (const TapParams& row : tap_params(axes.rows)) {
    for (const TapParams& column : tap_params(axes.columns)) {
      pixels.counts.push_back(problem.shape.N * row.count.divisor * column.count.divisor);
      pixels.most = std::max(pixels.most, pixels.counts.back());
    }
  }
  return pixels;
}

struct Splits {
  int64_t pixels;  // of one
  int64_t count;
  double time;
};

// The best number of splits for one tile. Every split more is one more partial sum to write and to
// read; fewer leave multiprocessors idle.
Splits choose_splits(const DilatedProblem& problem, const TapPixels& pixels, const TileCost& cost,
                     int64_t slice) {
  // A multiprocessor does so many products while it writes and reads one partial sum.
  constexpr double kPartialSum = 400;
  const ConvShape& shape = problem.shape;
  const int64_t tiles = ceil_div(shape.K, cost.rows) * ceil_div(shape.C, cost.columns);
  const double sums =
      static_cast<double>(shape.K * shape.C) * static_cast<double>(pixels.counts.size());
  const int64_t most = std::max<int64_t>(pixels.most, 1);

  Splits best{0, 0, std::numeric_limits<double>::infinity()};
  std::vector<Work> works;
  for (const int64_t wanted : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128}) {
    const int64_t forced = problem.forced.splits;
    const int64_t length = round_up(ceil_div(most, forced > 0 ? forced : wanted), slice);
    works.clear();
    for (const int64_t count : pixels.counts) {
      works.push_back({tiles * ceil_div(count, length), std::min(length, count)});
    }
    const int64_t splits = ceil_div(most, length);
    const double time = time_of(works, cost, problem.multiprocessors) +
                        kPartialSum * static_cast<double>(splits) * sums / problem.multiprocessors;
    if (length < kMaxCount && time < best.time) best = {length, splits, time};
  }
  if (best.count == 0) throw std::runtime_error("fastseg: too many pixels for one grad_weight");
  return best;
}

// Where both operands come in chunks there are wide tiles. Where one does not, because one side has
// few channels, tiles are small.
template <typename OPERAND, bool ALL_VECTORS>
struct TilesOf {
  using type = std::conditional_t<ALL_VECTORS, TileList<Tile128x128, Tile64x64, Tile32x32>,
                                  TileList<Tile64x64, Tile32x32>>;
};
template <>
struct TilesOf<tf32, true> {
  using type = TileList<Tile128x128Alone, Tile64x64, Tile32x32>;
};
template <bool ALL_VECTORS>
struct TilesOf<float, ALL_VECTORS> {
  using type = TileList<Tile64x64, Tile32x32>;
};
template <bool ALL_VECTORS>
struct TilesOf<double, ALL_VECTORS> {
  using type = TileList<Tile32x32>;
};

// One variant of the kernel, chosen for a problem.
struct GradWeightPlan {
  void (*launch)(const GradWeightParams& params, cudaStream_t stream);
  Splits splits;
};

template <typename Traits>
void launch_splits(const GradWeightParams& params, cudaStream_t stream) {
  // Tiles fastest, then taps, then splits: neighbouring blocks read the same pixels.
  launch(dilated_grad_weight_split<Traits>,
         grid_size(ceil_div(params.C, Traits::kColumns), ceil_div(params.K, Traits::kRows),
                   int64_t{params.splits} * params.row_taps * params.column_taps),
         dim3(Traits::kThreads), Traits::kSharedBytes, stream, params);

  using T = typename Traits::T;
  const int64_t weights = int64_t{params.K} * params.C * params.row_taps * params.column_taps;
  launch(dilated_grad_weight_reduce<T>,
         grid_size(std::min(ceil_div(weights, kReduceThreads), kMaxGridX)), dim3(kReduceThreads), 0,
         stream, params);
}

template <typename OPERAND, bool A_VECTORS, bool B_VECTORS, typename... TILES>
GradWeightPlan plan_tiles(TileList<TILES...>, const DilatedProblem& problem) {
  constexpr int64_t kSlice = kSliceBytes / static_cast<int64_t>(sizeof(Stored<OPERAND>));
  const TapPixels pixels = count_pixels(problem);
  const std::vector<TileCost> costs = {
      cost_of<GradWeightTraits<OPERAND, TILES, A_VECTORS, B_VECTORS>>()...};
  const int chosen = choose_tile(costs, problem, [&](const TileCost& cost) {
    return choose_splits(problem, pixels, cost, kSlice).time;
  });
  constexpr void (*kLaunches[])(const GradWeightParams&, cudaStream_t) = {
      launch_splits<GradWeightTraits<OPERAND, TILES, A_VECTORS, B_VECTORS>>...};
  return {kLaunches[chosen], choose_splits(problem, pixels, costs[chosen], kSlice)};
}

template <typename OPERAND>
GradWeightPlan plan_operand(const DilatedGradWeightArgs& args) {
  const DilatedProblem& problem = args.problem;
  const bool a =
      holds_chunks(args.grad_output, args.grad_output_strides, problem.shape.K, problem.dtype);
  const bool b = holds_chunks(args.input, args.input_strides, problem.shape.C, problem.dtype);
  const typename TilesOf<OPERAND, true>::type wide;
  const typename TilesOf<OPERAND, false>::type small;
  if (a && b) return plan_tiles<OPERAND, true, true>(wide, problem);
  if (a) return plan_tiles<OPERAND, true, false>(small, problem);
  if (b) return plan_tiles<OPERAND, false, true>(small, problem);
  return plan_tiles<OPERAND, false, false>(small, problem);
}

GradWeightPlan plan_grad_weight(const DilatedGradWeightArgs& args) {
  if (args.problem.tf32) return plan_operand<tf32>(args);
  GradWeightPlan plan{};
  FASTSEG_DTYPE_SWITCH(args.problem.dtype, T, { plan = plan_operand<T>(args); });
  return plan;
}

}  // namespace
}  // namespace dilated

int64_t dilated_grad_weight_workspace_bytes(const DilatedGradWeightArgs& args) {
  using namespace dilated;
  const ConvShape& shape = args.problem.shape;
  const int64_t taps = std::min<int64_t>(shape.R, kMaxTaps) * std::min<int64_t>(shape.S, kMaxTaps);
  const int64_t sum_bytes = args.problem.dtype == DataType::kFloat64 ? 8 : 4;
  return plan_grad_weight(args).splits.count * taps * shape.K * shape.C * sum_bytes;
}

void dilated_grad_weight(const DilatedGradWeightArgs& args, cudaStream_t stream) {
  using namespace dilated;
  const ConvShape& shape = args.problem.shape;
  const GradWeightPlan plan = plan_grad_weight(args);
  const Axes axes = output_axes(shape);
  const std::vector<TapParams> rows = tap_params(axes.rows), columns = tap_params(axes.columns);

  GradWeightParams params{};
  params.images = to_int(shape.N);
  params.stride_h = to_int(shape.stride_h), params.stride_w = to_int(shape.stride_w);
  params.split = plan.splits.pixels, params.splits = to_int(plan.splits.count);
  params.K = to_int(shape.K), params.C = to_int(shape.C);
  params.grad_output = args.grad_output, params.grad_output_strides = args.grad_output_strides;
  params.input = args.input, params.input_strides = args.input_strides;
  params.partial = args.workspace;
  params.grad_weight_strides = args.grad_weight_strides;
  const Strides4& strides = args.grad_weight_strides;
  for (size_t r = 0; r < rows.size(); r += kMaxTaps) {
    for (size_t s = 0; s < columns.size(); s += kMaxTaps) {
      params.row_taps = static_cast<int>(std::min<size_t>(kMaxTaps, rows.size() - r));
      params.column_taps = static_cast<int>(std::min<size_t>(kMaxTaps, columns.size() - s));
      std::copy_n(&rows[r], params.row_taps, params.rows);
      std::copy_n(&columns[s], params.column_taps, params.columns);
      params.grad_weight =
          static_cast<char*>(args.grad_weight) +
          (static_cast<int64_t>(r) * strides.h + static_cast<int64_t>(s) * strides.w) *
              size_of(args.problem.dtype);
      plan.launch(params, stream);
    }
  }
}

}  // namespace fastseg
