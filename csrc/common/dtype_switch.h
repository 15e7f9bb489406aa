// The element types kernels are compiled for, and the switch from a run-time dtype to one of them.
// Free of torch headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastseg {

enum class DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

constexpr int64_t size_of(DataType dtype) {
  return dtype == DataType::kFloat64 ? 8 : dtype == DataType::kFloat32 ? 4 : 2;
}

// What products of T are summed in.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

}  // namespace fastseg

// Runs the body with the type that `dtype` stands for:
//
//   FASTSEG_DTYPE_SWITCH(args.dtype, T, { launch(some_kernel<T>, ...); });
//
// A `return` inside the body leaves the body only.
#define FASTSEG_DTYPE_CASE(value, type, T, ...) \
  case ::fastseg::DataType::value: {            \
    using T = type;                             \
    __VA_ARGS__                                 \
    break;                                      \
  }
#define FASTSEG_DTYPE_SWITCH(dtype, T, ...)                        \
  [&] {                                                            \
    switch (dtype) {                                               \
      FASTSEG_DTYPE_CASE(kFloat32, float, T, __VA_ARGS__)          \
      FASTSEG_DTYPE_CASE(kFloat16, __half, T, __VA_ARGS__)         \
      FASTSEG_DTYPE_CASE(kBFloat16, __nv_bfloat16, T, __VA_ARGS__) \
      FASTSEG_DTYPE_CASE(kFloat64, double, T, __VA_ARGS__)         \
    }                                                              \
  }()
