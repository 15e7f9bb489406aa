// Depthwise-separable convolutions of one image on a GPU, as their callers see them: plain structs
// and two functions, free of torch headers. See separable.cuh for how they are computed.
#pragma once

#include <cstdint>

#include "csrc/common/conv_shape.h"
#include "csrc/common/dtype_switch.h"
#include "csrc/common/launch.cuh"
#include "csrc/dilated/dilated.h"

namespace fastseg {

// One convolution: a depthwise filter and the matrix product behind it, or that product alone.
struct SeparableBranch {
  // [C * m, 1, R, S], contiguous; or nullptr: z is x, and nothing else of the filter counts.
  const void* depthwise_weight;
  int64_t R, S;
  int64_t pad_top, pad_left;
  int64_t dilation_h, dilation_w;
  const void* depthwise_scale;  // [C * m] in the accumulator's dtype, or nullptr
  const void* depthwise_bias;   // [C * m] or nullptr

  const void* weight;  // [K, C * m, 1, 1], channels side by side
  Strides4 weight_strides;
  int64_t K;
  int64_t first_channel;  // of the output
};

// All branches have the same image, strides and size of output:
//
//   z[n, c, p, q] = depthwise_activation(depthwise_scale[c] * sum + depthwise_bias[c]), where sum
//                   is over (r, s) of input[n, c / m, h, w] * depthwise_weight[c, r, s], rounded
//   t = scale[first_channel + k] * sum over c of weight[k, c] * z[n, c, p, q] + bias[likewise]
//   output[n, first_channel + k, p, q] = activation(t)
struct SeparableArgs {
  DataType dtype;
  bool tf32;             // whether the product may multiply float32 as TF32
  int multiprocessors;   // of the device that runs it; results depend on it in the last bits only
  int shared_bytes;      // that a block may have there
  DilatedChoice forced;  // the tile that tests ask for

  // Every size is below kMaxCount.
  int64_t N, C, H, W;
  int64_t multiplier;
  int64_t P, Q;
  int64_t stride_h, stride_w;
  const void* input;  // [N, C, H, W], channels side by side
  Strides4 input_strides;

  const SeparableBranch* branches;
  int64_t branch_count;
  Activation depthwise_activation;
  bool wide_depthwise_bias;  // depthwise biases are in the accumulator's dtype, not in `dtype`

  int64_t output_channels;  // of all branches
  const void* scale;        // [output_channels] in the accumulator's dtype, or nullptr
  const void* bias;         // [output_channels] or nullptr
  bool wide_bias;
  Activation activation;
  void* output;  // [N, output_channels, P, Q]
  Strides4 output_strides;

  // Sums and sums of squares of t over the pixels of one tile: [separable_tiles(), 2,
  // output_channels] in the accumulator's dtype, or nullptr if nobody asks for them.
  void* statistics;
};

// In how many tiles the pixels of all images are cut. Looks at everything in `args` but `output`
// and `statistics`.
int64_t separable_tiles(const SeparableArgs& args);

// No tensor may be empty.
void separable_forward(const SeparableArgs& args, cudaStream_t stream);

}  // namespace fastseg
