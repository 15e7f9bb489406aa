// What the kernels of the segmentation head share: interpolation, fast exponentials, numbering of
// work, and what the target of a pixel counts.
#pragma once

#include <cmath>

#include "csrc/common/divider.h"
#include "csrc/common/index.cuh"
#include "csrc/common/launch.cuh"
#include "csrc/common/vector.cuh"
#include "csrc/head/head.h"

namespace fastseg {
namespace head {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads of the kernels that take one element a thread.
constexpr int kDirectThreads = 256;

// ---- Interpolation ----

// Both are multiplied, also where one counts nothing: 0 * NaN is NaN, as for ATen.
template <typename Acc>
__device__ __forceinline__ Acc interpolate(Acc first, Acc second, Acc share) {
  return multiply_add(second, share, first * (Acc(1) - share));
}

// The score of one pixel from its four neighbours in memory; rows first, then columns.
template <typename T, typename Acc = Accumulator<T>>
__device__ __forceinline__ Acc load_score(const T* plane, int64_t row_stride, int64_t column_stride,
                                          const Sample<Acc, int>& row,
                                          const Sample<Acc, int>& column) {
  const auto down = [&](int w) {
    const T* const source = plane + w * column_stride;
    return interpolate(widen(__ldg(source + row.first * row_stride)),
                       widen(__ldg(source + row.second * row_stride)), row.share);
  };
  return interpolate(down(column.first), down(column.second), column.share);
}

// What output `sample` of a resize gives to input `input`: gathering's weight.
template <typename Acc>
__device__ __forceinline__ Acc weight_of(const Sample<Acc, int>& sample, int input) {
  Acc weight = Acc(0);
  if (sample.first == input) weight += Acc(1) - sample.share;
  if (sample.second == input) weight += sample.share;
  return weight;
}

// ---- Exponentials ----

// e^x to about 2 units in the last place for x that matter; results below 2^-126 are zero.
__device__ __forceinline__ float exponential(float x) {
#ifdef FASTSEG_HOST
  return std::exp(x);
#else
  float y;  // without the detour that __expf takes to give denormal results
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
#endif
}
__device__ __forceinline__ double exponential(double x) { return std::exp(x); }

template <typename Acc>
__device__ __forceinline__ constexpr Acc minus_infinity() {
  return -static_cast<Acc>(INFINITY);
}

// ---- Numbers of work items ----

inline Divider divider(int64_t divisor) { return Divider(static_cast<int>(divisor)); }

// 32-bit where the host found that all counts fit, which makes a division one multiplication.
template <bool WIDE>
using Item = std::conditional_t<WIDE, int64_t, int>;

template <bool WIDE>
__device__ __forceinline__ Item<WIDE> quotient(const Divider& divider, Item<WIDE> item) {
  if constexpr (WIDE) {
    return item / divider.divisor;
  } else {
    return divider.quotient(item);
  }
}

// item -> item / divisor; returns the remainder.
template <bool WIDE>
__device__ __forceinline__ int split(const Divider& divider, Item<WIDE>& item) {
  const Item<WIDE> rest = quotient<WIDE>(divider, item);
  const int remainder = static_cast<int>(item - rest * divider.divisor);
  item = rest;
  return remainder;
}

// ---- Targets ----

// What the kernels know of the loss; `C` is the number of classes.
template <typename T>
struct LossTerms {
  using Acc = Accumulator<T>;

  const int64_t* target;  // [N, P, Q]
  Strides3 target_strides;
  const T* weight;  // [C] or nullptr
  int64_t ignore_index;
  int C;
  Acc smoothing;
  const Acc* weight_sum;  // of all classes, where it is needed; nullptr for C

  __device__ __forceinline__ Acc weight_of_class(int c) const {
    return weight == nullptr ? Acc(1) : widen(__ldg(weight + c));
  }
  __device__ __forceinline__ Acc weights_of_all() const {
    return weight_sum == nullptr ? static_cast<Acc>(C) : *weight_sum;
  }
};

// The target of one pixel: a class, or one of the two below.
constexpr int kIgnored = -1, kNoClass = -2;

struct Target {
  int64_t value;
  int label;
};

template <typename T>
__device__ __forceinline__ Target load_target(const LossTerms<T>& terms, int64_t n, int p, int q) {
  const Strides3& strides = terms.target_strides;
  const int64_t value = __ldg(terms.target + n * strides.n + p * strides.h + q * strides.w);
  int label = kNoClass;
  if (value >= 0 && value < terms.C) label = static_cast<int>(value);
  if (value == terms.ignore_index) label = kIgnored;
  return {value, label};
}

template <typename T>
LossTerms<T> loss_terms(const HeadProblem& problem, const LossTarget& target, const void* sum) {
  LossTerms<T> terms{};
  terms.target = target.target, terms.target_strides = target.target_strides;
  terms.weight = static_cast<const T*>(target.weight);
  terms.ignore_index = target.ignore_index;
  terms.C = static_cast<int>(problem.C);
  terms.smoothing = static_cast<Accumulator<T>>(target.label_smoothing);
  if (target.weight != nullptr) terms.weight_sum = static_cast<const Accumulator<T>*>(sum);
  return terms;
}

// Writes the sum of all class weights where smoothed targets need it; head_pixels.cu.
template <typename T>
void launch_weight_sum(const LossTarget& target, int64_t classes, void* sum, cudaStream_t stream);

}  // namespace head
}  // namespace fastseg
