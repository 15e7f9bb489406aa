// What the torch side of every convolution operator shares: shape checks, the output's memory
// format, and the names of activations. Included by <family>_cpu.cpp and <family>_cuda.cpp only;
// kernels never see a torch header.
#pragma once

#include <ATen/ATen.h>

#include <string_view>

#include "csrc/common/conv_shape.h"

namespace fastseg {

inline Activation parse_activation(std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "hardswish") return Activation::kHardswish;
  if (name == "silu") return Activation::kSilu;
  TORCH_CHECK(
      false,
      "fastseg: expected activation to be one of none, relu, relu6, hardswish, silu, but got '",
      std::string(name), "'");
}

inline int64_t conv_output_size(int64_t size, int64_t pad_before, int64_t pad_after,
                                int64_t dilation, int64_t kernel, int64_t stride) {
  return (size + pad_before + pad_after - dilation * (kernel - 1) - 1) / stride + 1;
}

// input [N, C, H, W], weight [K, C / groups, R, S]; stride and dilation hold (h, w), padding
// (top, bottom, left, right). The Python side has normalised the arguments and raised PyTorch's own
// errors; these checks stand between a direct operator call and memory.
inline ConvShape conv_shape(const at::Tensor& input, const at::Tensor& weight,
                            at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation) {
  TORCH_CHECK(input.dim() == 4 && weight.dim() == 4,
              "fastseg: expected 4-D input and weight, but got ", input.dim(), "-D and ",
              weight.dim(), "-D");
  TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
              "fastseg: expected 2 strides, 4 paddings and 2 dilations, but got ", stride.size(),
              ", ", padding.size(), " and ", dilation.size());
  TORCH_CHECK(
      stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0 && padding[0] >= 0 &&
          padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
      "fastseg: expected positive stride and dilation and non-negative padding, but got stride ",
      stride, ", dilation ", dilation, ", padding ", padding);
  TORCH_CHECK(input.scalar_type() == weight.scalar_type() && input.device() == weight.device(),
              "fastseg: expected input and weight of one dtype and device, but got ",
              input.scalar_type(), " on ", input.device(), " and ", weight.scalar_type(), " on ",
              weight.device());
  const int64_t P = conv_output_size(input.size(2), padding[0], padding[1], dilation[0],
                                     weight.size(2), stride[0]);
  const int64_t Q = conv_output_size(input.size(3), padding[2], padding[3], dilation[1],
                                     weight.size(3), stride[1]);
  TORCH_CHECK(input.size(2) + padding[0] + padding[1] >= dilation[0] * (weight.size(2) - 1) + 1 &&
                  input.size(3) + padding[2] + padding[3] >= dilation[1] * (weight.size(3) - 1) + 1,
              "Calculated padded input size per channel: (",
              input.size(2) + padding[0] + padding[1], " x ",
              input.size(3) + padding[2] + padding[3], "). Kernel size: (",
              dilation[0] * (weight.size(2) - 1) + 1, " x ", dilation[1] * (weight.size(3) - 1) + 1,
              "). Kernel size can't be greater than actual input size");
  return ConvShape{input.size(0),
                   input.size(1),
                   input.size(2),
                   input.size(3),
                   weight.size(0),
                   P,
                   Q,
                   weight.size(2),
                   weight.size(3),
                   stride[0],
                   stride[1],
                   padding[0],
                   padding[2],
                   dilation[0],
                   dilation[1]};
}

// torch.nn.functional.conv2d's rule: channels_last when input or weight suggests it, but never
// float64 on a GPU.
inline at::MemoryFormat conv_memory_format(const at::Tensor& input, const at::Tensor& weight) {
  if (input.is_cuda() && input.scalar_type() == at::kDouble) return at::MemoryFormat::Contiguous;
  const bool channels_last = input.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                             weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// A size-1 dimension may claim any stride, and an empty tensor has no address: kernels get 0.
inline int64_t stride_of(const at::Tensor& tensor, int64_t dim) {
  return tensor.size(dim) > 1 && tensor.numel() > 0 ? tensor.stride(dim) : 0;
}

inline Strides4 strides_of(const at::Tensor& tensor) {
  return {stride_of(tensor, 0), stride_of(tensor, 1), stride_of(tensor, 2), stride_of(tensor, 3)};
}

// The tensor itself if its channels (channels-last) or columns lie side by side: slices of either
// format do. Anything else is copied.
inline at::Tensor with_neighbours(const at::Tensor& tensor, at::MemoryFormat format) {
  const int64_t dim = format == at::MemoryFormat::ChannelsLast ? 1 : 3;
  const bool neighbours = tensor.size(dim) <= 1 || tensor.stride(dim) == 1;
  return neighbours ? tensor : tensor.contiguous(format);
}

// The gradients of a convolution; those that nobody asked for are undefined.
struct Gradients {
  at::Tensor input, weight, bias;
};

// Checks grad_output [N, K, P, Q], and allocates what is asked for.
inline Gradients empty_gradients(const ConvShape& shape, const at::Tensor& grad_output,
                                 const at::Tensor& input, const at::Tensor& weight,
                                 bool wants_input, bool wants_weight, bool wants_bias) {
  const int64_t sizes[] = {shape.N, shape.K, shape.P, shape.Q};
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(sizes) &&
                  grad_output.scalar_type() == input.scalar_type() &&
                  grad_output.device() == input.device(),
              "fastseg: expected grad_output of size ", at::IntArrayRef(sizes), ", ",
              input.scalar_type(), " on ", input.device(), ", but got ", grad_output.sizes(), ", ",
              grad_output.scalar_type(), " on ", grad_output.device());
  Gradients found;
  if (wants_input) {
    found.input =
        at::empty(input.sizes(), input.options().memory_format(conv_memory_format(input, weight)));
  }
  if (wants_weight) found.weight = at::empty_like(weight);
  if (wants_bias) found.bias = at::empty({shape.K}, weight.options());
  return found;
}

}  // namespace fastseg
