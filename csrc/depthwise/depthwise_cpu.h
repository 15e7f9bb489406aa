// Depthwise convolution on the CPU as a building block of other families.
#pragma once

#include <ATen/ATen.h>

#include "csrc/common/conv_shape.h"
#include "csrc/depthwise/depthwise_cpu_plan.h"

namespace fastseg {
namespace depthwise_cpu {

Image image_of(const at::Tensor& tensor);    // [N, C, H, W]
Filter filter_of(const at::Tensor& tensor);  // [K, 1, R, S] or [K]

// The shape of a call; checks that weight [C * m, 1, R, S] fits input [N, C, H, W].
ConvShape checked_shape(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation);

// A call of the forward kernels but for its target: `neighbours` says whether the target's channels
// are adjacent. `vector_bytes`: of the instruction set. Keeps no reference to the tensors.
Call forward_call(const ConvShape& shape, const at::Tensor& input, const at::Tensor& weight,
                  const at::Tensor& bias, Activation activation, bool neighbours,
                  int64_t vector_bytes);

}  // namespace depthwise_cpu
}  // namespace fastseg
