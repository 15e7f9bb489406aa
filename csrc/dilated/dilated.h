// Dense convolution (groups == 1) at any dilation on a GPU, as its callers see it: plain structs
// and five functions, free of torch headers. See dilated.cuh for how it is computed.
#pragma once

#include <cstdint>

#include "csrc/common/conv_shape.h"
#include "csrc/common/dtype_switch.h"
#include "csrc/common/launch.cuh"

namespace fastseg {

// What tests ask for in place of what the plan would choose; zeros leave the choice to the plan.
struct DilatedChoice {
  int tile_rows, tile_columns;
  int splits;  // of grad_weight's sums
};

// What kernels count in 32 bits: images, rows, columns, channels. Elements are counted in 64.
constexpr int64_t kMaxCount = int64_t{1} << 30;

struct DilatedProblem {
  ConvShape shape;  // every number in it is below kMaxCount
  DataType dtype;
  bool tf32;            // whether float32 may be multiplied as TF32
  int multiprocessors;  // of the device that runs it; results depend on it in the last bits only
  int shared_bytes;     // that a block may have there
  DilatedChoice forced;
};

// output[n, k, p, q] = activation(scale[k] * sum + bias[k]), where sum is over (c, r, s) of
// input[n, c, h, w] * weight[k, c, r, s]
struct DilatedForwardArgs {
  DilatedProblem problem;
  Activation activation;
  const void* input;  // [N, C, H, W], channels side by side
  Strides4 input_strides;
  const void* weight;  // [K, C, R, S], channels side by side
  Strides4 weight_strides;
  const void* scale;  // [K] in the accumulator's dtype, or nullptr
  const void* bias;   // [K] or nullptr
  bool wide_bias;     // bias is in the accumulator's dtype, not in `dtype`
  void* output;       // [N, K, P, Q]
  Strides4 output_strides;
};

struct DilatedGradInputArgs {
  DilatedProblem problem;
  const void* grad_output;  // [N, K, P, Q], channels side by side
  Strides4 grad_output_strides;
  const void* weight;  // [K, C, R, S], channels side by side
  Strides4 weight_strides;
  void* grad_input;  // [N, C, H, W]
  Strides4 grad_input_strides;
};

struct DilatedGradWeightArgs {
  DilatedProblem problem;
  const void* grad_output;  // [N, K, P, Q], channels side by side
  Strides4 grad_output_strides;
  const void* input;  // [N, C, H, W], channels side by side
  Strides4 input_strides;
  void* grad_weight;  // [K, C, R, S]
  Strides4 grad_weight_strides;
  void* workspace;  // dilated_grad_weight_workspace_bytes() bytes, aligned to 16
};

// No tensor of theirs may be empty.
void dilated_forward(const DilatedForwardArgs& args, cudaStream_t stream);
void dilated_grad_input(const DilatedGradInputArgs& args, cudaStream_t stream);

// Looks at everything in `args` but `workspace`.
int64_t dilated_grad_weight_workspace_bytes(const DilatedGradWeightArgs& args);
void dilated_grad_weight(const DilatedGradWeightArgs& args, cudaStream_t stream);

}  // namespace fastseg
