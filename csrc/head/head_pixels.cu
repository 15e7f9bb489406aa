// Which kernel goes through the scores of the pixels, and its launch. See head_pixels.cuh for how
// they work.
#include <algorithm>

#include "csrc/head/head_pixels.cuh"

namespace fastseg {
namespace head {

template <typename T>
void launch_weight_sum(const LossTarget& target, int64_t classes, void* sum, cudaStream_t stream) {
  if (target.weight == nullptr || target.label_smoothing == 0) return;
  launch(head_weight_sum<T>, grid_size(1), dim3(kDirectThreads), 0, stream,
         static_cast<const T*>(target.weight), classes, static_cast<Accumulator<T>*>(sum));
}
template void launch_weight_sum<float>(const LossTarget&, int64_t, void*, cudaStream_t);
template void launch_weight_sum<double>(const LossTarget&, int64_t, void*, cudaStream_t);
template void launch_weight_sum<__half>(const LossTarget&, int64_t, void*, cudaStream_t);
template void launch_weight_sum<__nv_bfloat16>(const LossTarget&, int64_t, void*, cudaStream_t);

namespace {

// How the pixels are cut into blocks.
struct PixelPlan {
  bool tiles;
  int row_tiles, column_tiles;
  int classes_at_a_time;
  int shared_bytes;
  int64_t blocks;
};

// At most so many cells stand below `outputs` neighbouring outputs: between the first and the last
// lie (outputs - 1) * step pixels, rounding may add one, and so do both ends and `second`.
int64_t cells_below(int outputs, double step, int inputs) {
  const double between = std::min((outputs - 1) * step, static_cast<double>(inputs));
  return std::min(static_cast<int64_t>(between) + 4, static_cast<int64_t>(inputs));
}

PixelPlan plan_pixels(const HeadProblem& problem) {
  using Traits = TileTraits;
  PixelPlan plan{};
  const int64_t cells = cells_below(Traits::kTileRows, problem.rows.step, problem.H()) *
                        cells_below(Traits::kColumns, problem.columns.step, problem.W());
  const int64_t group_bytes = (cells | 1) * Traits::kVec * static_cast<int64_t>(sizeof(float));
  const int64_t row_tiles = ceil_div(problem.P(), Traits::kTileRows);
  const int64_t column_tiles = ceil_div(problem.Q(), Traits::kColumns);
  // Larger tiles of the low-resolution logits than this have few pixels to a cell.
  constexpr int64_t kStaticBytes = sizeof(PixelSums) * Traits::kThreads;
  plan.tiles = problem.dtype != DataType::kFloat64 && !problem.force_index64 &&
               group_bytes <= static_cast<int64_t>(kDefaultSharedBytes) - kStaticBytes &&
               problem.N * row_tiles * column_tiles <= kMaxGridX;
  if (!plan.tiles) {
    const int64_t pixels = problem.N * problem.P() * problem.Q();
    plan.blocks =
        std::min<int64_t>(ceil_div(pixels, kDirectThreads), int64_t{16} * problem.multiprocessors);
    return plan;
  }
  plan.row_tiles = static_cast<int>(row_tiles), plan.column_tiles = static_cast<int>(column_tiles);
  const int64_t groups = std::clamp<int64_t>(
      Traits::kWantedBytes / group_bytes, 1,
      std::min<int64_t>(Traits::kMaxClasses / Traits::kVec, ceil_div(problem.C, Traits::kVec)));
  plan.classes_at_a_time = static_cast<int>(groups) * Traits::kVec;
  plan.shared_bytes = static_cast<int>(groups * group_bytes);
  plan.blocks = problem.N * row_tiles * column_tiles;
  return plan;
}

template <typename T>
PixelParams<T> pixel_params(const HeadProblem& problem, const PixelPlan& plan, const void* logits,
                            const Strides4& strides) {
  PixelParams<T> params{};
  params.N = problem.N, params.C = static_cast<int>(problem.C);
  params.rows = KernelAxis<Accumulator<T>>(problem.rows);
  params.columns = KernelAxis<Accumulator<T>>(problem.columns);
  params.logits = static_cast<const T*>(logits), params.strides = strides;
  if (plan.tiles) {
    params.row_tiles = Divider(plan.row_tiles), params.column_tiles = Divider(plan.column_tiles);
  }
  params.classes_at_a_time = plan.classes_at_a_time;
  params.channels_last = problem.channels_last;
  return params;
}

template <typename T, typename Pixels>
void launch_pixels(const PixelPlan& plan, const PixelParams<T>& params, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.tiles) {
      launch(head_pixels_tile<T, Pixels>, grid_size(plan.blocks), dim3(TileTraits::kThreads),
             plan.shared_bytes, stream, params);
      return;
    }
  }
  launch(head_pixels_direct<T, Pixels>, grid_size(plan.blocks), dim3(kDirectThreads), 0, stream,
         params);
}

PixelSums* partial_sums(const CrossEntropyArgs& args) {
  return reinterpret_cast<PixelSums*>(static_cast<unsigned char*>(args.workspace) +
                                      kWeightSumBytes);
}

template <typename T>
void launch_loss(const CrossEntropyArgs& args, const PixelPlan& plan, cudaStream_t stream) {
  using Acc = Accumulator<T>;
  const HeadProblem& problem = args.problem;
  launch_weight_sum<T>(args.target, problem.C, args.workspace, stream);
  PixelParams<T> params = pixel_params<T>(problem, plan, args.logits, args.logits_strides);
  params.terms = loss_terms<T>(problem, args.target, args.workspace);
  params.lse = static_cast<Acc*>(args.lse), params.losses = static_cast<Acc*>(args.losses);
  params.partial = partial_sums(args);
  if (args.target.label_smoothing == 0) {
    launch_pixels<T, LossPixels<T, false>>(plan, params, stream);
  } else {
    launch_pixels<T, LossPixels<T, true>>(plan, params, stream);
  }
}

}  // namespace
}  // namespace head

void head_argmax(const ArgmaxArgs& args, cudaStream_t stream) {
  FASTSEG_DTYPE_SWITCH(args.problem.dtype, T, {
    const head::PixelPlan plan = head::plan_pixels(args.problem);
    head::PixelParams<T> params =
        head::pixel_params<T>(args.problem, plan, args.logits, args.logits_strides);
    params.labels = args.labels, params.byte_labels = args.byte_labels;
    head::launch_pixels<T, head::ArgmaxPixels<T>>(plan, params, stream);
  });
}

int64_t cross_entropy_workspace_bytes(const CrossEntropyArgs& args) {
  return kWeightSumBytes +
         head::plan_pixels(args.problem).blocks * static_cast<int64_t>(sizeof(head::PixelSums));
}

void cross_entropy_forward(const CrossEntropyArgs& args, cudaStream_t stream) {
  FASTSEG_DTYPE_SWITCH(args.problem.dtype, T, {
    using Acc = Accumulator<T>;
    const head::PixelPlan plan = head::plan_pixels(args.problem);
    if (plan.blocks > 0) head::launch_loss<T>(args, plan, stream);
    head::LossSumParams<Acc> sums{};
    sums.partial = head::partial_sums(args), sums.blocks = plan.blocks;
    sums.ignore_index = args.target.ignore_index;
    sums.mean = args.reduction == LossReduction::kMean;
    sums.loss = static_cast<Acc*>(args.loss);
    sums.total_weight = static_cast<Acc*>(args.total_weight);
    sums.offender = args.offender;
    launch(head::head_loss_sum<Acc>, grid_size(1), dim3(head::kDirectThreads), 0, stream, sums);
  });
}

}  // namespace fastseg
