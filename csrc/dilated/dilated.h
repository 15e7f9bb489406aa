// Dense convolutions (groups == 1) of one image at any dilations on a GPU, as their callers see
// them: plain structs and a few functions, free of torch headers. See dilated.cuh for how they are
// computed.
#pragma once

#include <cstdint>
#include <vector>

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

// Branches whose products one kernel can add up: those of a sum, or of a common grad_input.
constexpr int64_t kMaxSummedBranches = 12;

// One of several convolutions that read the same image.
struct DilatedBranch {
  ConvShape shape;     // every number in it is below kMaxCount
  const void* weight;  // [K, C, R, S], channels side by side; grad_weight does without
  Strides4 weight_strides;
  int64_t first_output;  // its first channel of the output; 0 in all branches of a sum
};

// The output is [N, outputs, P, Q]. The branches' outputs lie in it side by side, or are summed.
// All branches have the same N, C, H, W, P and Q; a single convolution is one branch, and where
// there are more their strides are 1.
struct DilatedProblem {
  std::vector<DilatedBranch> branches;
  int64_t outputs;
  bool summed;
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
  const void* scale;   // [outputs] in the accumulator's dtype, or nullptr
  const void* bias;    // [outputs] or [N, outputs], dense, or nullptr
  bool wide_bias;      // bias is in the accumulator's dtype, not in `dtype`
  bool bias_of_image;  // it is [N, outputs]
  void* output;        // [N, outputs, P, Q]
  Strides4 output_strides;
  // [dilated_statistics_rows(), 2, outputs] zeros in the accumulator's dtype, or nullptr: summed
  // over the rows, it becomes the sum and the sum of squares of output before the activation.
  void* statistics;
};

struct DilatedGradInputArgs {
  DilatedProblem problem;
  const void* grad_output;  // [N, outputs, P, Q], channels side by side
  Strides4 grad_output_strides;
  void* grad_input;  // [N, C, H, W]
  Strides4 grad_input_strides;
};

struct DilatedGradWeightArgs {
  struct Gradient {
    void* data;  // [K, C, R, S]
    Strides4 strides;
  };

  DilatedProblem problem;
  const void* grad_output;  // [N, outputs, P, Q], channels side by side
  Strides4 grad_output_strides;
  const void* input;  // [N, C, H, W], channels side by side
  Strides4 input_strides;
  std::vector<Gradient> grad_weights;  // of each branch
  void* workspace;                     // dilated_grad_weight_workspace_bytes() bytes, aligned to 16
};

// No tensor of theirs may be empty.
void dilated_forward(const DilatedForwardArgs& args, cudaStream_t stream);
void dilated_grad_input(const DilatedGradInputArgs& args, cudaStream_t stream);

// Looks at everything in `args` but `statistics`.
int64_t dilated_statistics_rows(const DilatedForwardArgs& args);

// Looks at everything in `args` but `workspace`.
int64_t dilated_grad_weight_workspace_bytes(const DilatedGradWeightArgs& args);
void dilated_grad_weight(const DilatedGradWeightArgs& args, cudaStream_t stream);

}  // namespace fastseg
