// The operators fastseg::dilated_conv2d.cuda and fastseg::dilated_conv2d_backward.cuda: checks,
// allocation, launch. The schemas are defined in fastseg/ops/dilated/op.py.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <torch/library.h>

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <tuple>

#include "csrc/common/torch_conv.h"
#include "csrc/common/torch_device.h"
#include "csrc/dilated/dilated.h"

namespace fastseg {
namespace {

ConvShape dilated_shape(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation) {
  const ConvShape shape = conv_shape(input, weight, stride, padding, dilation);
  TORCH_CHECK(weight.size(1) == shape.C && shape.C > 0 && shape.R > 0 && shape.S > 0,
              "fastseg: expected a dense weight [K, ", shape.C, ", R, S] for an input of ", shape.C,
              " channels, but got ", weight.sizes());
  for (const int64_t count : {shape.N, shape.H, shape.W, shape.P, shape.Q}) {
    TORCH_CHECK(count < kMaxCount, "fastseg: expected less than ", kMaxCount,
                " images, rows and columns, but got ", count);
  }
  return shape;
}

// Tests set FASTSEG_FORCE_TILE=128x64 and FASTSEG_FORCE_SPLITS=3 to reach every variant of a
// kernel.
DilatedChoice forced_choice() {
  DilatedChoice choice{};
  if (const char* tile = std::getenv("FASTSEG_FORCE_TILE")) {
    TORCH_CHECK(std::sscanf(tile, "%dx%d", &choice.tile_rows, &choice.tile_columns) == 2,
                "fastseg: expected FASTSEG_FORCE_TILE to be like 128x64, but got ", tile);
  }
  if (const char* splits = std::getenv("FASTSEG_FORCE_SPLITS")) choice.splits = std::atoi(splits);
  return choice;
}

DilatedProblem dilated_problem(const ConvShape& shape, const at::Tensor& input,
                               const DeviceScope& device) {
  const bool tf32 =
      input.scalar_type() == at::kFloat && at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
  return {shape,
          data_type(input),
          tf32,
          device.multiprocessors(),
          device.shared_bytes_per_block(),
          forced_choice()};
}

at::Tensor dilated_conv2d(const at::Tensor& input,                // [N, C, H, W]
                          const at::Tensor& weight,               // [K, C, R, S]
                          const std::optional<at::Tensor>& bias,  // [K]
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                          std::string_view activation,
                          const std::optional<at::Tensor>& scale) {  // [K]
  const ConvShape shape = dilated_shape(input, weight, stride, padding, dilation);
  const at::ScalarType wide = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (bias.has_value()) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.K &&
                    (bias->scalar_type() == weight.scalar_type() || bias->scalar_type() == wide) &&
                    bias->device() == weight.device(),
                "fastseg: expected bias of size [", shape.K, "], ", weight.scalar_type(), " or ",
                wide, " on ", weight.device(), ", but got ", bias->sizes(), ", ",
                bias->scalar_type(), " on ", bias->device());
  }
  if (scale.has_value()) {
    TORCH_CHECK(scale->dim() == 1 && scale->size(0) == shape.K && scale->scalar_type() == wide &&
                    scale->device() == weight.device(),
                "fastseg: expected scale of size [", shape.K, "], ", wide, " on ", weight.device(),
                ", but got ", scale->sizes(), ", ", scale->scalar_type(), " on ", scale->device());
  }
  const Activation parsed_activation = parse_activation(activation);

  const DeviceScope device(input);

  const at::MemoryFormat format = conv_memory_format(input, weight);
  const at::Tensor output =
      at::empty({shape.N, shape.K, shape.P, shape.Q}, input.options().memory_format(format));

  if (output.numel() == 0) return output;

  const at::Tensor x = with_neighbours(input, at::MemoryFormat::ChannelsLast);
  const at::Tensor w = with_neighbours(weight, at::MemoryFormat::ChannelsLast);
  const at::Tensor b = bias.has_value() ? bias->contiguous() : at::Tensor();
  const at::Tensor a = scale.has_value() ? scale->contiguous() : at::Tensor();
  DilatedForwardArgs args{};
  args.problem = dilated_problem(shape, input, device);
  args.activation = parsed_activation;
  args.input = x.const_data_ptr(), args.input_strides = strides_of(x);
  args.weight = w.const_data_ptr(), args.weight_strides = strides_of(w);
  args.scale = a.defined() ? a.const_data_ptr() : nullptr;
  args.bias = b.defined() ? b.const_data_ptr() : nullptr;
  args.wide_bias = b.defined() && b.scalar_type() == wide;
  args.output = output.mutable_data_ptr(), args.output_strides = strides_of(output);
  dilated_forward(args, device.stream());
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

  const DilatedProblem problem = dilated_problem(shape, input, device);
  at::Tensor grad_y;
  if (grad_input.defined() || grad_weight.defined()) {
    grad_y = with_neighbours(grad_output, at::MemoryFormat::ChannelsLast);
  }
  if (grad_input.defined()) {
    const at::Tensor w = with_neighbours(weight, at::MemoryFormat::ChannelsLast);
    DilatedGradInputArgs args{};
    args.problem = problem;
    args.grad_output = grad_y.const_data_ptr(), args.grad_output_strides = strides_of(grad_y);
    args.weight = w.const_data_ptr(), args.weight_strides = strides_of(w);
    args.grad_input = grad_input.mutable_data_ptr();
    args.grad_input_strides = strides_of(grad_input);
    dilated_grad_input(args, device.stream());
  }
  if (grad_weight.defined()) {
    const at::Tensor x = with_neighbours(input, at::MemoryFormat::ChannelsLast);
    DilatedGradWeightArgs args{};
    args.problem = problem;
    args.grad_output = grad_y.const_data_ptr(), args.grad_output_strides = strides_of(grad_y);
    args.input = x.const_data_ptr(), args.input_strides = strides_of(x);
    args.grad_weight = grad_weight.mutable_data_ptr();
    args.grad_weight_strides = strides_of(grad_weight);
    const at::Tensor workspace =
        at::empty({dilated_grad_weight_workspace_bytes(args)}, input.options().dtype(at::kByte));
    args.workspace = workspace.mutable_data_ptr();
    dilated_grad_weight(args, device.stream());
  }
  if (grad_bias.defined()) at::sum_out(grad_bias, grad_output, {0, 2, 3});
  return {grad_input, grad_weight, grad_bias};
}

TORCH_LIBRARY_IMPL(fastseg, FASTSEG_DEVICE_KEY, m) {
  m.impl("dilated_conv2d.cuda", dilated_conv2d);
  m.impl("dilated_conv2d_backward.cuda", dilated_conv2d_backward);
}

}  // namespace
}  // namespace fastseg
