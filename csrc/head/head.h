// The segmentation head on a GPU, as its callers see it: plain structs and functions, free of torch
// headers. See head_resize.cuh, head_pixels.cuh and head_gradient.cuh for how it is computed.
#pragma once

#include <cstdint>

#include "csrc/common/conv_shape.h"
#include "csrc/common/dtype_switch.h"
#include "csrc/common/launch.cuh"
#include "csrc/head/sampling.h"

namespace fastseg {

// H x W pixels, the inputs of both axes, are resized to P x Q. All are positive and fit an int, as
// C does; N may be 0.
struct HeadProblem {
  int64_t N, C;
  SampleAxis rows, columns;
  DataType dtype;       // of the low-resolution tensor
  bool channels_last;   // neighbouring threads take neighbouring channels, else columns
  int multiprocessors;  // of the device that runs it; resizes and gradients do not depend on it
  bool force_index64;   // take the path for huge sizes whatever the sizes are (tests)

  int64_t H() const { return rows.inputs; }
  int64_t W() const { return columns.inputs; }
  int64_t P() const { return rows.outputs; }
  int64_t Q() const { return columns.outputs; }
};

// Distances in elements between neighbours of a [N, P, Q] tensor.
struct Strides3 {
  int64_t n, h, w;
};

struct ResizeForwardArgs {
  HeadProblem problem;
  const void* input;  // [N, C, H, W]
  Strides4 input_strides;
  void* output;  // [N, C, P, Q], contiguous or channels-last as `problem` says
};

struct ResizeBackwardArgs {
  HeadProblem problem;
  const void* grad_output;  // [N, C, P, Q]
  Strides4 grad_output_strides;
  void* grad_input;  // [N, C, H, W]
  Strides4 grad_input_strides;
};

struct ArgmaxArgs {
  HeadProblem problem;
  const void* logits;  // [N, C, H, W]
  Strides4 logits_strides;
  void* labels;      // [N, P, Q] contiguous
  bool byte_labels;  // uint8, else int64
};

// A target, and what it counts. Acc is the accumulator of `problem.dtype`.
struct LossTarget {
  const int64_t* target;  // [N, P, Q]
  Strides3 target_strides;
  const void* weight;  // [C] in `problem.dtype`, or nullptr for ones
  int64_t ignore_index;
  double label_smoothing;
};

enum class LossReduction : int32_t { kNone = 0, kMean = 1, kSum = 2 };

struct CrossEntropyArgs {
  HeadProblem problem;
  LossTarget target;
  LossReduction reduction;
  const void* logits;  // [N, C, H, W]
  Strides4 logits_strides;
  void* lse;           // [N, P, Q] Acc, log of the sum of exponentials; or nullptr
  void* losses;        // [N, P, Q] Acc for kNone, else nullptr
  void* loss;          // one Acc; or nullptr for kNone
  void* total_weight;  // one Acc
  int64_t* offender;   // a target that is no class, or ignore_index
  void* workspace;     // cross_entropy_workspace_bytes() bytes, aligned to 16
};

struct CrossEntropyBackwardArgs {
  HeadProblem problem;
  LossTarget target;
  const void* logits;  // [N, C, H, W]
  Strides4 logits_strides;
  const void* lse;          // [N, P, Q] Acc, as cross_entropy_forward() wrote it
  const void* grad_losses;  // [N, P, Q] Acc, or nullptr for ones
  Strides3 grad_losses_strides;
  void* gradient;  // [N, C, H, W] Acc
  Strides4 gradient_strides;
  void* workspace;  // kWeightSumBytes bytes, aligned to 16
};

constexpr int64_t kWeightSumBytes = 16;

void resize_forward(const ResizeForwardArgs& args, cudaStream_t stream);
void resize_backward(const ResizeBackwardArgs& args, cudaStream_t stream);
void head_argmax(const ArgmaxArgs& args, cudaStream_t stream);

// Looks at `problem` only.
int64_t cross_entropy_workspace_bytes(const CrossEntropyArgs& args);
void cross_entropy_forward(const CrossEntropyArgs& args, cudaStream_t stream);
void cross_entropy_backward(const CrossEntropyBackwardArgs& args, cudaStream_t stream);

}  // namespace fastseg
