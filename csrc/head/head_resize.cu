// Which kernel resizes what, and its launch. See head_resize.cuh for how they work.
#include <algorithm>

#include "csrc/head/head_resize.cuh"

namespace fastseg {
namespace head {
namespace {

constexpr int64_t kMaxInt = (int64_t{1} << 31) - 1;

// Whether packs of `vec` channels can be moved at once.
bool holds_vectors(const void* data, const Strides4& strides, int vec, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % (vec * element_bytes) == 0 && strides.n % vec == 0 &&
         strides.h % vec == 0 && strides.w % vec == 0;
}

template <typename T>
ResizeForwardParams<Accumulator<T>> forward_params(const ResizeForwardArgs& args) {
  const HeadProblem& problem = args.problem;
  ResizeForwardParams<Accumulator<T>> params{};
  params.rows = KernelAxis<Accumulator<T>>(problem.rows);
  params.columns = KernelAxis<Accumulator<T>>(problem.columns);
  params.input = args.input, params.input_strides = args.input_strides;
  params.output = args.output;
  params.elements = problem.N * problem.C * problem.P() * problem.Q();
  params.C = divider(problem.C);
  params.P = divider(problem.P()), params.Q = divider(problem.Q());
  return params;
}

template <typename T, int VEC>
void launch_forward_nhwc(const ResizeForwardArgs& args, cudaStream_t stream) {
  const HeadProblem& problem = args.problem;
  if constexpr (VEC > 1) {
    if (problem.C % VEC != 0 || !holds_vectors(args.input, args.input_strides, VEC, sizeof(T))) {
      return launch_forward_nhwc<T, VEC / 2>(args, stream);
    }
  }
  auto params = forward_params<T>(args);
  params.vectors = divider(problem.C / VEC);
  params.column_sets = divider(ceil_div(problem.Q(), ResizeTraits::kColumns));
  params.items =
      problem.N * problem.P() * params.column_sets.divisor * int64_t{params.vectors.divisor};
  const bool wide = problem.force_index64 || params.items > kMaxInt;
  launch(wide ? resize_forward_nhwc<T, VEC, true> : resize_forward_nhwc<T, VEC, false>,
         grid_size(ceil_div(params.items, ResizeTraits::kThreads)), dim3(ResizeTraits::kThreads), 0,
         stream, params);
}

template <typename T>
void launch_forward_nchw(const ResizeForwardArgs& args, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  auto params = forward_params<T>(args);
  params.items = ceil_div(params.elements, kVec);
  const bool wide = args.problem.force_index64 || params.elements > kMaxInt - kVec;
  launch(wide ? resize_forward_nchw<T, kVec, true> : resize_forward_nchw<T, kVec, false>,
         grid_size(ceil_div(params.items, ResizeTraits::kThreads)), dim3(ResizeTraits::kThreads), 0,
         stream, params);
}

template <typename T>
ResizeBackwardParams<Accumulator<T>> backward_params(const ResizeBackwardArgs& args) {
  const HeadProblem& problem = args.problem;
  ResizeBackwardParams<Accumulator<T>> params{};
  params.rows = KernelAxis<Accumulator<T>>(problem.rows);
  params.columns = KernelAxis<Accumulator<T>>(problem.columns);
  params.grad_output = args.grad_output, params.grad_output_strides = args.grad_output_strides;
  params.grad_input = args.grad_input, params.grad_input_strides = args.grad_input_strides;
  params.channels_last = problem.channels_last;
  return params;
}

template <typename T, int VEC>
void launch_backward_walk(const ResizeBackwardArgs& args, cudaStream_t stream) {
  using Traits = ResizeBackwardTraits<T, VEC>;
  const HeadProblem& problem = args.problem;
  if constexpr (VEC > 1) {
    if (problem.C % VEC != 0 ||
        !holds_vectors(args.grad_output, args.grad_output_strides, VEC, sizeof(T)) ||
        !holds_vectors(args.grad_input, args.grad_input_strides, VEC, sizeof(T))) {
      return launch_backward_walk<T, VEC / 2>(args, stream);
    }
  }
  auto params = backward_params<T>(args);
  params.vectors = divider(problem.C / VEC);
  params.column_sets = divider(ceil_div(problem.W(), Traits::kColumns));
  // Long walks read fewer rows twice, short ones keep all multiprocessors busy.
  const int64_t wanted = int64_t{512} * problem.multiprocessors;
  const auto items = [&](int rows) {
    return problem.N * ceil_div(problem.H(), rows) * params.column_sets.divisor *
           params.vectors.divisor;
  };
  params.rows_per_item = Traits::kMaxRows;
  while (params.rows_per_item > 2 && items(params.rows_per_item) < wanted) {
    params.rows_per_item /= 2;
  }
  params.row_sets = divider(ceil_div(problem.H(), params.rows_per_item));
  params.items = items(params.rows_per_item);
  const bool wide = problem.force_index64 || params.items > kMaxInt;
  launch(wide ? resize_backward_walk<T, VEC, true> : resize_backward_walk<T, VEC, false>,
         grid_size(ceil_div(params.items, Traits::kThreads)), dim3(Traits::kThreads), 0, stream,
         params);
}

template <typename T>
void launch_backward_gather(const ResizeBackwardArgs& args, cudaStream_t stream) {
  const HeadProblem& problem = args.problem;
  auto params = backward_params<T>(args);
  params.C = divider(problem.C);
  params.H = divider(problem.H()), params.W = divider(problem.W());
  params.items = problem.N * problem.C * problem.H() * problem.W();
  const bool wide = problem.force_index64 || params.items > kMaxInt;
  launch(wide ? resize_backward_gather<T, true> : resize_backward_gather<T, false>,
         grid_size(ceil_div(params.items, kDirectThreads)), dim3(kDirectThreads), 0, stream,
         params);
}

}  // namespace
}  // namespace head

void resize_forward(const ResizeForwardArgs& args, cudaStream_t stream) {
  FASTSEG_DTYPE_SWITCH(args.problem.dtype, T, {
    if (args.problem.channels_last) {
      head::launch_forward_nhwc<T, 16 / sizeof(T)>(args, stream);
    } else {
      head::launch_forward_nchw<T>(args, stream);
    }
  });
}

void resize_backward(const ResizeBackwardArgs& args, cudaStream_t stream) {
  const bool neighbours = args.problem.C == 1 || args.grad_output_strides.c == 1;
  FASTSEG_DTYPE_SWITCH(args.problem.dtype, T, {
    if (args.problem.channels_last && neighbours) {
      head::launch_backward_walk<T, 16 / sizeof(T)>(args, stream);
    } else {
      head::launch_backward_gather<T>(args, stream);
    }
  });
}

}  // namespace fastseg
