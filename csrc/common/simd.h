// SIMD for CPU kernels: one kernel source, compiled for three instruction sets in one translation
// unit, chosen at run time.
//
// The first part of this header is ordinary: capability() and the 16-bit storage types. The second
// part is compiled once per instruction set, into the namespace fastseg::FASTSEG_SIMD (avx512, avx2
// or plain), and holds the vector types, loads, stores and activations. A kernel header includes
// it; csrc/common/for_each_simd.h includes that once per instruction set.
//
// Between TARGET and END every function is compiled for that instruction set, so nothing shared
// with the rest of the program may be defined or first instantiated there: no torch headers, no
// standard library templates, no lambdas. Otherwise the linker could keep the AVX-512 copy of an
// inline function for everybody.
#ifndef FASTSEG_COMMON_SIMD_H_
#define FASTSEG_COMMON_SIMD_H_

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "csrc/common/conv_shape.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTSEG_SIMD_X86 1
#include <immintrin.h>
#else
#define FASTSEG_SIMD_X86 0
#endif

// clang-format off: a pragma is one string literal
#if defined(__clang__)
#define FASTSEG_TARGET_AVX512 _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c\"))), apply_to = function)")
#define FASTSEG_TARGET_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define FASTSEG_TARGET_END _Pragma("clang attribute pop")
#else
#define FASTSEG_TARGET_AVX512 \
  _Pragma("GCC push_options") \
  _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512\")")
#define FASTSEG_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define FASTSEG_TARGET_END _Pragma("GCC pop_options")
#endif
// clang-format on

#if defined(__clang__)
#define FASTSEG_UNROLL _Pragma("unroll")
#else
#define FASTSEG_UNROLL _Pragma("GCC unroll 32")
#endif
#define FASTSEG_INLINE inline __attribute__((always_inline))
#define FASTSEG_NOINLINE __attribute__((noinline))

// The compiler may assume nothing about this pointer's value. Without it GCC turns a walking
// pointer back into one address per step, and has no registers for them.
#define FASTSEG_OPAQUE(pointer) asm("" : "+r"(pointer))

namespace fastseg {

enum class Capability : int32_t { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set this machine has. FASTSEG_CPU_CAPABILITY=plain|avx2|avx512, read once,
// lowers it (for tests); it never raises it.
inline Capability capability() {
  static const Capability chosen = [] {
    Capability best = Capability::kPlain;
#if FASTSEG_SIMD_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      best = Capability::kAvx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        best = Capability::kAvx512;
      }
    }
#endif
    if (const char* asked = std::getenv("FASTSEG_CPU_CAPABILITY")) {
      Capability limit = best;
      if (std::strcmp(asked, "plain") == 0) limit = Capability::kPlain;
      if (std::strcmp(asked, "avx2") == 0) limit = Capability::kAvx2;
      if (limit < best) best = limit;
    }
    return best;
  }();
  return chosen;
}

// Returns of(namespace, bytes of a vector), a macro, for the best instruction set this machine has
// of those that csrc/common/for_each_simd.h compiles for.
#if FASTSEG_SIMD_X86
#define FASTSEG_RETURN_BEST(of)                                   \
  if (capability() == Capability::kAvx512) return of(avx512, 64); \
  if (capability() == Capability::kAvx2) return of(avx2, 32);     \
  return of(plain, 16)
#else
#define FASTSEG_RETURN_BEST(of) return of(plain, 16)
#endif

inline const char* cpu_capability() {
  switch (capability()) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "plain";
  }
}

// 16-bit storage types. Kernels compute in float; these only live in memory.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type a storage type is accumulated in.
template <class Storage>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }
inline float widen(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude < 0x0400u) {  // zero and subnormals: an integer multiple of 2^-24
    const float absolute = static_cast<float>(magnitude) * 0x1p-24f;
    return bits_to_float(sign | float_to_bits(absolute));
  }
  const uint32_t rebias = magnitude >= 0x7c00u ? 224u : 112u;  // infinity and NaN keep all ones
  return bits_to_float(sign | ((magnitude << 13) + (rebias << 23)));
}

// Rounding is to nearest even; NaN stays NaN.
inline void narrow(float value, float* out) { *out = value; }
inline void narrow(double value, double* out) { *out = value; }
inline void narrow(float value, BFloat16* out) {
  const uint32_t bits = float_to_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}
inline void narrow(float value, Half* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // below 2^-14 the grid is 2^-24, as it is for floats in [0.5, 1)
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace fastseg

#endif  // FASTSEG_COMMON_SIMD_H_

#if defined(FASTSEG_SIMD) && !defined(FASTSEG_SIMD_INCLUDED)
#define FASTSEG_SIMD_INCLUDED

namespace fastseg {
namespace FASTSEG_SIMD {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FASTSEG_SIMD_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int64_t kLanes = FASTSEG_SIMD_BYTES / sizeof(T);

template <class To, class From>
FASTSEG_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
FASTSEG_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

// Loads and stores need the alignment of one element only.
FASTSEG_INLINE Vector<float> load(const float* p) {
  Vector<float> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

FASTSEG_INLINE Vector<double> load(const double* p) {
  Vector<double> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FASTSEG_INLINE void store(float* p, Vector<float> v) { std::memcpy(p, &v, sizeof(v)); }
FASTSEG_INLINE void store(double* p, Vector<double> v) { std::memcpy(p, &v, sizeof(v)); }

#if FASTSEG_SIMD_BYTES == 64

FASTSEG_INLINE Vector<float> widen_bits(__m256i bits, BFloat16*) {
  return bit_cast<Vector<float>>(
      bit_cast<Vector<uint32_t>>(_mm512_maskz_cvtepu16_epi32(0xffff, bits)) << 16);
}
FASTSEG_INLINE Vector<float> widen_bits(__m256i bits, Half*) {
  return bit_cast<Vector<float>>(_mm512_maskz_cvtph_ps(0xffff, bits));
}
FASTSEG_INLINE __m256i narrow_bits(Vector<float> v, BFloat16*) {
  const Vector<uint32_t> bits = bit_cast<Vector<uint32_t>>(v), high = bits >> 16;
  const Vector<uint32_t> rounded = (bits + 0x7fffu + (high & 1u)) >> 16;
  const __m512 self = bit_cast<__m512>(v);
  const __m512i result =
      _mm512_mask_or_epi32(bit_cast<__m512i>(rounded), _mm512_cmp_ps_mask(self, self, _CMP_UNORD_Q),
                           bit_cast<__m512i>(high), _mm512_set1_epi32(0x40));
  return _mm512_maskz_cvtepi32_epi16(0xffff, result);
}
FASTSEG_INLINE __m256i narrow_bits(Vector<float> v, Half*) {
  return _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
}

template <class T, std::enable_if_t<sizeof(T) == 2, int> = 0>
FASTSEG_INLINE Vector<float> load(const T* p) {
  return widen_bits(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                    static_cast<T*>(nullptr));
}
template <class T, std::enable_if_t<sizeof(T) == 2, int> = 0>
FASTSEG_INLINE void store(T* p, Vector<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bits(v, p));
}

// The first `count` lanes; the others read as zero. Nothing past them is touched.
template <class T, std::enable_if_t<sizeof(T) == 2, int> = 0>
FASTSEG_INLINE Vector<float> load_first(const T* p, int64_t count) {
  return widen_bits(_mm256_maskz_loadu_epi16((1u << count) - 1, p), static_cast<T*>(nullptr));
}
template <class T, std::enable_if_t<sizeof(T) == 2, int> = 0>
FASTSEG_INLINE void store_first(T* p, Vector<float> v, int64_t count) {
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, narrow_bits(v, p));
}
FASTSEG_INLINE Vector<float> load_first(const float* p, int64_t count) {
  return bit_cast<Vector<float>>(_mm512_maskz_loadu_ps((1u << count) - 1, p));
}
FASTSEG_INLINE void store_first(float* p, Vector<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, (1u << count) - 1, bit_cast<__m512>(v));
}
FASTSEG_INLINE Vector<double> load_first(const double* p, int64_t count) {
  return bit_cast<Vector<double>>(_mm512_maskz_loadu_pd((1u << count) - 1, p));
}
FASTSEG_INLINE void store_first(double* p, Vector<double> v, int64_t count) {
  _mm512_mask_storeu_pd(p, (1u << count) - 1, bit_cast<__m512d>(v));
}

#else

#if FASTSEG_SIMD_BYTES == 32

FASTSEG_INLINE Vector<float> load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<Vector<float>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FASTSEG_INLINE Vector<float> load(const Half* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bit_cast<Vector<float>>(_mm256_cvtph_ps(bits));
}
FASTSEG_INLINE void store(BFloat16* p, Vector<float> v) {
  const __m256i bits = bit_cast<__m256i>(v);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet, bit_cast<__m256i>(v != v));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
FASTSEG_INLINE void store(Half* p, Vector<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}

#else

template <class T, std::enable_if_t<sizeof(T) == 2, int> = 0>
FASTSEG_INLINE Vector<float> load(const T* p) {
  Vector<float> v;
  for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
}
template <class T, std::enable_if_t<sizeof(T) == 2, int> = 0>
FASTSEG_INLINE void store(T* p, Vector<float> v) {
  for (int64_t i = 0; i < kLanes<float>; ++i) narrow(v[i], p + i);
}

#endif

// The first `count` lanes; the others read as zero. Nothing past them is touched.
template <class T>
FASTSEG_INLINE auto load_first(const T* p, int64_t count) {
  T full[kLanes<typename Accumulator<T>::type>] = {};
  for (int64_t i = 0; i < count; ++i) full[i] = p[i];
  return load(full);
}
template <class T>
FASTSEG_INLINE void store_first(T* p, Vector<typename Accumulator<T>::type> v, int64_t count) {
  T full[kLanes<typename Accumulator<T>::type>];
  store(full, v);
  for (int64_t i = 0; i < count; ++i) p[i] = full[i];
}

#endif

template <class T, size_t... I>
FASTSEG_INLINE Vector<T> zero_first_of(Vector<T> v, int64_t count, std::index_sequence<I...>) {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const Vector<Index> lane = {static_cast<Index>(I)...};
  return lane < static_cast<Index>(count) ? Vector<T>{} : v;
}

// The vector with zeros in its first `count` lanes.
template <class T>
FASTSEG_INLINE Vector<T> zero_first(Vector<T> v, int64_t count) {
  return zero_first_of<T>(v, count, std::make_index_sequence<kLanes<T>>());
}

// Rows and columns exchanged: lane j of rows[i] becomes lane i of rows[j].
template <class T, int64_t kHalf, size_t... I>
FASTSEG_INLINE void exchange_quarters(Vector<T>& a, Vector<T>& b, std::index_sequence<I...>) {
  constexpr int64_t n = sizeof...(I);
  const Vector<T> low = a, high = b;
#if defined(__clang__)
  a = __builtin_shufflevector(low, high, (I & kHalf ? n + I - kHalf : I)...);
  b = __builtin_shufflevector(low, high, (I & kHalf ? n + I : I + kHalf)...);
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  a = __builtin_shuffle(low, high, Vector<Index>{(I & kHalf ? n + I - kHalf : I)...});
  b = __builtin_shuffle(low, high, Vector<Index>{(I & kHalf ? n + I : I + kHalf)...});
#endif
}

template <class T, int64_t kHalf = kLanes<T> / 2>
FASTSEG_INLINE void transpose(Vector<T>* rows) {
  for (int64_t i = 0; i < kLanes<T>; ++i) {
    if ((i & kHalf) == 0) {
      exchange_quarters<T, kHalf>(rows[i], rows[i + kHalf], std::make_index_sequence<kLanes<T>>());
    }
  }
  if constexpr (kHalf > 1) transpose<T, kHalf / 2>(rows);
}

// exp to about one unit in the last place, by 2^n * p(r) with |r| <= ln(2) / 2.
FASTSEG_INLINE Vector<float> exp(Vector<float> x) {
  const Vector<float> clamped =
      x > 89.0f ? broadcast(89.0f) : (x < -104.0f ? broadcast(-104.0f) : x);
  const Vector<float> shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds
  const Vector<float> n = shifted - 12582912.0f;
  const Vector<float> r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
  Vector<float> p = broadcast(1.0f / 720.0f);
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n as two factors, so that neither leaves the range of normal numbers.
  const Vector<int32_t> exponent = __builtin_convertvector(n, Vector<int32_t>);
  const Vector<int32_t> first = exponent >> 1;
  const Vector<float> result = p * bit_cast<Vector<float>>((first + 127) << 23) *
                               bit_cast<Vector<float>>((exponent - first + 127) << 23);
  return x != x ? x : result;
}

FASTSEG_INLINE Vector<double> exp(Vector<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class T>
FASTSEG_INLINE Vector<T> clamp(Vector<T> z, T low, T high) {  // NaN stays NaN
  z = z < low ? broadcast(low) : z;
  return z > high ? broadcast(high) : z;
}

template <class T>
FASTSEG_INLINE Vector<T> relu(Vector<T> z) {
  return z < T(0) ? broadcast(T(0)) : z;
}
template <class T>
FASTSEG_INLINE Vector<T> relu6(Vector<T> z) {
  return clamp<T>(z, 0, 6);
}
template <class T>
FASTSEG_INLINE Vector<T> hardswish(Vector<T> z) {
  return z * clamp<T>(z + T(3), 0, 6) * T(1.0 / 6);
}
template <class T>
FASTSEG_INLINE Vector<T> silu(Vector<T> z) {
  return z / (T(1) + exp(-z));
}

template <class T>
FASTSEG_INLINE Vector<T> activate(Vector<T> z, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return relu<T>(z);
    case Activation::kRelu6:
      return relu6<T>(z);
    case Activation::kHardswish:
      return hardswish<T>(z);
    case Activation::kSilu:
      return silu<T>(z);
    default:
      return z;
  }
}

template <class T>
FASTSEG_NOINLINE void silu_all(Vector<T>* z, int count) {
  for (int i = 0; i < count; ++i) z[i] = silu<T>(z[i]);
}

// The same for a kernel's accumulators, which stay in registers.
template <class T, int kCount>
FASTSEG_INLINE void activate_all(Vector<T>* z, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      FASTSEG_UNROLL for (int i = 0; i < kCount; ++i) z[i] = relu<T>(z[i]);
      break;
    case Activation::kRelu6:
      FASTSEG_UNROLL for (int i = 0; i < kCount; ++i) z[i] = relu6<T>(z[i]);
      break;
    case Activation::kHardswish:
      FASTSEG_UNROLL for (int i = 0; i < kCount; ++i) z[i] = hardswish<T>(z[i]);
      break;
    case Activation::kSilu: {
      Vector<T> copy[kCount];  // z itself may not have an address
      FASTSEG_UNROLL for (int i = 0; i < kCount; ++i) copy[i] = z[i];
      silu_all<T>(copy, kCount);
      FASTSEG_UNROLL for (int i = 0; i < kCount; ++i) z[i] = copy[i];
      break;
    }
    default:
      break;
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg

#endif  // FASTSEG_SIMD
