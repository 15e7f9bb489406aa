// Launches the grad_input kernel: targets are inputs, sources grad_outputs.
#include "csrc/dilated/dilated_gather.cuh"

namespace fastseg {

void dilated_grad_input(const DilatedGradInputArgs& args, cudaStream_t stream) {
  using namespace dilated;
  const DilatedProblem& problem = args.problem;
  const ConvShape& shape = problem.shape;
  Gather gather{problem, input_axes(shape), {}, false};
  gather.vectors =
      holds_chunks(args.grad_output, args.grad_output_strides, shape.K, problem.dtype) &&
      holds_chunks(args.weight, args.weight_strides, shape.C, problem.dtype);
  GatherParams& params = gather.params;
  params.images = to_int(shape.N);
  params.channels = to_int(shape.K), params.columns = to_int(shape.C);
  params.source = args.grad_output, params.source_strides = args.grad_output_strides;
  params.weight = args.weight;
  params.weight_line = args.weight_strides.n;
  params.weight_row = args.weight_strides.h, params.weight_column = args.weight_strides.w;
  params.activation = Activation::kNone;
  params.target = args.grad_input, params.target_strides = args.grad_input_strides;
  params.target_vectors =
      args.grad_input_strides.c == 1 &&
      holds_chunks(args.grad_input, args.grad_input_strides, shape.C, problem.dtype);
  launch_gather</*TURNED=*/true>(gather, stream);
}

}  // namespace fastseg
