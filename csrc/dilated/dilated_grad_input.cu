// Launches the grad_input kernel: targets are inputs, sources grad_outputs. All branches add to the
// same gradient, whether their outputs are summed or side by side.
#include "csrc/dilated/dilated_gather_launch.cuh"

namespace fastseg {

void dilated_grad_input(const DilatedGradInputArgs& args, cudaStream_t stream) {
  using namespace dilated;
  const DilatedProblem& problem = args.problem;
  const ConvShape& shape = problem.branches[0].shape;
  Gather gather{};
  gather.problem = problem;
  gather.vectors =
      holds_chunks(args.grad_output, args.grad_output_strides, problem.outputs, problem.dtype);
  std::vector<BranchParams> sources;
  std::vector<Axes> axes;
  for (const DilatedBranch& branch : problem.branches) {
    const int64_t K = branch.shape.K;
    gather.vectors &= holds_chunks(K, problem.dtype) &&
                      holds_chunks(branch.weight, branch.weight_strides, shape.C, problem.dtype);
    sources.push_back({branch.weight, branch.weight_strides.n, branch.weight_strides.h,
                       branch.weight_strides.w, to_int(branch.first_output), to_int(K), 0,
                       to_int(shape.C)});
    axes.push_back(input_axes(branch.shape));
  }
  gather.planes.push_back(target_plane(sources, axes));
  GatherParams& params = gather.params;
  params.images = to_int(shape.N);
  params.row_period = to_int(shape.stride_h), params.column_period = to_int(shape.stride_w);
  params.row_step = params.column_step = 1;
  params.source = args.grad_output, params.source_strides = args.grad_output_strides;
  params.activation = Activation::kNone;
  params.target = args.grad_input, params.target_strides = args.grad_input_strides;
  params.target_vectors =
      args.grad_input_strides.c == 1 &&
      holds_chunks(args.grad_input, args.grad_input_strides, shape.C, problem.dtype);
  const std::vector<PlaneRectangle> rectangles = rectangles_of(gather.planes);
  plan_gather</*TURNED=*/true>(gather, rectangles).launch(gather, rectangles, stream);
}

}  // namespace fastseg
