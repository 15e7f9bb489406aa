// The operators fastseg::dilated_conv2d.cuda and fastseg::dilated_conv2d_backward.cuda: checks,
// allocation, launch. The schemas are defined in fastseg/ops/dilated/op.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "csrc/dilated/dilated_torch.h"

namespace fastseg {
namespace {

at::Tensor dilated_conv2d(const at::Tensor& input,                // [N, C, H, W]
                          const at::Tensor& weight,               // [K, C, R, S]
                          const std::optional<at::Tensor>& bias,  // [K] or [N, K]
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                          std::string_view activation,
                          const std::optional<at::Tensor>& scale) {  // [K]
  const ConvShape shape = dilated_shape(input, weight, stride, padding, dilation);
  check_bias(bias, input, shape.K, /*of_images=*/true);
  check_scale(scale, input, shape.K);
  const Activation parsed_activation = parse_activation(activation);

  const DeviceScope device(input);

  const at::MemoryFormat format = conv_memory_format(input, weight);
  const at::Tensor output =
      at::empty({shape.N, shape.K, shape.P, shape.Q}, input.options().memory_format(format));

  if (output.numel() == 0) return output;

  run_dilated_forward(dilated_problem(shape, /*summed=*/false, input, device), input, weight, bias,
                      scale, parsed_activation, /*statistics=*/false, output, device);
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dilated_conv2d_backward(
    const at::Tensor& grad_output,  // [N, K, P, Q]
    const at::Tensor& input,        // [N, C, H, W]
    const at::Tensor& weight,       // [K, C, R, S]
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    const c10::List<bool>& output_mask) {
  const ConvShape shape = dilated_shape(input, weight, stride, padding, dilation);
  TORCH_CHECK(output_mask.size() == 3, "fastseg: expected an output_mask of 3 values, but got ",
              output_mask.size());

  const DeviceScope device(input);

  auto [grad_input, grad_weight, grad_bias] = empty_gradients(
      shape, grad_output, input, weight, output_mask[0], output_mask[1], output_mask[2]);

  if (grad_output.numel() == 0 || input.numel() == 0) {
    for (const at::Tensor& gradient : {grad_input, grad_weight}) {
      if (gradient.defined()) gradient.zero_();
    }
    if (grad_bias.defined()) at::sum_out(grad_bias, grad_output, {0, 2, 3});
    return {grad_input, grad_weight, grad_bias};
  }

  run_dilated_backward(
      dilated_problem(shape, /*summed=*/false, input, device), grad_output, input, weight,
      grad_input, grad_weight.defined() ? at::TensorList(grad_weight) : at::TensorList(), device);
  if (grad_bias.defined()) at::sum_out(grad_bias, grad_output, {0, 2, 3});
  return {grad_input, grad_weight, grad_bias};
}

TORCH_LIBRARY_IMPL(fastseg, FASTSEG_DEVICE_KEY, m) {
  m.impl("dilated_conv2d.cuda", dilated_conv2d);
  m.impl("dilated_conv2d_backward.cuda", dilated_conv2d_backward);
}

}  // namespace
}  // namespace fastseg
