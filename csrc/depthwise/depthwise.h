// Depthwise convolution on a GPU, as its callers see it: plain structs and four functions, free of
// torch headers. See depthwise.cuh for how it is computed.
#pragma once

#include <cstdint>

#include "csrc/common/conv_shape.h"
#include "csrc/common/dtype_switch.h"
#include "csrc/common/launch.cuh"

namespace fastseg {

// Distances in elements between neighbours of a weight [K, 1, R, S].
struct FilterStrides {
  int64_t k, r, s;
};

// What forward and backward both need to know. With `channels_last`, neighbouring threads take
// neighbouring channels, else neighbouring columns: any strides are computed correctly, the ones
// that match are read in full cache lines.
struct DepthwiseProblem {
  ConvShape shape;
  DataType dtype;
  bool channels_last;
  int multiprocessors;  // of the device that runs it; results depend on it in the last bits only
  bool force_index64;   // take the path for huge sizes whatever the sizes are (tests)
};

// output[n, k, p, q] = activation(bias[k] + sum over (r, s) of input[n, k / m, h, w] * weight[k, r,
// s])
struct DepthwiseForwardArgs {
  DepthwiseProblem problem;
  Activation activation;
  const void* input;  // [N, C, H, W]
  Strides4 input_strides;
  const void* weight;  // [K, 1, R, S]
  FilterStrides weight_strides;
  const void* bias;  // [K] or nullptr
  void* output;      // [N, K, P, Q]
  Strides4 output_strides;
};

// A null gradient is not computed. N == 0 is legal here: weight and bias gradients become zero.
struct DepthwiseBackwardArgs {
  DepthwiseProblem problem;
  const void* grad_output;  // [N, K, P, Q]
  Strides4 grad_output_strides;
  const void* input;  // [N, C, H, W]
  Strides4 input_strides;
  const void* weight;  // [K, 1, R, S]
  FilterStrides weight_strides;
  void* grad_input;  // [N, C, H, W] or nullptr
  Strides4 grad_input_strides;
  void* grad_weight;  // [K, 1, R, S] or nullptr
  FilterStrides grad_weight_strides;
  void* grad_bias;  // [K] or nullptr
  void* workspace;  // depthwise_backward_workspace_bytes() bytes, aligned to 16
};

void depthwise_forward(const DepthwiseForwardArgs& args, cudaStream_t stream);

// Looks at everything in `args` but `workspace`.
int64_t depthwise_backward_workspace_bytes(const DepthwiseBackwardArgs& args);
void depthwise_backward(const DepthwiseBackwardArgs& args, cudaStream_t stream);

}  // namespace fastseg
