// Dense convolution on the CPU as a building block of other families: the same kernels, writing
// into tensors that the caller owns. dilated_cpu.cpp does the work.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "csrc/common/conv_shape.h"

namespace fastseg {
namespace dilated_cpu {

// What becomes of a sum: activation(sum * scale + bias). Undefined tensors stand for ones and
// zeros, the others are [K] in the accumulation type.
struct Epilogue {
  at::Tensor scale, bias;
  Activation activation = Activation::kNone;
};

// One of several convolutions of the same image.
struct Branch {
  ConvShape shape;
  at::Tensor weight;  // [K, C, R, S]
};

// A [K] tensor in the accumulation type `type`, undefined without one. Checks its size.
at::Tensor per_channel(const std::optional<at::Tensor>& tensor, const char* name, int64_t K,
                       at::ScalarType type);

// `tensor` with its channels adjacent: itself, or a copy.
at::Tensor with_adjacent_channels(const at::Tensor& tensor);

// The convolution of x [N, C, H, W] into y [N, K, P, Q], both of any strides. With `adds` the sum
// starts from what y holds; y has to be channels_last and in the accumulation type then.
void forward_into(const Branch& branch, const at::Tensor& x, const Epilogue& epilogue, bool adds,
                  const at::Tensor& y);

// The sum of all branches, of one K, P and Q, into y as above, finished once.
void forward_sum_into(const std::vector<Branch>& branches, const at::Tensor& x,
                      const Epilogue& epilogue, const at::Tensor& y);

// grad_x [N, C, H, W] of one branch, or with `adds` its addition to what is there.
void grad_input_into(const Branch& branch, const at::Tensor& grad_y, bool adds,
                     const at::Tensor& grad_x);

// grad_weight [K, C, R, S] in the accumulation type.
at::Tensor grad_weight(const ConvShape& shape, const at::Tensor& grad_y, const at::Tensor& x);

}  // namespace dilated_cpu
}  // namespace fastseg
