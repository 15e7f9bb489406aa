// Launches the forward kernel: targets are outputs, sources inputs.
#include "csrc/dilated/dilated_gather_launch.cuh"

namespace fastseg {
namespace dilated {
namespace {

Gather forward_gather(const DilatedForwardArgs& args) {
  const DilatedProblem& problem = args.problem;
  const ConvShape& shape = problem.branches[0].shape;
  Gather gather{};
  gather.problem = problem;
  gather.vectors = holds_chunks(args.input, args.input_strides, shape.C, problem.dtype);
  GatherParams& params = gather.params;
  params.target_vectors =
      args.output_strides.c == 1 &&
      holds_chunks(args.output, args.output_strides, problem.outputs, problem.dtype);
  std::vector<BranchParams> targets;
  std::vector<Axes> axes;
  for (const DilatedBranch& branch : problem.branches) {
    const int64_t K = branch.shape.K;
    gather.vectors &= holds_chunks(branch.weight, branch.weight_strides, shape.C, problem.dtype);
    params.target_vectors &= holds_chunks(K, problem.dtype);
    targets.push_back({branch.weight, branch.weight_strides.n, branch.weight_strides.h,
                       branch.weight_strides.w, 0, to_int(shape.C), to_int(branch.first_output),
                       to_int(K)});
    axes.push_back(output_axes(branch.shape));
  }
  if (problem.summed) {
    gather.planes.push_back(target_plane(targets, axes));
  } else {
    for (size_t i = 0; i < axes.size(); ++i) {
      gather.planes.push_back(target_plane({targets[i]}, {axes[i]}));
    }
  }
  params.images = to_int(shape.N);
  params.row_period = params.column_period = 1;
  params.row_step = to_int(shape.stride_h), params.column_step = to_int(shape.stride_w);
  params.source = args.input, params.source_strides = args.input_strides;
  params.scale = args.scale, params.bias = args.bias, params.wide_bias = args.wide_bias;
  params.bias_image = args.bias_of_image ? problem.outputs : 0;
  params.activation = args.activation;
  params.target = args.output, params.target_strides = args.output_strides;
  params.statistics = args.statistics, params.statistics_length = to_int(problem.outputs);
  return gather;
}

}  // namespace
}  // namespace dilated

void dilated_forward(const DilatedForwardArgs& args, cudaStream_t stream) {
  using namespace dilated;
  const Gather gather = forward_gather(args);
  const std::vector<PlaneRectangle> rectangles = rectangles_of(gather.planes);
  plan_gather</*TURNED=*/false>(gather, rectangles).launch(gather, rectangles, stream);
}

int64_t dilated_statistics_rows(const DilatedForwardArgs& args) {
  using namespace dilated;
  const Gather gather = forward_gather(args);
  const std::vector<PlaneRectangle> rectangles = rectangles_of(gather.planes);
  const int tile_rows = plan_gather</*TURNED=*/false>(gather, rectangles).tile_rows;
  std::vector<int64_t> tiles(gather.planes.size());
  for (const PlaneRectangle& rectangle : rectangles) {
    tiles[rectangle.plane - gather.planes.data()] +=
        ceil_div(rectangle.pixels(gather.params.images), tile_rows);
  }
  return *std::max_element(tiles.begin(), tiles.end());
}

}  // namespace fastseg
