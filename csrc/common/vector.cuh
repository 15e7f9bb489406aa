// Vectors of neighbouring elements: moved between memory and registers in one access of up to 16
// bytes, widened to the accumulator's type for arithmetic, rounded once on the way back.
//
// A pack stays in the 32-bit registers it was loaded into until it is widened. As an array of
// 16-bit elements it would be taken apart right behind the load, and a load whose result is touched
// at once is no prefetch.
//
// Conversions are written as intrinsics, so that kernels also compile where the implicit ones are
// switched off (__CUDA_NO_HALF_CONVERSIONS__ and its like).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/common/dtype_switch.h"
#include "csrc/common/launch.cuh"

namespace fastseg {

// VEC elements as they lie in memory.
template <typename T, int VEC>
struct Pack {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * VEC;
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16, "one access a pack");

  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;
  uint32_t words[kWords];
};

// Global memory that the kernel does not write; `source` is aligned to the whole pack.
template <typename T, int VEC>
__device__ __forceinline__ Pack<T, VEC> load_pack(const T* source) {
  Pack<T, VEC> pack;
  if constexpr (Pack<T, VEC>::kBytes == 2) {
    pack.words[0] = __ldg(reinterpret_cast<const unsigned short*>(source));
  } else if constexpr (Pack<T, VEC>::kBytes == 4) {
    pack.words[0] = __ldg(reinterpret_cast<const uint32_t*>(source));
  } else if constexpr (Pack<T, VEC>::kBytes == 8) {
    const uint2 value = __ldg(reinterpret_cast<const uint2*>(source));
    pack.words[0] = value.x, pack.words[1] = value.y;
  } else {
    const uint4 value = __ldg(reinterpret_cast<const uint4*>(source));
    pack.words[0] = value.x, pack.words[1] = value.y;
    pack.words[2] = value.z, pack.words[3] = value.w;
  }
  return pack;
}

template <typename T, int VEC>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, VEC>& pack) {
  if constexpr (Pack<T, VEC>::kBytes == 2) {
    *reinterpret_cast<unsigned short*>(target) = static_cast<unsigned short>(pack.words[0]);
  } else if constexpr (Pack<T, VEC>::kBytes == 4) {
    *reinterpret_cast<uint32_t*>(target) = pack.words[0];
  } else if constexpr (Pack<T, VEC>::kBytes == 8) {
    *reinterpret_cast<uint2*>(target) = make_uint2(pack.words[0], pack.words[1]);
  } else {
    *reinterpret_cast<uint4*>(target) =
        make_uint4(pack.words[0], pack.words[1], pack.words[2], pack.words[3]);
  }
}

// ---- One element ----

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// a * b + c, rounded once. Spelled out, so that a kernel's bits do not depend on what a compiler
// makes of `+` and `*`.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

// ---- Packs ----

template <typename T, int VEC>
__device__ __forceinline__ void widen(const Pack<T, VEC>& pack, Accumulator<T> (&values)[VEC]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    // A bfloat16 is the upper half of a float.
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const uint32_t word = pack.words[v / 2];
      values[v] = __uint_as_float(v % 2 == 0 ? word << 16 : word & 0xffff0000u);
    }
  } else if constexpr (std::is_same_v<T, __half>) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const uint32_t word = pack.words[v / 2];
      values[v] = __half2float(
          __ushort_as_half(static_cast<unsigned short>(v % 2 == 0 ? word : word >> 16)));
    }
  } else {
    memcpy(&values, &pack.words, sizeof(values));
  }
}

template <typename T, int VEC>
__device__ __forceinline__ Pack<T, VEC> narrow(const Accumulator<T> (&values)[VEC]) {
  Pack<T, VEC> pack;
  if constexpr (sizeof(T) == 2) {
    T rounded[VEC];
#pragma unroll
    for (int v = 0; v < VEC; ++v) rounded[v] = narrow<T>(values[v]);
    if constexpr (VEC == 1) {
      unsigned short bits;
      memcpy(&bits, &rounded, sizeof(bits));
      pack.words[0] = bits;
    } else {
      memcpy(&pack.words, &rounded, sizeof(rounded));
    }
  } else {
    memcpy(&pack.words, &values, sizeof(values));
  }
  return pack;
}

}  // namespace fastseg
