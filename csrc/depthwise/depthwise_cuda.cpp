// The operators fastseg::depthwise_conv2d.cuda and fastseg::depthwise_conv2d_backward.cuda: checks,
// allocation, launch. The schemas are defined in fastseg/ops/depthwise/op.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "csrc/common/torch_conv.h"
#include "csrc/common/torch_device.h"
#include "csrc/depthwise/depthwise.h"

namespace fastseg {
namespace {

ConvShape depthwise_shape(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation) {
  const ConvShape shape = conv_shape(input, weight, stride, padding, dilation);
  TORCH_CHECK(
      weight.size(1) == 1 && shape.C > 0 && shape.K % shape.C == 0 && shape.R > 0 && shape.S > 0,
      "fastseg: expected a depthwise weight [C * multiplier, 1, R, S] for an input of ", shape.C,
      " channels, but got ", weight.sizes());
  return shape;
}

DepthwiseProblem depthwise_problem(const ConvShape& shape, const at::Tensor& input,
                                   at::MemoryFormat format, const DeviceScope& device) {
  return {shape, data_type(input), format == at::MemoryFormat::ChannelsLast,
          device.multiprocessors(), force_index64()};
}

FilterStrides filter_strides_of(const at::Tensor& weight) {
  return {stride_of(weight, 0), stride_of(weight, 2), stride_of(weight, 3)};
}

at::Tensor depthwise_conv2d(const at::Tensor& input,                // [N, C, H, W]
                            const at::Tensor& weight,               // [K, 1, R, S]
                            const std::optional<at::Tensor>& bias,  // [K]
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, std::string_view activation) {
  const ConvShape shape = depthwise_shape(input, weight, stride, padding, dilation);
  if (bias.has_value()) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.K &&
                    bias->scalar_type() == weight.scalar_type() &&
                    bias->device() == weight.device(),
                "fastseg: expected bias of size [", shape.K, "], ", weight.scalar_type(), " on ",
                weight.device(), ", but got ", bias->sizes(), ", ", bias->scalar_type(), " on ",
                bias->device());
  }
  const Activation parsed_activation = parse_activation(activation);

  const DeviceScope device(input);

  const at::MemoryFormat format = conv_memory_format(input, weight);
  const at::Tensor x = with_neighbours(input, format);
  const at::Tensor b = bias.has_value() ? bias->contiguous() : at::Tensor();
  const at::Tensor output =
      at::empty({shape.N, shape.K, shape.P, shape.Q}, input.options().memory_format(format));

  if (output.numel() == 0) return output;

  DepthwiseForwardArgs args{};
  args.problem = depthwise_problem(shape, input, format, device);
  args.activation = parsed_activation;
  args.input = x.const_data_ptr(), args.input_strides = strides_of(x);
  args.weight = weight.const_data_ptr(), args.weight_strides = filter_strides_of(weight);
  args.bias = b.defined() ? b.const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr(), args.output_strides = strides_of(output);
  depthwise_forward(args, device.stream());
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> depthwise_conv2d_backward(
    const at::Tensor& grad_output,  // [N, K, P, Q]
    const at::Tensor& input,        // [N, C, H, W]
    const at::Tensor& weight,       // [K, 1, R, S]
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    const c10::List<bool>& output_mask) {
  const ConvShape shape = depthwise_shape(input, weight, stride, padding, dilation);
  TORCH_CHECK(output_mask.size() == 3, "fastseg: expected an output_mask of 3 values, but got ",
              output_mask.size());

  const DeviceScope device(input);

  const at::MemoryFormat format = conv_memory_format(input, weight);
  auto [grad_input, grad_weight, grad_bias] = empty_gradients(
      shape, grad_output, input, weight, output_mask[0], output_mask[1], output_mask[2]);

  const bool wants_grad_input = grad_input.defined() && grad_input.numel() > 0;
  if (grad_output.numel() == 0) {
    for (const at::Tensor& gradient : {grad_input, grad_weight, grad_bias}) {
      if (gradient.defined()) gradient.zero_();
    }
    return {grad_input, grad_weight, grad_bias};
  }
  if (!wants_grad_input && !grad_weight.defined() && !grad_bias.defined()) {
    return {grad_input, grad_weight, grad_bias};
  }

  const at::Tensor x = with_neighbours(input, format);
  const at::Tensor grad_y = with_neighbours(grad_output, format);
  DepthwiseBackwardArgs args{};
  args.problem = depthwise_problem(shape, input, format, device);
  args.grad_output = grad_y.const_data_ptr(), args.grad_output_strides = strides_of(grad_y);
  args.input = x.const_data_ptr(), args.input_strides = strides_of(x);
  args.weight = weight.const_data_ptr(), args.weight_strides = filter_strides_of(weight);
  if (wants_grad_input) {
    args.grad_input = grad_input.mutable_data_ptr(),
    args.grad_input_strides = strides_of(grad_input);
  }
  if (grad_weight.defined()) {
    args.grad_weight = grad_weight.mutable_data_ptr();
    args.grad_weight_strides = filter_strides_of(grad_weight);
  }
  if (grad_bias.defined()) args.grad_bias = grad_bias.mutable_data_ptr();
  const at::Tensor workspace =
      at::empty({depthwise_backward_workspace_bytes(args)}, input.options().dtype(at::kByte));
  args.workspace = workspace.mutable_data_ptr();
  depthwise_backward(args, device.stream());
  return {grad_input, grad_weight, grad_bias};
}

TORCH_LIBRARY_IMPL(fastseg, FASTSEG_DEVICE_KEY, m) {
  m.impl("depthwise_conv2d.cuda", depthwise_conv2d);
  m.impl("depthwise_conv2d_backward.cuda", depthwise_conv2d_backward);
}

}  // namespace
}  // namespace fastseg
