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

// How many pixels the taps of the branches have.
struct BranchPixels {
  const DilatedBranch* branch;
  std::vector<int64_t> taps;  // in all images
  int64_t most;
};

std::vector<BranchPixels> count_pixels(const DilatedProblem& problem) {
  std::vector<BranchPixels> found;
  for (const DilatedBranch& branch : problem.branches) {
    const Axes axes = output_axes(branch.shape);
    BranchPixels pixels{&branch, {}, 0};
    for (const TapParams& row : tap_params(axes.rows)) {
      for (const TapParams& column : tap_params(axes.columns)) {
        pixels.taps.push_back(branch.shape.N * row.count.divisor * column.count.divisor);
        pixels.most = std::max(pixels.most, pixels.taps.back());
      }
    }
    found.push_back(std::move(pixels));
  }
  return found;
}

struct Splits {
  int64_t pixels;  // of one
  double time;
};

// The best length of splits for one tile. Every split more is one more partial sum to write and to
// read; fewer leave multiprocessors idle.
Splits choose_splits(const DilatedProblem& problem, const std::vector<BranchPixels>& branches,
                     const TileCost& cost, int64_t slice) {
  // A multiprocessor does so many products while it writes and reads one partial sum.
  constexpr double kPartialSum = 400;
  int64_t most = 1;
  for (const BranchPixels& pixels : branches) most = std::max(most, pixels.most);

  Splits best{0, std::numeric_limits<double>::infinity()};
  std::vector<Work> works;
  for (const int64_t wanted : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128}) {
    const int64_t forced = problem.forced.splits;
    const int64_t length = round_up(ceil_div(most, forced > 0 ? forced : wanted), slice);
    double sums = 0;
    works.clear();
    for (const BranchPixels& pixels : branches) {
      const ConvShape& shape = pixels.branch->shape;
      const int64_t tiles = ceil_div(shape.K, cost.rows) * ceil_div(shape.C, cost.columns);
      for (const int64_t count : pixels.taps) {
        works.push_back({tiles * ceil_div(count, length), std::min(length, count)});
      }
      sums += static_cast<double>(shape.K * shape.C) * static_cast<double>(pixels.taps.size()) *
              static_cast<double>(ceil_div(pixels.most, length));
    }
    const double time = time_of(works, cost, problem.multiprocessors) +
                        kPartialSum * sums / problem.multiprocessors;
    if (length < kMaxCount && time < best.time) best = {length, time};
  }
  if (best.pixels == 0) throw std::runtime_error("fastseg: too many pixels for one grad_weight");
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

// What one launch computes.
struct GradWeightLaunch {
  GradWeightParams params;
  int64_t k_tiles;     // of all grids
  int64_t splits;      // of the tap with the most pixels
  int64_t tap_splits;  // of the grid with the most of them, each tap with all splits
};

// One variant of the kernel, chosen for a problem.
struct GradWeightPlan {
  void (*launch)(const GradWeightLaunch& launched, cudaStream_t stream);
  int tile_rows;
  int64_t split;  // pixels
};

template <typename Traits>
void launch_splits(const GradWeightLaunch& launched, cudaStream_t stream) {
  const GradWeightParams& params = launched.params;
  // Tiles fastest, then taps, then splits: neighbouring blocks read the same pixels.
  if (launched.splits > 0) {  // not every tap looks at padding alone
    launch(dilated_grad_weight_split<Traits>,
           grid_size(ceil_div(params.C, Traits::kColumns), launched.k_tiles, launched.tap_splits),
           dim3(Traits::kThreads), Traits::kSharedBytes, stream, params);
  }
  launch(dilated_grad_weight_reduce<typename Traits::T>,
         grid_size(std::min(ceil_div(params.weights, kReduceThreads), kMaxGridX)),
         dim3(kReduceThreads), 0, stream, params);
}

template <typename OPERAND, bool A_VECTORS, bool B_VECTORS, typename... TILES>
GradWeightPlan plan_tiles(TileList<TILES...>, const DilatedProblem& problem) {
  constexpr int64_t kSlice = kSliceBytes / static_cast<int64_t>(sizeof(Stored<OPERAND>));
  const std::vector<BranchPixels> pixels = count_pixels(problem);
  const std::vector<TileCost> costs = {
      cost_of<GradWeightTraits<OPERAND, TILES, A_VECTORS, B_VECTORS>>()...};
  const int chosen = choose_tile(costs, problem, [&](const TileCost& cost) {
    return choose_splits(problem, pixels, cost, kSlice).time;
  });
  constexpr decltype(GradWeightPlan::launch) kLaunches[] = {
      launch_splits<GradWeightTraits<OPERAND, TILES, A_VECTORS, B_VECTORS>>...};
  const TileCost& cost = costs[chosen];
  return {kLaunches[chosen], cost.rows, choose_splits(problem, pixels, cost, kSlice).pixels};
}

template <typename OPERAND>
GradWeightPlan plan_operand(const DilatedGradWeightArgs& args) {
  const DilatedProblem& problem = args.problem;
  const int64_t C = problem.branches[0].shape.C;
  bool a = holds_chunks(args.grad_output, args.grad_output_strides, problem.outputs, problem.dtype);
  for (const DilatedBranch& branch : problem.branches) {
    a &= holds_chunks(branch.shape.K, problem.dtype);
  }
  const bool b = holds_chunks(args.input, args.input_strides, C, problem.dtype);
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

// Collects the taps of one launch.
class TapTable {
 public:
  TapTable(const DilatedGradWeightArgs& args, const GradWeightPlan& plan)
      : args_(args), plan_(plan) {
    clear();
  }

  bool has_room(int row_taps, int column_taps) const {
    return found_.params.grid_count < kMaxGrids && rows_ + row_taps <= kMaxTaps &&
           columns_ + column_taps <= kMaxTaps;
  }

  // Taps (r + i, s + j) of a branch, all of them in `rows` and `columns`.
  void add(size_t branch, const TapParams* rows, int64_t r, int row_taps, const TapParams* columns,
           int64_t s, int column_taps) {
    GradWeightParams& params = found_.params;
    const ConvShape& shape = args_.problem.branches[branch].shape;
    const DilatedGradWeightArgs::Gradient& gradient = args_.grad_weights[branch];
    TapGrid& grid = params.grids[params.grid_count++];
    grid.first_tile = to_int(found_.k_tiles);
    grid.row = rows_, grid.column = columns_;
    grid.row_taps = row_taps, grid.column_taps = column_taps;
    grid.K = to_int(shape.K);
    grid.channel = to_int(args_.problem.branches[branch].first_output);
    grid.first_weight = params.weights;
    grid.grad_weight =
        static_cast<char*>(gradient.data) +
        (r * gradient.strides.h + s * gradient.strides.w) * size_of(args_.problem.dtype);
    grid.grad_weight_strides = gradient.strides;

    int64_t most_rows = 0, most_columns = 0;
    for (int i = 0; i < row_taps; ++i) {
      params.rows[rows_++] = rows[r + i];
      most_rows = std::max<int64_t>(most_rows, rows[r + i].count.divisor);
    }
    for (int j = 0; j < column_taps; ++j) {
      params.columns[columns_++] = columns[s + j];
      most_columns = std::max<int64_t>(most_columns, columns[s + j].count.divisor);
    }
    const int64_t splits = ceil_div(shape.N * most_rows * most_columns, plan_.split);
    found_.splits = std::max(found_.splits, splits);
    found_.tap_splits = std::max(found_.tap_splits, splits * row_taps * column_taps);
    found_.k_tiles += ceil_div(shape.K, plan_.tile_rows);
    params.weights += row_taps * column_taps * shape.K * shape.C;
  }

  // What was added since the last time.
  GradWeightLaunch take() {
    const GradWeightLaunch taken = found_;
    clear();
    return taken;
  }

 private:
  void clear() {
    const ConvShape& shape = args_.problem.branches[0].shape;
    found_ = {}, rows_ = columns_ = 0;
    GradWeightParams& params = found_.params;
    params.images = to_int(shape.N);
    params.split = plan_.split;
    params.C = to_int(shape.C);
    params.grad_output = args_.grad_output, params.grad_output_strides = args_.grad_output_strides;
    params.input = args_.input, params.input_strides = args_.input_strides;
    params.input_row = shape.stride_h * args_.input_strides.h;
    params.input_column = shape.stride_w * args_.input_strides.w;
    params.partial = args_.workspace;
  }

  const DilatedGradWeightArgs& args_;
  const GradWeightPlan& plan_;
  GradWeightLaunch found_;
  int rows_, columns_;
};

std::vector<GradWeightLaunch> launches_of(const DilatedGradWeightArgs& args,
                                          const GradWeightPlan& plan) {
  std::vector<GradWeightLaunch> launches;
  TapTable table(args, plan);
  for (size_t branch = 0; branch < args.problem.branches.size(); ++branch) {
    const Axes axes = output_axes(args.problem.branches[branch].shape);
    const std::vector<TapParams> rows = tap_params(axes.rows), columns = tap_params(axes.columns);
    for (size_t r = 0; r < rows.size(); r += kMaxGridTaps) {
      for (size_t s = 0; s < columns.size(); s += kMaxGridTaps) {
        const int row_taps = static_cast<int>(std::min<size_t>(kMaxGridTaps, rows.size() - r));
        const int column_taps =
            static_cast<int>(std::min<size_t>(kMaxGridTaps, columns.size() - s));
        if (!table.has_room(row_taps, column_taps)) launches.push_back(table.take());
        table.add(branch, rows.data(), static_cast<int64_t>(r), row_taps, columns.data(),
                  static_cast<int64_t>(s), column_taps);
      }
    }
  }
  launches.push_back(table.take());
  return launches;
}

}  // namespace
}  // namespace dilated

int64_t dilated_grad_weight_workspace_bytes(const DilatedGradWeightArgs& args) {
  using namespace dilated;
  const int64_t sum_bytes = args.problem.dtype == DataType::kFloat64 ? 8 : 4;
  int64_t bytes = 0;
  for (const GradWeightLaunch& launched : launches_of(args, plan_grad_weight(args))) {
    bytes = std::max(bytes, launched.splits * launched.params.weights * sum_bytes);
  }
  return bytes;
}

void dilated_grad_weight(const DilatedGradWeightArgs& args, cudaStream_t stream) {
  using namespace dilated;
  const GradWeightPlan plan = plan_grad_weight(args);
  for (const GradWeightLaunch& launched : launches_of(args, plan)) plan.launch(launched, stream);
}

}  // namespace fastseg
