// Depthwise convolution for everything that has no walk: other filter sizes, unequal or larger
// strides, channel multipliers in backward, and sizes beyond 32-bit counts. Right first: one thread
// an output element, neighbours in memory side by side, all arithmetic in 64 bits, each tap loaded
// anew (from L1 mostly).
//
//   forward       y[n, k, p, q]  gathers x over the taps (r, s)
//   grad_input    gx[n, c, h, w] gathers gy over the multiplier and the taps that divide:
//                                p = (h + pad - r*dilation) / stride without remainder
//   grad_weight   gw[k, r, s]    one block a tap and slab of channels, which adds up pairs of all
//                                output pixels (of its share of them); grad_bias is one tap more,
//                                whose input is 1
#pragma once

#include "csrc/common/activation.cuh"
#include "csrc/common/index.cuh"
#include "csrc/common/reduce.cuh"
#include "csrc/common/vector.cuh"
#include "csrc/depthwise/depthwise.h"

namespace fastseg {
namespace depthwise {

constexpr int kGenericThreads = 128;

// ---- Index arithmetic ----

struct Position {
  int64_t n, c, h, w;
};

// Element `i` of a [N, C, H, W] tensor, numbered as it lies in memory.
__device__ __forceinline__ Position position(int64_t i, int64_t C, int64_t H, int64_t W,
                                             bool channels_last) {
  Position at;
  if (channels_last) {
    at.c = i % C, i /= C;
    at.w = i % W, i /= W;
    at.h = i % H, at.n = i / H;
  } else {
    at.w = i % W, i /= W;
    at.h = i % H, i /= H;
    at.c = i % C, at.n = i / C;
  }
  return at;
}

__device__ __forceinline__ int64_t offset(const Strides4& strides, int64_t n, int64_t c, int64_t h,
                                          int64_t w) {
  return n * strides.n + c * strides.c + h * strides.h + w * strides.w;
}

__device__ __forceinline__ int64_t offset(const FilterStrides& strides, int64_t k, int64_t r,
                                          int64_t s) {
  return k * strides.k + r * strides.r + s * strides.s;
}

// The input row or column that output `p` reads through `tap`; its inverse is output_of.
__device__ __forceinline__ int64_t input_of(int64_t p, int64_t tap, int64_t stride, int64_t pad,
                                            int64_t dilation) {
  return p * stride - pad + tap * dilation;
}

// The output that reads input `h` through `tap`, or -1.
__device__ __forceinline__ int64_t output_of(int64_t h, int64_t tap, int64_t stride, int64_t pad,
                                             int64_t dilation) {
  const int64_t distance = h + pad - tap * dilation;
  return distance >= 0 && distance % stride == 0 ? distance / stride : -1;
}

// ---- Forward ----

template <typename T>
__global__ void __launch_bounds__(kGenericThreads)
    depthwise_forward_generic(const __grid_constant__ DepthwiseForwardArgs args) {
  using Acc = Accumulator<T>;
  const ConvShape& shape = args.problem.shape;
  const T* const input = static_cast<const T*>(args.input);
  const T* const weight = static_cast<const T*>(args.weight);
  const int64_t multiplier = shape.K / shape.C;
  const int64_t outputs = shape.N * shape.K * shape.P * shape.Q;

  for (int64_t i = block_id_x() * kGenericThreads + thread_id_x(); i < outputs;
       i += grid_size_x() * kGenericThreads) {
    const Position at = position(i, shape.K, shape.P, shape.Q, args.problem.channels_last);
    Acc acc[1][1] = {};
    if (args.bias != nullptr) acc[0][0] = widen(static_cast<const T*>(args.bias)[at.c]);
    for (int64_t r = 0; r < shape.R; ++r) {
      const int64_t h = input_of(at.h, r, shape.stride_h, shape.pad_top, shape.dilation_h);
      if (h < 0 || h >= shape.H) continue;
      for (int64_t s = 0; s < shape.S; ++s) {
        const int64_t w = input_of(at.w, s, shape.stride_w, shape.pad_left, shape.dilation_w);
        if (w < 0 || w >= shape.W) continue;
        const Acc x = widen(input[offset(args.input_strides, at.n, at.c / multiplier, h, w)]);
        acc[0][0] =
            multiply_add(x, widen(weight[offset(args.weight_strides, at.c, r, s)]), acc[0][0]);
      }
    }
    activate(args.activation, acc);
    static_cast<T*>(args.output)[offset(args.output_strides, at.n, at.c, at.h, at.w)] =
        narrow<T>(acc[0][0]);
  }
}

// ---- Backward ----

template <typename T>
__global__ void __launch_bounds__(kGenericThreads)
    depthwise_grad_input_generic(const __grid_constant__ DepthwiseBackwardArgs args) {
  using Acc = Accumulator<T>;
  const ConvShape& shape = args.problem.shape;
  const T* const grad_output = static_cast<const T*>(args.grad_output);
  const T* const weight = static_cast<const T*>(args.weight);
  const int64_t multiplier = shape.K / shape.C;
  const int64_t inputs = shape.N * shape.C * shape.H * shape.W;

  for (int64_t i = block_id_x() * kGenericThreads + thread_id_x(); i < inputs;
       i += grid_size_x() * kGenericThreads) {
    const Position at = position(i, shape.C, shape.H, shape.W, args.problem.channels_last);
    Acc acc = Acc(0);
    for (int64_t r = shape.R - 1; r >= 0; --r) {  // as forward adds with the filter turned around
      const int64_t p = output_of(at.h, r, shape.stride_h, shape.pad_top, shape.dilation_h);
      if (p < 0 || p >= shape.P) continue;
      for (int64_t s = shape.S - 1; s >= 0; --s) {
        const int64_t q = output_of(at.w, s, shape.stride_w, shape.pad_left, shape.dilation_w);
        if (q < 0 || q >= shape.Q) continue;
        for (int64_t k = at.c * multiplier; k < (at.c + 1) * multiplier; ++k) {
          const Acc grad_y = widen(grad_output[offset(args.grad_output_strides, at.n, k, p, q)]);
          acc = multiply_add(grad_y, widen(weight[offset(args.weight_strides, k, r, s)]), acc);
        }
      }
    }
    static_cast<T*>(args.grad_input)[offset(args.grad_input_strides, at.n, at.c, at.h, at.w)] =
        narrow<T>(acc);
  }
}

// Blocks of `groups` x `lanes` threads: lanes take neighbouring channels, groups take output
// pixels.
struct GenericSums {
  int lanes, groups;
  int64_t slabs, workers;       // workers share the pixels of one slab of channels
  int64_t first_tap, last_tap;  // R * S is the bias
};

template <typename T>
__global__ void __launch_bounds__(kGenericThreads)
    depthwise_grad_weight_generic(const __grid_constant__ DepthwiseBackwardArgs args,
                                  const __grid_constant__ GenericSums plan) {
  using Acc = Accumulator<T>;
  FASTSEG_DYNAMIC_SHARED(shared);
  const ConvShape& shape = args.problem.shape;
  const T* const grad_output = static_cast<const T*>(args.grad_output);
  const T* const input = static_cast<const T*>(args.input);
  const int group = thread_id_x() / plan.lanes, lane = thread_id_x() - group * plan.lanes;
  const int64_t multiplier = shape.K / shape.C;
  const int64_t pixels = shape.N * shape.P * shape.Q;
  const int64_t taps = plan.last_tap - plan.first_tap;

  for (int64_t block = block_id_x(); block < plan.slabs * plan.workers * taps;
       block += grid_size_x()) {
    const int64_t slab = block % plan.slabs, worker = block / plan.slabs % plan.workers;
    const int64_t tap = plan.first_tap + block / plan.slabs / plan.workers;
    const bool is_bias = tap == shape.R * shape.S;
    const int64_t r = tap / shape.S, s = tap % shape.S;
    const int64_t k = slab * plan.lanes + lane;

    Acc acc[1] = {Acc(0)};
    for (int64_t i = worker * plan.groups + group; i < pixels && k < shape.K;
         i += plan.workers * plan.groups) {
      const int64_t q = i % shape.Q, p = i / shape.Q % shape.P, n = i / shape.Q / shape.P;
      Acc x = Acc(1);
      if (!is_bias) {
        const int64_t h = input_of(p, r, shape.stride_h, shape.pad_top, shape.dilation_h);
        const int64_t w = input_of(q, s, shape.stride_w, shape.pad_left, shape.dilation_w);
        if (h < 0 || h >= shape.H || w < 0 || w >= shape.W) continue;
        x = widen(input[offset(args.input_strides, n, k / multiplier, h, w)]);
      }
      const Acc grad_y = widen(grad_output[offset(args.grad_output_strides, n, k, p, q)]);
      acc[0] = multiply_add(grad_y, x, acc[0]);
    }
    block_sum(acc, reinterpret_cast<Acc*>(shared), group, plan.groups, lane, plan.lanes);
    if (group == 0 && k < shape.K) {
      static_cast<Acc*>(args.workspace)[(worker * (shape.R * shape.S + 1) + tap) * shape.K + k] =
          acc[0];
    }
  }
}

}  // namespace depthwise
}  // namespace fastseg
