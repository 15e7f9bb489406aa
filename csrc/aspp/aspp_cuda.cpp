// The operators fastseg::aspp_branches.cuda and fastseg::aspp_branches_backward.cuda: checks,
// allocation, launch. Parallel convolutions of one image are computed by the kernels of one,
// csrc/dilated; the schemas are defined in fastseg/ops/aspp/op.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "csrc/dilated/dilated_torch.h"

namespace fastseg {
namespace {

// "concat" or "sum".
bool is_sum(std::string_view reduction) {
  TORCH_CHECK(reduction == "concat" || reduction == "sum",
              "fastseg: expected reduction to be concat or sum, but got '", std::string(reduction),
              "'");
  return reduction == "sum";
}

// Each branch by itself: stride 1, and as much padding as keeps the image's size.
std::vector<ConvShape> branch_shapes(const at::Tensor& input, at::TensorList weights,
                                     at::IntArrayRef dilations, bool summed) {
  TORCH_CHECK(!weights.empty() && weights.size() == dilations.size(),
              "fastseg: expected one dilation for each of one or more weights, but got ",
              weights.size(), " weights and ", dilations.size(), " dilations");
  std::vector<ConvShape> shapes;
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor& weight = weights[i];
    const int64_t d = dilations[i];
    TORCH_CHECK(weight.dim() == 4 && weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1,
                "fastseg: expected weights [K, C, R, S] with odd R and S, but got ",
                weight.sizes());
    const int64_t rows = d * (weight.size(2) / 2), columns = d * (weight.size(3) / 2);
    shapes.push_back(dilated_shape(input, weight, {1, 1}, {rows, rows, columns, columns}, {d, d}));
    TORCH_CHECK(!summed || shapes[i].K == shapes[0].K,
                "fastseg: expected branches of one width in a sum, but got ", shapes[0].K, " and ",
                shapes[i].K, " output channels");
  }
  return shapes;
}

int64_t output_channels(const std::vector<ConvShape>& shapes, bool summed) {
  int64_t channels = 0;
  for (const ConvShape& shape : shapes) channels = summed ? shape.K : channels + shape.K;
  return channels;
}

// The output [N, K, H, W], K being all of the branches' channels or those of one, and with
// `statistics` the sums and the sums of squares [2, K] of its values before the activation.
std::tuple<at::Tensor, at::Tensor> aspp_branches(const at::Tensor& input,  // [N, C, H, W]
                                                 at::TensorList weights,   // [K_b, C, R, S] each
                                                 const std::optional<at::Tensor>& bias,  // [K]
                                                 at::IntArrayRef dilations,
                                                 std::string_view activation,
                                                 std::string_view reduction, bool statistics,
                                                 const std::optional<at::Tensor>& scale) {  // [K]
  const bool summed = is_sum(reduction);
  const std::vector<ConvShape> shapes = branch_shapes(input, weights, dilations, summed);
  const int64_t channels = output_channels(shapes, summed);
  check_bias(bias, input, channels, /*of_images=*/false);
  check_scale(scale, input, channels);
  const Activation parsed_activation = parse_activation(activation);

  const DeviceScope device(input);

  const at::Tensor output =
      at::empty({shapes[0].N, channels, shapes[0].P, shapes[0].Q},
                input.options().memory_format(conv_memory_format(input, weights[0])));

  const auto wide = input.options().dtype(at::kDouble);
  if (output.numel() == 0) {
    return {output, statistics ? at::zeros({2, channels}, wide) : at::empty({0}, wide)};
  }

  const at::Tensor sums =
      run_dilated_forward(dilated_problem(shapes, summed, input, device), input, weights, bias,
                          scale, parsed_activation, statistics, output, device);
  return {output, statistics ? sums : at::empty({0}, wide)};
}

// The gradients of the input, without elements where it is not needed, and of the weights, none
// where they are not.
std::tuple<at::Tensor, std::vector<at::Tensor>> aspp_branches_backward(
    const at::Tensor& grad_output,  // [N, K, H, W]
    const at::Tensor& input,        // [N, C, H, W]
    at::TensorList weights,         // [K_b, C, R, S] each
    at::IntArrayRef dilations, std::string_view reduction, bool needs_input, bool needs_weights) {
  const bool summed = is_sum(reduction);
  const std::vector<ConvShape> shapes = branch_shapes(input, weights, dilations, summed);
  ConvShape joined = shapes[0];
  joined.K = output_channels(shapes, summed);

  const DeviceScope device(input);

  const at::Tensor grad_input =
      empty_gradients(joined, grad_output, input, weights[0], needs_input, false, false).input;
  std::vector<at::Tensor> grad_weights;
  if (needs_weights) {
    for (const at::Tensor& weight : weights) grad_weights.push_back(at::empty_like(weight));
  }

  if (grad_output.numel() == 0 || input.numel() == 0) {
    if (needs_input) grad_input.zero_();
    for (const at::Tensor& gradient : grad_weights) gradient.zero_();
  } else {
    run_dilated_backward(dilated_problem(shapes, summed, input, device), grad_output, input,
                         weights, grad_input, grad_weights, device);
  }
  return {needs_input ? grad_input : at::empty({0}, input.options()), grad_weights};
}

TORCH_LIBRARY_IMPL(fastseg, FASTSEG_DEVICE_KEY, m) {
  m.impl("aspp_branches.cuda", aspp_branches);
  m.impl("aspp_branches_backward.cuda", aspp_branches_backward);
}

}  // namespace
}  // namespace fastseg
