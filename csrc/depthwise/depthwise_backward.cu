// Launches the backward kernels: whole phases where they are short, walks where there are some for
// the problem, else the generic kernels; then, for grad_weight and grad_bias, the second stage of
// the sums.
#include "csrc/depthwise/depthwise_backward.cuh"
#include "csrc/depthwise/depthwise_backward_phases.cuh"
#include "csrc/depthwise/depthwise_generic.cuh"

namespace fastseg {
namespace depthwise {
namespace {

// What computes grad_input and the partial sums of the others, and how many of those there are.
struct BackwardPlan {
  void (*launch)(const DepthwiseBackwardArgs& args, const BackwardPlan& plan, cudaStream_t stream);
  int64_t workers;  // rows of the workspace [workers, R * S + 1, K]
  Walks walks;      // of launch_kernel
};

bool wants_sums(const DepthwiseBackwardArgs& args) {
  return args.grad_weight != nullptr || args.grad_bias != nullptr;
}

// ---- Walks ----

template <typename T, int VEC, int TAPS, void (*KERNEL)(BackwardParams)>
void launch_kernel(const DepthwiseBackwardArgs& args, const BackwardPlan& plan,
                   cudaStream_t stream) {
  const ConvShape& shape = args.problem.shape;
  BackwardParams params{};
  params.walks = plan.walks;
  params.H = to_int(shape.H), params.W = to_int(shape.W);
  params.P = to_int(shape.P), params.Q = to_int(shape.Q);
  params.K = to_int(shape.K);
  params.input_rows = args.grad_weight != nullptr ? params.H : 0;
  params.has_bias = args.grad_bias != nullptr;
  params.pad_top = to_int(shape.pad_top), params.pad_left = to_int(shape.pad_left);
  params.dilation_h = to_int(shape.dilation_h);
  params.dilation_w = to_int(shape.dilation_w);
  params.grad_output = args.grad_output, params.grad_output_strides = args.grad_output_strides;
  params.grad_output_row_step = shape.dilation_h * args.grad_output_strides.h;
  params.grad_output_column_step = shape.dilation_w * args.grad_output_strides.w;
  params.input = args.input, params.input_strides = args.input_strides;
  params.input_row_step = shape.dilation_h * args.input_strides.h;
  params.input_column_step = shape.dilation_w * args.input_strides.w;
  params.weight = args.weight, params.weight_strides = args.weight_strides;
  params.grad_input = args.grad_input, params.grad_input_strides = args.grad_input_strides;
  params.grad_input_row_step = shape.dilation_h * args.grad_input_strides.h;
  params.grad_input_column_step = shape.dilation_w * args.grad_input_strides.w;
  params.partial = wants_sums(args) ? args.workspace : nullptr;

  constexpr int kTaps = TAPS * TAPS;
  const int lanes = plan.walks.lanes, groups = plan.walks.groups;
  const int shared_elements =
      std::max(kTaps * VEC * lanes, block_sum_elements((kTaps + 1) * VEC, groups, lanes));
  launch(KERNEL, grid_size(plan.walks.blocks()), dim3(plan.walks.threads()),
         sizeof(Accumulator<T>) * shared_elements, stream, params);
}

// Cuts the work of KERNEL. False when the problem's counts do not fit.
template <typename T, int VEC, int TAPS, void (*KERNEL)(BackwardParams)>
bool plan_kernel(const WalkCost& cost, const Axis& rows, const Axis& columns,
                 const DepthwiseBackwardArgs& args, BackwardPlan* plan) {
  const DepthwiseProblem& problem = args.problem;
  const ConvShape& shape = problem.shape;
  if (!fits(shape) || !fits(rows, TAPS) || !fits(columns, TAPS) ||
      !plan_walks(shape.N, rows, columns, shape.K, VEC, problem.channels_last,
                  problem.multiprocessors, cost, &plan->walks)) {
    return false;
  }
  plan->launch = launch_kernel<T, VEC, TAPS, KERNEL>;
  plan->workers = plan->walks.workers;
  return true;
}

template <typename T, int VEC, int TAPS, int STRIDE>
bool plan_variant(const DepthwiseBackwardArgs& args, BackwardPlan* plan) {
  using Traits = BackwardTraits<T, VEC, TAPS, STRIDE>;
  const ConvShape& shape = args.problem.shape;
  const Axis rows =
      backward_axis(shape.H, shape.P, STRIDE, shape.pad_top, shape.dilation_h, Traits::kLag);
  const Axis columns =
      backward_axis(shape.W, shape.Q, STRIDE, shape.pad_left, shape.dilation_w, Traits::kLag);
  constexpr WalkCost kCost{Traits::kMaxThreads,  Traits::kMinBlocks, Traits::kColumns,
                           Traits::kHaloRows,    /*least_rows=*/1,   /*walk_overhead=*/2,
                           /*block_overhead=*/12};
  return plan_kernel<T, VEC, TAPS, depthwise_backward_walk<T, VEC, TAPS, STRIDE>>(
      kCost, rows, columns, args, plan);
}

template <typename T, int VEC, int TILE>
bool plan_phases(const DepthwiseBackwardArgs& args, BackwardPlan* plan) {
  const ConvShape& shape = args.problem.shape;
  const Axis rows = forward_axis(shape.H, shape.P, 1, shape.pad_top, shape.dilation_h);
  const Axis columns = forward_axis(shape.W, shape.Q, 1, shape.pad_left, shape.dilation_w);
  constexpr WalkCost kCost = PhaseTraits<T, VEC, TILE>::cost(
      PhaseTraits<T, VEC, TILE>::kBackwardBlocks, /*block_overhead=*/12);
  return plan_kernel<T, VEC, 3, depthwise_backward_phases<T, VEC, TILE>>(kCost, rows, columns, args,
                                                                         plan);
}

// The widest vector first, single elements where it does not fit.
template <typename T, int VEC, int TAPS, int STRIDE>
bool plan_widest(const DepthwiseBackwardArgs& args, BackwardPlan* plan) {
  if constexpr (VEC > 1) {
    const bool vectors =
        args.problem.channels_last && args.problem.shape.K % VEC == 0 &&
        holds_vectors(args.grad_output, args.grad_output_strides, VEC, sizeof(T)) &&
        holds_vectors(args.input, args.input_strides, VEC, sizeof(T)) &&
        (args.grad_input == nullptr ||
         holds_vectors(args.grad_input, args.grad_input_strides, VEC, sizeof(T)));
    if constexpr (has_phases<T>(TAPS, STRIDE)) {
      const int tile = phase_tile(args.problem.shape);
      if (vectors && tile == 2) return plan_phases<T, VEC, 2>(args, plan);
      if (vectors && tile == 3) return plan_phases<T, VEC, 3>(args, plan);
    }
    if (vectors) return plan_variant<T, VEC, TAPS, STRIDE>(args, plan);
  }
  return plan_variant<T, 1, TAPS, STRIDE>(args, plan);
}

// False when there is no walk for the problem.
template <typename T>
bool plan_walk(const DepthwiseBackwardArgs& args, BackwardPlan* plan) {
  const ConvShape& shape = args.problem.shape;
  if (args.problem.force_index64 || shape.C != shape.K || shape.R != shape.S ||
      shape.stride_h != shape.stride_w) {
    return false;
  }
  if (shape.stride_h > 1 && (shape.dilation_h > 1 || shape.dilation_w > 1)) return false;
  const auto is = [&](int64_t taps, int64_t stride) {
    return shape.R == taps && shape.stride_h == stride;
  };
  // Vectors as wide as their weights and sums fit into registers, see BackwardTraits.
  if constexpr (sizeof(T) == 2) {
    if (is(3, 1)) return plan_widest<T, 4, 3, 1>(args, plan);
    if (is(3, 2)) return plan_widest<T, 2, 3, 2>(args, plan);
    if (is(5, 1)) return plan_widest<T, 2, 5, 1>(args, plan);
    if (is(5, 2)) return plan_widest<T, 2, 5, 2>(args, plan);
    if (is(7, 1)) return plan_widest<T, 1, 7, 1>(args, plan);
  } else if constexpr (sizeof(T) == 4) {
    if (is(3, 1)) return plan_widest<T, 2, 3, 1>(args, plan);
    if (is(3, 2)) return plan_widest<T, 2, 3, 2>(args, plan);
    if (is(5, 1)) return plan_widest<T, 1, 5, 1>(args, plan);
    if (is(5, 2)) return plan_widest<T, 1, 5, 2>(args, plan);
    if (is(7, 1)) return plan_widest<T, 1, 7, 1>(args, plan);
  } else {
    if (is(3, 1)) return plan_widest<T, 1, 3, 1>(args, plan);
    if (is(3, 2)) return plan_widest<T, 1, 3, 2>(args, plan);
  }
  return false;
}

// ---- grad_input alone ----

// With stride 1 it is a forward convolution of grad_output with the filter turned around.
void launch_as_forward(const DepthwiseBackwardArgs& args, const BackwardPlan&,
                       cudaStream_t stream) {
  const ConvShape& shape = args.problem.shape;
  DepthwiseForwardArgs forward{};
  forward.problem = args.problem;
  ConvShape& turned = forward.problem.shape;
  turned.H = shape.P, turned.W = shape.Q, turned.P = shape.H, turned.Q = shape.W;
  turned.pad_top = (shape.R - 1) * shape.dilation_h - shape.pad_top;
  turned.pad_left = (shape.S - 1) * shape.dilation_w - shape.pad_left;
  forward.activation = Activation::kNone;
  forward.input = args.grad_output, forward.input_strides = args.grad_output_strides;
  const FilterStrides& strides = args.weight_strides;
  forward.weight =
      static_cast<const char*>(args.weight) +
      ((shape.R - 1) * strides.r + (shape.S - 1) * strides.s) * size_of(args.problem.dtype);
  forward.weight_strides = {strides.k, -strides.r, -strides.s};
  forward.output = args.grad_input, forward.output_strides = args.grad_input_strides;
  depthwise_forward(forward, stream);
}

// ---- Everything else ----

// The cut is the same whichever gradients are wanted, and so are their bits.
GenericSums plan_generic_sums(const DepthwiseBackwardArgs& args) {
  constexpr int64_t kWarp = 32, kBlocksPerMultiprocessor = 16;
  const ConvShape& shape = args.problem.shape;
  const int64_t taps = shape.R * shape.S;
  GenericSums sums{};
  sums.lanes = static_cast<int>(args.problem.channels_last ? std::min(shape.K, kWarp) : 1);
  sums.groups = kGenericThreads / sums.lanes;
  sums.slabs = ceil_div(shape.K, sums.lanes);
  sums.workers = std::clamp<int64_t>(
      args.problem.multiprocessors * kBlocksPerMultiprocessor / (sums.slabs * (taps + 1)), 1,
      ceil_div(shape.N * shape.P * shape.Q, sums.groups));
  sums.first_tap = args.grad_weight != nullptr ? 0 : taps;
  sums.last_tap = args.grad_bias != nullptr ? taps + 1 : taps;
  return sums;
}

template <typename T>
void launch_generic(const DepthwiseBackwardArgs& args, const BackwardPlan&, cudaStream_t stream) {
  const ConvShape& shape = args.problem.shape;
  const int64_t inputs = shape.N * shape.C * shape.H * shape.W;
  if (args.grad_input != nullptr && inputs > 0) {
    launch(depthwise_grad_input_generic<T>,
           grid_size(std::min(ceil_div(inputs, kGenericThreads), kMaxGridX)), dim3(kGenericThreads),
           0, stream, args);
  }
  if (wants_sums(args)) {
    const GenericSums sums = plan_generic_sums(args);
    const int64_t blocks = sums.slabs * sums.workers * (sums.last_tap - sums.first_tap);
    launch(depthwise_grad_weight_generic<T>, grid_size(std::min(blocks, kMaxGridX)),
           dim3(sums.lanes * sums.groups),
           sizeof(Accumulator<T>) * block_sum_elements(1, sums.groups, sums.lanes), stream, args,
           sums);
  }
}

template <typename T>
BackwardPlan plan_backward(const DepthwiseBackwardArgs& args) {
  const ConvShape& shape = args.problem.shape;
  BackwardPlan plan{};
  const bool stride_1 = shape.stride_h == 1 && shape.stride_w == 1;
  if (!wants_sums(args) && stride_1 && shape.C == shape.K) {
    plan.launch = launch_as_forward;
  } else if (!plan_walk<T>(args, &plan)) {
    plan.launch = launch_generic<T>;
    plan.workers = plan_generic_sums(args).workers;
  }
  return plan;
}

template <typename T>
void launch_reduce(const DepthwiseBackwardArgs& args, const BackwardPlan& plan,
                   cudaStream_t stream) {
  const ConvShape& shape = args.problem.shape;
  ReduceParams params{};
  params.partial = args.workspace;
  params.rows = plan.workers;
  params.taps = shape.R * shape.S, params.K = shape.K, params.S = shape.S;
  params.first_column = args.grad_weight != nullptr ? 0 : params.taps * shape.K;
  params.last_column = (params.taps + (args.grad_bias != nullptr ? 1 : 0)) * shape.K;
  params.grad_weight = args.grad_weight, params.grad_weight_strides = args.grad_weight_strides;
  params.grad_bias = args.grad_bias;
  launch(depthwise_backward_reduce<T>,
         grid_size(ceil_div(params.last_column - params.first_column, kReduceColumns)),
         dim3(kReduceRows * kReduceColumns), sizeof(Accumulator<T>) * kColumnSumElements, stream,
         params);
}

}  // namespace
}  // namespace depthwise

int64_t depthwise_backward_workspace_bytes(const DepthwiseBackwardArgs& args) {
  if (!depthwise::wants_sums(args)) return 0;
  const ConvShape& shape = args.problem.shape;
  int64_t bytes = 0;
  FASTSEG_DTYPE_SWITCH(args.problem.dtype, T, {
    bytes = depthwise::plan_backward<T>(args).workers * (shape.R * shape.S + 1) * shape.K *
            static_cast<int64_t>(sizeof(Accumulator<T>));
  });
  return bytes;
}

void depthwise_backward(const DepthwiseBackwardArgs& args, cudaStream_t stream) {
  FASTSEG_DTYPE_SWITCH(args.problem.dtype, T, {
    const depthwise::BackwardPlan plan = depthwise::plan_backward<T>(args);
    plan.launch(args, plan, stream);
    if (depthwise::wants_sums(args)) depthwise::launch_reduce<T>(args, plan, stream);
  });
}

}  // namespace fastseg
