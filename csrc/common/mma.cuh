// One warp multiplies two small matrices on the tensor cores (mma.sync, from sm_80):
//
//     D [16, 8] = A [16, K] B [K, 8] + D,  fp32 sums
//
//     T = __half, __nv_bfloat16   K = 16, two elements in a 32-bit register
//     T = tf32                    K = 8, one element in a register
//
// Each lane holds a few registers of each matrix. With g = lane / 4, t = lane % 4 and e = elements
// per register, register i of a lane holds e neighbours along k (of D: one number), beginning at
//
//     A  row g + 8 (i % 2),  k = e t + (K / 2) (i / 2)       i = 0..3
//     B  k = e t + (K / 2) i,  column g                      i = 0, 1
//     D  row g + 8 (i / 2),  column 2 t + i % 2              i = 0..3
//
// load_matrices() fills four such registers at once with 8 x 8 blocks of 16-bit elements from
// shared memory (ldmatrix), turned around if need be.
//
// Compiled with -DFASTSEG_HOST, both gather what the 32 lanes bring and compute in a loop.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "csrc/common/index.cuh"

namespace fastseg {

// A float of which only sign, exponent and the upper 10 bits of the mantissa are used.
struct tf32 {
  uint32_t bits;
};

// Rounds to nearest, ties away from zero.
__device__ __forceinline__ tf32 to_tf32(float value) {
  tf32 result;
#ifdef FASTSEG_HOST
  result.bits = __float_as_uint(value);
  if (!std::isnan(value)) result.bits = (result.bits + 0x1000u) & ~0x1fffu;
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result.bits) : "f"(value));
#endif
  return result;
}

template <typename T>
struct Mma {
  static constexpr int kElements = 4 / static_cast<int>(sizeof(T));  // per register, along k
  static constexpr int M = 16, N = 8, K = 8 * kElements;

  // Where the registers begin, see above.
  static __host__ __device__ constexpr int a_row(int lane, int i) { return lane / 4 + 8 * (i % 2); }
  static __host__ __device__ constexpr int a_k(int lane, int i) {
    return kElements * (lane % 4) + K / 2 * (i / 2);
  }
  static __host__ __device__ constexpr int b_k(int lane, int i) {
    return kElements * (lane % 4) + K / 2 * i;
  }
  static __host__ __device__ constexpr int b_column(int lane) { return lane / 4; }
  static __host__ __device__ constexpr int d_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
  static __host__ __device__ constexpr int d_column(int lane, int i) {
    return 2 * (lane % 4) + i % 2;
  }
};

template <typename T>
struct FragmentA {
  uint32_t reg[4];

  // From `tile` [16, K] with k contiguous and `stride` elements from row to row; tile and stride
  // are such that pairs of 16-bit elements lie at multiples of 4 bytes.
  __device__ __forceinline__ void load(const T* tile, int stride) {
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      reg[i] = *reinterpret_cast<const uint32_t*>(
          &tile[Mma<T>::a_row(lane, i) * stride + Mma<T>::a_k(lane, i)]);
    }
  }
};

template <typename T>
struct FragmentB {
  uint32_t reg[2];

  // From `tile` [8, K], that is B transposed: k contiguous, `stride` elements from column to
  // column.
  __device__ __forceinline__ void load(const T* tile, int stride) {
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      reg[i] = *reinterpret_cast<const uint32_t*>(
          &tile[Mma<T>::b_column(lane) * stride + Mma<T>::b_k(lane, i)]);
    }
  }
};

// D's registers; sums in float64 on ordinary multipliers are spread over the lanes in the same way.
template <typename Acc>
struct Sums {
  Acc reg[4];
};

using FragmentD = Sums<float>;

#ifdef FASTSEG_HOST

namespace mma_detail {

inline float as_float(__half value) { return __half2float(value); }
inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
inline float as_float(tf32 value) { return __uint_as_float(value.bits & ~0x1fffu); }

template <typename T>
struct Lane {
  const FragmentA<T>* a;
  const FragmentB<T>* b;
  FragmentD* d;
};

template <typename T>
void unpack(uint32_t reg, float (&elements)[Mma<T>::kElements]) {
  T packed[Mma<T>::kElements];
  std::memcpy(static_cast<void*>(packed), &reg, sizeof reg);
  for (int e = 0; e < Mma<T>::kElements; ++e) elements[e] = as_float(packed[e]);
}

template <typename T>
void multiply(void* const* parts) {
  using Shape = Mma<T>;
  float a[Shape::M][Shape::K], b[Shape::K][Shape::N], elements[Shape::kElements];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& part = *static_cast<const Lane<T>*>(parts[lane]);
    for (int i = 0; i < 4; ++i) {
      unpack<T>(part.a->reg[i], elements);
      for (int e = 0; e < Shape::kElements; ++e) {
        a[Shape::a_row(lane, i)][Shape::a_k(lane, i) + e] = elements[e];
      }
    }
    for (int i = 0; i < 2; ++i) {
      unpack<T>(part.b->reg[i], elements);
      for (int e = 0; e < Shape::kElements; ++e) {
        b[Shape::b_k(lane, i) + e][Shape::b_column(lane)] = elements[e];
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& part = *static_cast<const Lane<T>*>(parts[lane]);
    for (int i = 0; i < 4; ++i) {
      float& acc = part.d->reg[i];
      for (int k = 0; k < Shape::K; ++k) {
        acc += a[Shape::d_row(lane, i)][k] * b[k][Shape::d_column(lane, i)];
      }
    }
  }
}

}  // namespace mma_detail

namespace mma_detail {

struct MatrixLane {
  const void* row;
  uint32_t (*reg)[4];
};

template <bool TURN>
void give_matrices(void* const* parts) {
  uint16_t rows[4][8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& part = *static_cast<const MatrixLane*>(parts[lane]);
    std::memcpy(rows[lane / 8][lane % 8], part.row, sizeof rows[0][0]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& part = *static_cast<const MatrixLane*>(parts[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4, column = 2 * (lane % 4);
      const uint32_t low = TURN ? rows[i][column][row] : rows[i][row][column];
      const uint32_t high = TURN ? rows[i][column + 1][row] : rows[i][row][column + 1];
      (*part.reg)[i] = low | high << 16;
    }
  }
}

}  // namespace mma_detail

// Register i of a lane becomes the elements (lane / 4, 2 (lane % 4)) and (lane / 4, 2 (lane % 4) +
// 1) of the i-th 8 x 8 matrix of 16-bit elements, or those of its transpose; as 32-bit elements
// seen, (lane / 4, lane % 4) of an 8 x 4 matrix. Lane l brings the address of row l % 8 of matrix
// l / 8: 16 bytes of shared memory, at a multiple of 16. All 32 lanes must call it together.
template <bool TURN>
void load_matrices(uint32_t (&reg)[4], const void* row, host::Place place = host::Place::here()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    host::fail("ldmatrix from an address that is no multiple of 16", place);
  }
  mma_detail::MatrixLane lane{row, &reg};
  host::meet_in_warp("ldmatrix", 0xffffffff, &lane, mma_detail::give_matrices<TURN>, place,
                     /*all_lanes=*/true);
}

// d += a b. All 32 lanes must call it together.
template <typename T>
void mma(FragmentD& d, const FragmentA<T>& a, const FragmentB<T>& b,
         host::Place place = host::Place::here()) {
  mma_detail::Lane<T> lane{&a, &b, &d};
  host::meet_in_warp("mma.sync", 0xffffffff, &lane, mma_detail::multiply<T>, place,
                     /*all_lanes=*/true);
}

#else

#define FASTSEG_MMA(type, shape_and_types)                                                    \
  __device__ __forceinline__ void mma(FragmentD& d, const FragmentA<type>& a,                 \
                                      const FragmentB<type>& b) {                             \
    asm volatile("mma.sync.aligned." shape_and_types                                          \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
                 : "+f"(d.reg[0]), "+f"(d.reg[1]), "+f"(d.reg[2]), "+f"(d.reg[3])             \
                 : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), \
                   "r"(b.reg[1]));                                                            \
  }

// d += a b. All 32 lanes must call it together.
FASTSEG_MMA(__half, "m16n8k16.row.col.f32.f16.f16.f32")
FASTSEG_MMA(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTSEG_MMA(tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTSEG_MMA

// Register i of a lane becomes the elements (lane / 4, 2 (lane % 4)) and (lane / 4, 2 (lane % 4) +
// 1) of the i-th 8 x 8 matrix of 16-bit elements, or those of its transpose; as 32-bit elements
// seen, (lane / 4, lane % 4) of an 8 x 4 matrix. Lane l brings the address of row l % 8 of matrix
// l / 8: 16 bytes of shared memory, at a multiple of 16. All 32 lanes must call it together.
template <bool TURN>
__device__ __forceinline__ void load_matrices(uint32_t (&reg)[4], const void* row) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (TURN) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
                 : "r"(from)
                 : "memory");
  }
}

#endif

}  // namespace fastseg
