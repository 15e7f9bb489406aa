// Activations, applied to accumulators before they are rounded to the output's dtype. A NaN stays a
// NaN in each of them, as in PyTorch: every comparison is written so that NaN takes the other way.
#pragma once

#include <cmath>

#include "csrc/common/conv_shape.h"
#include "csrc/common/launch.cuh"

namespace fastseg {

template <typename Acc>
__device__ __forceinline__ Acc clamp_to_6(Acc z) {
  return z < Acc(0) ? Acc(0) : z > Acc(6) ? Acc(6) : z;
}

// The approximations are good to a few units in the last place of a float; where they underflow,
// the exact result is below 1e-36.
__device__ __forceinline__ float silu(float z) { return z * __fdividef(1.0f, 1.0f + __expf(-z)); }
__device__ __forceinline__ double silu(double z) { return z / (1.0 + std::exp(-z)); }

template <typename Acc, int COUNT, int VEC>
__device__ __forceinline__ void activate(Activation activation, Acc (&values)[COUNT][VEC]) {
  const auto apply = [&](auto function) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) values[i][v] = function(values[i][v]);
    }
  };
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      apply([](Acc z) { return z < Acc(0) ? Acc(0) : z; });
      break;
    case Activation::kRelu6:
      apply([](Acc z) { return clamp_to_6(z); });
      break;
    case Activation::kHardswish:
      apply([](Acc z) { return z * clamp_to_6(z + Acc(3)) * (Acc(1) / Acc(6)); });
      break;
    case Activation::kSilu:
      apply([](Acc z) { return silu(z); });
      break;
  }
}

}  // namespace fastseg
