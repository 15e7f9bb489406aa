// Launches the forward kernel: targets are outputs, sources inputs.
#include "csrc/dilated/dilated_gather.cuh"

namespace fastseg {

void dilated_forward(const DilatedForwardArgs& args, cudaStream_t stream) {
  using namespace dilated;
  const DilatedProblem& problem = args.problem;
  const ConvShape& shape = problem.shape;
  Gather gather{problem, output_axes(shape), {}, false};
  gather.vectors = holds_chunks(args.input, args.input_strides, shape.C, problem.dtype) &&
                   holds_chunks(args.weight, args.weight_strides, shape.C, problem.dtype);
  GatherParams& params = gather.params;
  params.images = to_int(shape.N);
  params.channels = to_int(shape.C), params.columns = to_int(shape.K);
  params.source = args.input, params.source_strides = args.input_strides;
  params.weight = args.weight;
  params.weight_line = args.weight_strides.n;
  params.weight_row = args.weight_strides.h, params.weight_column = args.weight_strides.w;
  params.scale = args.scale, params.bias = args.bias, params.wide_bias = args.wide_bias;
  params.activation = args.activation;
  params.target = args.output, params.target_strides = args.output_strides;
  params.target_vectors = args.output_strides.c == 1 &&
                          holds_chunks(args.output, args.output_strides, shape.K, problem.dtype);
  launch_gather</*TURNED=*/false>(gather, stream);
}

}  // namespace fastseg
