// The operators fastseg::separable_conv2d.cuda and fastseg::separable_aspp_branches.cuda: checks,
// allocation, launch. The schemas are defined in fastseg/ops/separable/op.py and
// fastseg/ops/separable_aspp/op.py.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <torch/library.h>

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "csrc/common/torch_conv.h"
#include "csrc/common/torch_device.h"
#include "csrc/separable/separable.h"

namespace fastseg {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Tests set FASTSEG_FORCE_TILE=128x64 to reach every variant of the kernel.
DilatedChoice forced_tile() {
  DilatedChoice choice{};
  if (const char* tile = std::getenv("FASTSEG_FORCE_TILE")) {
    TORCH_CHECK(std::sscanf(tile, "%dx%d", &choice.tile_rows, &choice.tile_columns) == 2,
                "fastseg: expected FASTSEG_FORCE_TILE to be like 128x64, but got ", tile);
  }
  return choice;
}

at::ScalarType wide_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A scale is in the accumulator's dtype, a bias in that or in its input's.
void check_vector(const char* name, const OptionalTensor& vector, int64_t size,
                  const at::Tensor& input, bool is_scale) {
  if (!vector.has_value()) return;
  const at::ScalarType wide = wide_type(input), narrow = is_scale ? wide : input.scalar_type();
  const std::string others = narrow == wide ? "" : std::string(" or ") + c10::toString(narrow);
  TORCH_CHECK(vector->dim() == 1 && vector->size(0) == size &&
                  (vector->scalar_type() == narrow || vector->scalar_type() == wide) &&
                  vector->device() == input.device(),
              "fastseg: expected ", name, " of size [", size, "], ", wide, others, " on ",
              input.device(), ", but got ", vector->sizes(), ", ", vector->scalar_type(), " on ",
              vector->device());
}

void check_pointwise(const at::Tensor& weight, int64_t channels, const at::Tensor& input) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == channels &&
                  weight.size(2) == 1 && weight.size(3) == 1 &&
                  weight.scalar_type() == input.scalar_type() && weight.device() == input.device(),
              "fastseg: expected a pointwise weight [K, ", channels, ", 1, 1], ",
              input.scalar_type(), " on ", input.device(), ", but got ", weight.sizes(), ", ",
              weight.scalar_type(), " on ", weight.device());
}

void check_counts(const ConvShape& shape) {
  for (const int64_t count : {shape.N, shape.C, shape.H, shape.W, shape.K, shape.P, shape.Q}) {
    TORCH_CHECK(count < kMaxCount, "fastseg: expected less than ", kMaxCount,
                " images, channels, rows and columns, but got ", count);
  }
}

at::Tensor contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->contiguous() : at::Tensor();
}

const void* data_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

// Of the accumulator's dtype, which is `tensor`'s own where it is that of its input.
bool is_wide(const at::Tensor& tensor, const at::Tensor& input) {
  return tensor.defined() && tensor.scalar_type() == wide_type(input);
}

// What all branches share; `x` has its channels side by side.
SeparableArgs separable_args(const at::Tensor& x, const ConvShape& shape,
                             const DeviceScope& device) {
  SeparableArgs args{};
  args.dtype = data_type(x);
  args.tf32 =
      x.scalar_type() == at::kFloat && at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
  args.multiprocessors = device.multiprocessors();
  args.shared_bytes = device.shared_bytes_per_block();
  args.forced = forced_tile();
  args.N = shape.N, args.C = shape.C, args.H = shape.H, args.W = shape.W;
  args.multiplier = shape.multiplier();
  args.P = shape.P, args.Q = shape.Q;
  args.stride_h = shape.stride_h, args.stride_w = shape.stride_w;
  args.input = x.const_data_ptr(), args.input_strides = strides_of(x);
  return args;
}

void set_depthwise(SeparableBranch* branch, const at::Tensor& weight, const ConvShape& shape) {
  branch->depthwise_weight = weight.const_data_ptr();
  branch->R = shape.R, branch->S = shape.S;
  branch->pad_top = shape.pad_top, branch->pad_left = shape.pad_left;
  branch->dilation_h = shape.dilation_h, branch->dilation_w = shape.dilation_w;
}

void set_pointwise(SeparableBranch* branch, const at::Tensor& weight, int64_t first_channel) {
  branch->weight = weight.const_data_ptr(), branch->weight_strides = strides_of(weight);
  branch->K = weight.size(0), branch->first_channel = first_channel;
}

// The vectors of the outputs, and the output itself.
void set_output(SeparableArgs* args, const at::Tensor& scale, const at::Tensor& bias,
                const at::Tensor& output, Activation activation) {
  args->output_channels = output.size(1);
  args->scale = data_of(scale), args->bias = data_of(bias);
  args->wide_bias = is_wide(bias, output);
  args->activation = activation;
  args->output = output.mutable_data_ptr(), args->output_strides = strides_of(output);
}

ConvShape depthwise_shape(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
                          at::IntArrayRef padding, at::IntArrayRef dilation) {
  const ConvShape shape = conv_shape(input, weight, stride, padding, dilation);
  TORCH_CHECK(weight.size(1) == 1 && shape.C > 0 && shape.K > 0 && shape.K % shape.C == 0 &&
                  shape.R > 0 && shape.S > 0,
              "fastseg: expected a depthwise weight [", shape.C, " * m, 1, R, S] for an input of ",
              shape.C, " channels, but got ", weight.sizes());
  check_counts(shape);
  return shape;
}

at::Tensor separable_conv2d(const at::Tensor& input,               // [N, C, H, W]
                            const at::Tensor& depthwise_weight,    // [C * m, 1, R, S]
                            const at::Tensor& pointwise_weight,    // [K, C * m, 1, 1]
                            const OptionalTensor& depthwise_bias,  // [C * m]
                            const OptionalTensor& bias,            // [K]
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, std::string_view depthwise_activation,
                            std::string_view activation,
                            const OptionalTensor& depthwise_scale,  // [C * m]
                            const OptionalTensor& scale) {          // [K]
  const ConvShape shape = depthwise_shape(input, depthwise_weight, stride, padding, dilation);
  check_pointwise(pointwise_weight, shape.K, input);
  const int64_t outputs = pointwise_weight.size(0);
  check_vector("depthwise_bias", depthwise_bias, shape.K, input, false);
  check_vector("depthwise_scale", depthwise_scale, shape.K, input, true);
  check_vector("bias", bias, outputs, input, false);
  check_vector("scale", scale, outputs, input, true);
  const Activation parsed_depthwise_activation = parse_activation(depthwise_activation);
  const Activation parsed_activation = parse_activation(activation);

  const DeviceScope device(input);

  const at::MemoryFormat format = conv_memory_format(input, depthwise_weight);
  const at::Tensor output =
      at::empty({shape.N, outputs, shape.P, shape.Q}, input.options().memory_format(format));

  if (output.numel() == 0) return output;

  const at::Tensor x = with_neighbours(input, at::MemoryFormat::ChannelsLast);
  const at::Tensor w = with_neighbours(pointwise_weight, at::MemoryFormat::ChannelsLast);
  const at::Tensor first_bias = contiguous(depthwise_bias), second_bias = contiguous(bias);
  const at::Tensor first_scale = contiguous(depthwise_scale), second_scale = contiguous(scale);
  const at::Tensor filter = depthwise_weight.contiguous();
  SeparableBranch branch{};
  set_depthwise(&branch, filter, shape);
  branch.depthwise_scale = data_of(first_scale), branch.depthwise_bias = data_of(first_bias);
  set_pointwise(&branch, w, 0);
  SeparableArgs args = separable_args(x, shape, device);
  args.branches = &branch, args.branch_count = 1;
  args.depthwise_activation = parsed_depthwise_activation;
  args.wide_depthwise_bias = is_wide(first_bias, input);
  set_output(&args, second_scale, second_bias, output, parsed_activation);
  separable_forward(args, device.stream());
  return output;
}

// The shape that all branches share: that of a 1x1 convolution without padding.
ConvShape branches_shape(const at::Tensor& input, at::TensorList depthwise_weights,
                         at::TensorList weights, at::IntArrayRef dilations) {
  TORCH_CHECK(
      !weights.empty() && depthwise_weights.size() <= weights.size() &&
          dilations.size() == depthwise_weights.size(),
      "fastseg: expected a dilation for each depthwise weight, and no more of these than of "
      "pointwise weights, but got ",
      dilations.size(), " dilations, ", depthwise_weights.size(), " depthwise weights and ",
      weights.size(), " pointwise weights");
  TORCH_CHECK(input.dim() == 4 && input.size(1) > 0,
              "fastseg: expected an input [N, C, H, W], but got ", input.sizes());
  const int64_t channels = input.size(1);
  for (const at::Tensor& weight : weights) check_pointwise(weight, channels, input);
  for (size_t b = 0; b < depthwise_weights.size(); ++b) {
    const at::Tensor& weight = depthwise_weights[b];
    TORCH_CHECK(weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == 1 &&
                    weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1 &&
                    weight.scalar_type() == input.scalar_type() &&
                    weight.device() == input.device() && dilations[b] > 0,
                "fastseg: expected a depthwise weight [", channels, ", 1, R, S] with odd R and S, ",
                input.scalar_type(), " on ", input.device(), ", and a positive dilation, but got ",
                weight.sizes(), ", ", weight.scalar_type(), " on ", weight.device(), ", and ",
                dilations[b]);
  }
  const int64_t H = input.size(2), W = input.size(3);
  const ConvShape shape{input.size(0), channels, H, W, channels, H, W, 1, 1, 1, 1, 0, 0, 1, 1};
  check_counts(shape);
  return shape;
}

std::tuple<at::Tensor, at::Tensor> separable_aspp_branches(
    const at::Tensor& input,               // [N, C, H, W]
    at::TensorList depthwise_weights,      // B of [C, 1, R, S]
    at::TensorList weights,                // plain ones first, then B, of [K_b, C, 1, 1]
    const OptionalTensor& depthwise_bias,  // [B * C]
    const OptionalTensor& bias,            // [sum of K_b]
    at::IntArrayRef dilations, std::string_view depthwise_activation, std::string_view activation,
    bool statistics,
    const OptionalTensor& depthwise_scale,  // [B * C]
    const OptionalTensor& scale) {          // [sum of K_b]
  const ConvShape shape = branches_shape(input, depthwise_weights, weights, dilations);
  const int64_t filter_channels = static_cast<int64_t>(depthwise_weights.size()) * shape.C;
  int64_t outputs = 0;
  for (const at::Tensor& weight : weights) outputs += weight.size(0);
  check_vector("depthwise_bias", depthwise_bias, filter_channels, input, false);
  check_vector("depthwise_scale", depthwise_scale, filter_channels, input, true);
  check_vector("bias", bias, outputs, input, false);
  check_vector("scale", scale, outputs, input, true);
  const Activation parsed_depthwise_activation = parse_activation(depthwise_activation);
  const Activation parsed_activation = parse_activation(activation);

  const DeviceScope device(input);

  const at::MemoryFormat format = conv_memory_format(input, weights[0]);
  const at::Tensor output =
      at::empty({shape.N, outputs, shape.P, shape.Q}, input.options().memory_format(format));
  const at::TensorOptions sum_options = input.options().dtype(at::kDouble);

  if (output.numel() == 0) {
    return {output,
            statistics ? at::zeros({2, outputs}, sum_options) : at::empty({0}, sum_options)};
  }

  const at::Tensor x = with_neighbours(input, at::MemoryFormat::ChannelsLast);
  const at::Tensor first_bias = contiguous(depthwise_bias), second_bias = contiguous(bias);
  const at::Tensor first_scale = contiguous(depthwise_scale), second_scale = contiguous(scale);
  const size_t plain = weights.size() - depthwise_weights.size();
  std::vector<at::Tensor> products, filters;  // keep copies alive until they are launched
  std::vector<SeparableBranch> branches(weights.size());
  int64_t first_channel = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    products.push_back(with_neighbours(weights[i], at::MemoryFormat::ChannelsLast));
    set_pointwise(&branches[i], products.back(), first_channel);
    first_channel += weights[i].size(0);
    if (i < plain) continue;
    const size_t b = i - plain;
    filters.push_back(depthwise_weights[b].contiguous());
    const at::Tensor& weight = filters.back();
    ConvShape own = shape;
    own.R = weight.size(2), own.S = weight.size(3);
    own.dilation_h = own.dilation_w = dilations[b];
    own.pad_top = own.R / 2 * dilations[b], own.pad_left = own.S / 2 * dilations[b];
    set_depthwise(&branches[i], weight, own);
    const int64_t first_filter = static_cast<int64_t>(b) * shape.C;
    const auto vector_of = [&](const at::Tensor& joined) -> const void* {
      if (!joined.defined()) return nullptr;
      return static_cast<const char*>(joined.const_data_ptr()) +
             first_filter * static_cast<int64_t>(joined.element_size());
    };
    branches[i].depthwise_scale = vector_of(first_scale);
    branches[i].depthwise_bias = vector_of(first_bias);
  }
  SeparableArgs args = separable_args(x, shape, device);
  args.branches = branches.data(), args.branch_count = static_cast<int64_t>(branches.size());
  args.depthwise_activation = parsed_depthwise_activation;
  args.wide_depthwise_bias = is_wide(first_bias, input);
  set_output(&args, second_scale, second_bias, output, parsed_activation);
  at::Tensor partial;
  if (statistics) {
    partial =
        at::empty({separable_tiles(args), 2, outputs}, input.options().dtype(wide_type(input)));
    args.statistics = partial.mutable_data_ptr();
  }
  separable_forward(args, device.stream());
  if (!statistics) return {output, at::empty({0}, sum_options)};
  const int64_t over_tiles[] = {0};
  return {output, at::sum(partial, over_tiles, /*keepdim=*/false, at::kDouble)};
}

TORCH_LIBRARY_IMPL(fastseg, FASTSEG_DEVICE_KEY, m) {
  m.impl("separable_conv2d.cuda", separable_conv2d);
  m.impl("separable_aspp_branches.cuda", separable_aspp_branches);
}

}  // namespace
}  // namespace fastseg
