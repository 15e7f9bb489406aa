// Winograd's convolution on the CPU, for dense 3x3 filters of stride 1 in float: see
// winograd_cpu_plan.h.
#pragma once

#include <ATen/ATen.h>

#include "csrc/common/conv_shape.h"
#include "csrc/dilated/dilated_cpu.h"
#include "csrc/dilated/winograd_cpu_plan.h"

namespace fastseg {
namespace winograd {

// grad_input of `shape`, which has stride 1, as a convolution of grad_y with the filter turned
// around.
ConvShape turned(const ConvShape& shape);

// The convolution of x [N, C, H, W] into y [N, K, P, Q], channels adjacent in both; `shape` is
// turned() if the weight, any strides, is still that of forward. False where a result is not
// finite: sums and differences spread infinities and NaN further than the convolution does, and y
// is to be computed in another way.
bool convolve_into(const ConvShape& shape, const Forms& forms, const at::Tensor& weight,
                   bool is_turned, const at::Tensor& x, const dilated_cpu::Epilogue& epilogue,
                   const at::Tensor& y);

// grad_weight [K, C, 3, 3] of x and grad_y, channels adjacent in both; undefined where it is not
// finite.
at::Tensor grad_weight(const ConvShape& shape, const Forms& forms, const at::Tensor& grad_y,
                       const at::Tensor& x);

}  // namespace winograd
}  // namespace fastseg
