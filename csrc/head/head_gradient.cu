// Which kernel computes the gradient of the loss, and its launch. See head_gradient.cuh for how
// they work.
#include <algorithm>

#include "csrc/head/head_gradient.cuh"

namespace fastseg {
namespace head {
namespace {

template <typename T>
GradientParams<T> gradient_params(const CrossEntropyBackwardArgs& args) {
  using Acc = Accumulator<T>;
  const HeadProblem& problem = args.problem;
  GradientParams<T> params{};
  params.N = problem.N, params.C = static_cast<int>(problem.C);
  params.rows = KernelAxis<Acc>(problem.rows), params.columns = KernelAxis<Acc>(problem.columns);
  params.logits = static_cast<const T*>(args.logits), params.strides = args.logits_strides;
  params.terms = loss_terms<T>(problem, args.target, args.workspace);
  params.lse = static_cast<const Acc*>(args.lse);
  params.grad_losses = static_cast<const Acc*>(args.grad_losses);
  params.grad_losses_strides = args.grad_losses_strides;
  params.gradient = static_cast<Acc*>(args.gradient);
  params.gradient_strides = args.gradient_strides;
  params.channels_last = problem.channels_last;
  return params;
}

// At most so many pixels stand in `cells` neighbouring cells: they are `step` apart, and rounding
// may add one at each end. Pixels at the border that look at its outermost half pixel count too.
double pixels_above(int64_t cells, double step, int outputs) {
  if (!(step > 0)) return outputs;
  return std::min((cells + 1) / step + 4, static_cast<double>(outputs));
}

// False where the records of a row of pixels do not fit.
template <typename T, int CLASSES, int COLUMNS, bool SMOOTH>
bool launch_walk(const CrossEntropyBackwardArgs& args, cudaStream_t stream) {
  using Traits = GradientTraits<T, CLASSES, COLUMNS, SMOOTH>;
  const HeadProblem& problem = args.problem;
  const auto width = [&](int groups) {
    return pixels_above(int64_t{groups} * COLUMNS + 1, problem.columns.step, problem.Q());
  };

  // As few lanes as hold the classes, in whole warps from 32 on; then as many sets of columns as
  // fill a warp, have columns, and whose pixels fit.
  constexpr int kWarp = 32;
  const int64_t wanted = ceil_div(problem.C, CLASSES);
  int lanes = 1;
  while (lanes < kWarp && lanes < wanted) lanes *= 2;
  if (wanted > kWarp) {
    const int64_t slabs = ceil_div(wanted, Traits::kMaxThreads);
    lanes = static_cast<int>(ceil_div(ceil_div(wanted, slabs), kWarp) * kWarp);
  }
  int groups = std::max(kWarp / lanes, 1);
  while (groups > 1 &&
         (width(groups) > Traits::kRecords || (groups / 2) * COLUMNS >= problem.W())) {
    groups /= 2;
  }
  const double longest = width(groups);
  if (longest > Traits::kMaxRecords) return false;

  const int64_t slabs = ceil_div(wanted, lanes);
  const int64_t column_tiles = ceil_div(problem.W(), groups * COLUMNS);
  const auto blocks = [&](int rows) {
    return problem.N * ceil_div(problem.H(), rows) * column_tiles * slabs;
  };
  // Tall tiles compute fewer cells twice, low ones keep all multiprocessors busy.
  int rows_per_tile = Traits::kMaxRows;
  const int64_t wanted_blocks = int64_t{512} / (lanes * groups) * problem.multiprocessors;
  while (rows_per_tile > 2 && blocks(rows_per_tile) < wanted_blocks) rows_per_tile /= 2;
  if (blocks(rows_per_tile) > kMaxGridX) return false;

  GradientParams<T> params = gradient_params<T>(args);
  params.lanes = Divider(lanes), params.groups = groups;
  params.slabs = divider(slabs);
  params.column_tiles = divider(column_tiles);
  params.rows_per_tile = rows_per_tile;
  params.row_tiles = divider(ceil_div(problem.H(), rows_per_tile));
  params.records = std::max(Traits::kRecords, static_cast<int>(longest));
  const size_t shared_bytes = static_cast<size_t>(params.records) * Traits::kRecordBytes +
                              sizeof(int) * (groups * COLUMNS + 2);
  launch(head_gradient_walk<T, CLASSES, COLUMNS, SMOOTH>, grid_size(blocks(rows_per_tile)),
         dim3(lanes * groups), shared_bytes, stream, params);
  return true;
}

template <typename T, bool SMOOTH>
void launch_gradient(const CrossEntropyBackwardArgs& args, cudaStream_t stream) {
  const HeadProblem& problem = args.problem;
  if constexpr (!std::is_same_v<T, double>) {
    if (!problem.force_index64) {
      // Two classes a lane share the loads of a pixel, where that leaves no more lanes idle.
      const bool pairs = ceil_div(problem.C, 32) % 2 == 0;
      const bool launched = pairs ? launch_walk<T, 2, 4, SMOOTH>(args, stream)
                                  : launch_walk<T, 1, 8, SMOOTH>(args, stream);
      if (launched) return;
    }
  }
  const int64_t elements = problem.N * problem.C * problem.H() * problem.W();
  launch(head_gradient_direct<T, SMOOTH>,
         grid_size(std::min(ceil_div(elements, kDirectThreads), kMaxGridX)), dim3(kDirectThreads),
         0, stream, gradient_params<T>(args));
}

}  // namespace
}  // namespace head

void cross_entropy_backward(const CrossEntropyBackwardArgs& args, cudaStream_t stream) {
  FASTSEG_DTYPE_SWITCH(args.problem.dtype, T, {
    head::launch_weight_sum<T>(args.target, args.problem.C, args.workspace, stream);
    if (args.target.label_smoothing == 0) {
      head::launch_gradient<T, false>(args, stream);
    } else {
      head::launch_gradient<T, true>(args, stream);
    }
  });
}

}  // namespace fastseg
