// Launches the forward kernels: whole phases where they are short, walks where there are some for
// the problem, else the generic kernel.
#include "csrc/depthwise/depthwise_forward.cuh"
#include "csrc/depthwise/depthwise_forward_phases.cuh"
#include "csrc/depthwise/depthwise_generic.cuh"

namespace fastseg {
namespace depthwise {
namespace {

// Cuts the work of `kernel` and launches it. False when the problem's counts do not fit.
template <typename T, int VEC, int TAPS>
bool launch_kernel(void (*kernel)(ForwardParams), const WalkCost& cost,
                   const DepthwiseForwardArgs& args, cudaStream_t stream) {
  const DepthwiseProblem& problem = args.problem;
  const ConvShape& shape = problem.shape;
  const Axis rows = forward_axis(shape.H, shape.P, shape.stride_h, shape.pad_top, shape.dilation_h);
  const Axis columns =
      forward_axis(shape.W, shape.Q, shape.stride_w, shape.pad_left, shape.dilation_w);

  ForwardParams params{};
  if (!fits(shape) || !fits(rows, TAPS) || !fits(columns, TAPS) ||
      !plan_walks(shape.N, rows, columns, shape.K, VEC, problem.channels_last,
                  problem.multiprocessors, cost, &params.walks)) {
    return false;
  }
  params.H = to_int(shape.H), params.W = to_int(shape.W);
  params.K = to_int(shape.K);
  params.pad_top = to_int(shape.pad_top), params.pad_left = to_int(shape.pad_left);
  params.dilation_h = to_int(shape.dilation_h);
  params.dilation_w = to_int(shape.dilation_w);
  params.rows = to_int(shape.P / shape.dilation_h);
  params.longer_row_phases = to_int(shape.P % shape.dilation_h);
  params.columns = to_int(shape.Q / shape.dilation_w);
  params.longer_column_phases = to_int(shape.Q % shape.dilation_w);
  params.multiplier = Divider(to_int(shape.multiplier()));
  params.activation = args.activation;
  params.input = args.input, params.input_strides = args.input_strides;
  params.input_row_step = shape.dilation_h * args.input_strides.h;
  params.input_column_step = shape.dilation_w * args.input_strides.w;
  params.weight = args.weight, params.weight_strides = args.weight_strides;
  params.bias = args.bias;
  params.output = args.output, params.output_strides = args.output_strides;
  params.output_row_step = shape.dilation_h * args.output_strides.h;
  params.output_column_step = shape.dilation_w * args.output_strides.w;

  const size_t shared_bytes =
      sizeof(Accumulator<T>) * TAPS * TAPS * VEC * static_cast<size_t>(params.walks.lanes);
  launch(kernel, grid_size(params.walks.blocks()), dim3(params.walks.threads()), shared_bytes,
         stream, params);
  return true;
}

template <typename T, int VEC, int TAPS, int STRIDE>
bool launch_variant(const DepthwiseForwardArgs& args, cudaStream_t stream) {
  using Traits = ForwardTraits<T, VEC, TAPS, STRIDE>;
  constexpr WalkCost kCost{Traits::kMaxThreads, Traits::kMinBlocks, Traits::kColumns,
                           Traits::kHaloRows,   /*least_rows=*/1,   /*walk_overhead=*/2,
                           /*block_overhead=*/4};
  return launch_kernel<T, VEC, TAPS>(depthwise_forward_walk<T, VEC, TAPS, STRIDE>, kCost, args,
                                     stream);
}

template <typename T, int VEC, int TILE>
bool launch_phases(const DepthwiseForwardArgs& args, cudaStream_t stream) {
  constexpr WalkCost kCost = PhaseTraits<T, VEC, TILE>::cost(
      PhaseTraits<T, VEC, TILE>::kForwardBlocks, /*block_overhead=*/4);
  return launch_kernel<T, VEC, 3>(depthwise_forward_phases<T, VEC, TILE>, kCost, args, stream);
}

// The widest vector first, single elements where it does not fit.
template <typename T, int VEC, int TAPS, int STRIDE>
bool launch_widest(const DepthwiseForwardArgs& args, cudaStream_t stream) {
  const ConvShape& shape = args.problem.shape;
  if constexpr (VEC > 1) {
    const bool vectors = args.problem.channels_last && shape.C == shape.K && shape.K % VEC == 0 &&
                         holds_vectors(args.input, args.input_strides, VEC, sizeof(T)) &&
                         holds_vectors(args.output, args.output_strides, VEC, sizeof(T)) &&
                         is_aligned(args.bias, VEC * sizeof(T));
    if constexpr (has_phases<T>(TAPS, STRIDE)) {
      const int tile = phase_tile(shape);
      if (vectors && tile == 2) return launch_phases<T, VEC, 2>(args, stream);
      if (vectors && tile == 3) return launch_phases<T, VEC, 3>(args, stream);
    }
    if (vectors) return launch_variant<T, VEC, TAPS, STRIDE>(args, stream);
  }
  return launch_variant<T, 1, TAPS, STRIDE>(args, stream);
}

// False when there is no walk for the problem.
template <typename T>
bool launch_walk(const DepthwiseForwardArgs& args, cudaStream_t stream) {
  // Vectors as wide as their weights fit into registers, see ForwardTraits.
  constexpr int kWide = sizeof(T) == 8 ? 2 : 4;
  const ConvShape& shape = args.problem.shape;
  if (args.problem.force_index64 || shape.R != shape.S || shape.stride_h != shape.stride_w)
    return false;
  const auto is = [&](int64_t taps, int64_t stride) {
    return shape.R == taps && shape.stride_h == stride;
  };
  if (is(3, 1)) return launch_widest<T, kWide, 3, 1>(args, stream);
  if (is(3, 2)) return launch_widest<T, kWide, 3, 2>(args, stream);
  if constexpr (sizeof(T) < 8) {
    if (is(5, 1)) return launch_widest<T, 2, 5, 1>(args, stream);
    if (is(5, 2)) return launch_widest<T, 2, 5, 2>(args, stream);
    if (is(7, 1)) return launch_widest<T, 2, 7, 1>(args, stream);
  }
  return false;
}

template <typename T>
void launch_generic(const DepthwiseForwardArgs& args, cudaStream_t stream) {
  const ConvShape& shape = args.problem.shape;
  const int64_t blocks = ceil_div(shape.N * shape.K * shape.P * shape.Q, kGenericThreads);
  launch(depthwise_forward_generic<T>, grid_size(std::min(blocks, kMaxGridX)),
         dim3(kGenericThreads), 0, stream, args);
}

}  // namespace
}  // namespace depthwise

void depthwise_forward(const DepthwiseForwardArgs& args, cudaStream_t stream) {
  FASTSEG_DTYPE_SWITCH(args.problem.dtype, T, {
    if (!depthwise::launch_walk<T>(args, stream)) depthwise::launch_generic<T>(args, stream);
  });
}

}  // namespace fastseg
