// Dense convolution: what all three directions share, a matrix product whose operands are gathered.
//
//   forward      y[pixel, k]    = sum over (tap, c) of x[pixel + tap, c] * weight[k, tap, c]
//   grad_input   gx[pixel, c]   = sum over (tap, k) of gy[pixel - tap, k] * weight[k, tap, c]
//   grad_weight  gw[k, tap, c]  = sum over pixels of gy[pixel, k] * x[pixel + tap, c]
//
// A tap that looks at padding is neither loaded nor multiplied. Forward and grad_input cut their
// targets into rectangles on which the live taps are the same (rectangles.h), and are one kernel,
// dilated_gather.cuh; for grad_weight each tap has one rectangle of outputs at which it is live,
// dilated_grad_weight.cuh. Neither tests a bound in its inner loop.
//
// The product. A block owns a tile of ROWS x COLUMNS sums, in registers, and goes along the depth
// in slices of 128 bytes (64 halves, 32 floats, 16 doubles). The slices of both operands travel to
// shared memory by cp.async, kStages - 1 of them ahead of the one that is multiplied:
//
//           depth                                A slice is a grid of 16-byte chunks. As memory has
//        . . . . . .      columns                it, either depth runs along a line (x, grad_y,
//   rows . A slice .    .  B slice .             weight in forward) or rows do (weight in
//        . . . . . .    depth      .             grad_input, both operands of grad_weight: TURNED);
//        . . . . . .    .          .             ldmatrix turns such a one while it loads.
//
// Chunk c of line l lies at place c ^ twist(l), so that the 8 chunks of one ldmatrix matrix, one a
// line, come from 8 different groups of banks, and so do the 8 chunks that neighbouring lanes
// write.
//
// Halves go to the tensor cores as they are, floats as TF32 rounded to nearest, or as IEEE float32,
// like doubles, to the ordinary multipliers, whose sums are spread over the lanes as the tensor
// cores' are. Channels that fill no chunk, or lie at odd addresses, are fetched one by one
// (VECTORS = false), zeros behind the last.
//
// What limits it. A tile of 128 x 256 gets 43 halves' products out of a byte that it reads, almost
// always from cache, one of 128 x 128 gets 32, one of 64 x 64 gets 16; an H200 does about 100
// products in the time that its memory takes for a byte. The 64 mma.sync of a slice and warp (tiles
// of 128 x 128) come with 140 other instructions in forward, 170 in grad_input and 320 in
// grad_weight; and mma.sync reaches about two thirds of what Hopper's tensor cores do with wgmma.
#pragma once

#include <cstring>
#include <type_traits>

#include "csrc/common/activation.cuh"
#include "csrc/common/async_copy.cuh"
#include "csrc/common/divider.h"
#include "csrc/common/index.cuh"
#include "csrc/common/launch.cuh"
#include "csrc/common/mma.cuh"
#include "csrc/common/vector.cuh"
#include "csrc/dilated/dilated_plan.h"

namespace fastseg {
namespace dilated {

// ---- Constants ----

constexpr int kSliceBytes = 128;  // of one row's or column's depth

// Shared memory of a multiprocessor. Compilers learn from it how many blocks one can hold at most,
// and so how many registers a thread may take; nothing else depends on it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr int kMultiprocessorBytes = 164 << 10;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kMultiprocessorBytes = 100 << 10;
#else
constexpr int kMultiprocessorBytes = 228 << 10;
#endif
constexpr int kReservedBytes = 1024;  // of each block
// Of sm_80; few GPUs have more. Tiles that need more than 99 KB run where there is that much.
constexpr int kMostSharedBytes = 163 << 10;

// How an operand is multiplied: __half, __nv_bfloat16 and tf32 on the tensor cores, float and
// double on the ordinary multipliers.
template <typename OPERAND>
constexpr bool kOnTensorCores = !std::is_same_v<OPERAND, float> && !std::is_same_v<OPERAND, double>;

// What it is in memory.
template <typename OPERAND>
using Stored = std::conditional_t<std::is_same_v<OPERAND, tf32>, float, OPERAND>;

// ROWS x COLUMNS sums a block, WARP_ROWS x WARP_COLUMNS of them a warp.
template <int ROWS, int COLUMNS, int WARP_ROWS, int WARP_COLUMNS, int STAGES, int MIN_BLOCKS>
struct Tile {
  static constexpr int kRows = ROWS, kColumns = COLUMNS;
  static constexpr int kWarpRows = WARP_ROWS, kWarpColumns = WARP_COLUMNS;
  static constexpr int kStages = STAGES;
  static constexpr int kMinBlocks = MIN_BLOCKS;  // that a multiprocessor should hold
  static constexpr int kThreads = ROWS / WARP_ROWS * (COLUMNS / WARP_COLUMNS) * 32;

  static_assert(ROWS % WARP_ROWS == 0 && COLUMNS % WARP_COLUMNS == 0);
  static_assert(WARP_ROWS % 16 == 0 && WARP_COLUMNS % 16 == 0);
};

using Tile128x256 = Tile<128, 256, 64, 64, 3, 1>;
using Tile128x128 = Tile<128, 128, 64, 32, 3, 2>;
// For floats that must be turned, which takes more registers than two such blocks have.
using Tile128x128Alone = Tile<128, 128, 64, 32, 3, 1>;
using Tile128x64 = Tile<128, 64, 64, 32, 3, 3>;
using Tile128x32 = Tile<128, 32, 32, 32, 4, 2>;
using Tile64x64 = Tile<64, 64, 32, 32, 4, 3>;
using Tile32x32 = Tile<32, 32, 32, 16, 4, 4>;
// For float, which needs registers for two sets of sums.
using Tile128x64SmallWarps = Tile<128, 64, 32, 32, 3, 2>;

template <typename... TILES>
struct TileList {};

// ---- One operand's slice in shared memory ----

// EXTENT rows (or columns) times one slice of depth.
template <typename T, int EXTENT, bool TURNED>
struct Slice {
  static constexpr int kVector = kChunkBytes / static_cast<int>(sizeof(T));  // elements of a chunk
  static constexpr int kDepth = kSliceBytes / static_cast<int>(sizeof(T));
  static constexpr int kLines = TURNED ? kDepth : EXTENT;
  static constexpr int kLength = TURNED ? EXTENT : kDepth;
  static constexpr int kChunks = kLength / kVector;  // of a line
  static constexpr int kElements = kLines * kLength;

  static_assert(kLength % kVector == 0 && (kChunks & (kChunks - 1)) == 0 && kChunks >= 4);

  static __host__ __device__ constexpr int twist(int line) {
    // 32-bit elements that must be turned are read one by one, from 4 lines and 2 chunks at a time.
    if constexpr (TURNED && sizeof(T) == 4) return 2 * line % 8;
    if constexpr (kChunks >= 8) return line % 8;
    return line / 2 % 4;
  }

  static __host__ __device__ constexpr int offset(int line, int chunk) {
    return line * kLength + (chunk ^ twist(line)) * kVector;
  }

  static __host__ __device__ constexpr int element(int extent, int depth) {
    const int line = TURNED ? depth : extent, place = TURNED ? extent : depth;
    return offset(line, place / kVector) + place % kVector;
  }
};

// Where chunk `chunk` of the lines `line` + i lies, i below some power of two that divides `line`.
template <typename Slice>
struct NeighbouringLines {
  int first, chunk;

  __device__ __forceinline__ NeighbouringLines(int line, int chunk)
      : first(line * Slice::kLength), chunk(chunk ^ Slice::twist(line)) {}

  __device__ __forceinline__ int of(int i) const {
    return first + i * Slice::kLength + (chunk ^ Slice::twist(i)) * Slice::kVector;
  }
};

// The first `count` elements of a chunk, and zeros for the rest: what a sum must not see must not
// be in either operand, since zero times garbage may be NaN. VECTORS: `from` is aligned, and count
// is a whole chunk or not positive.
template <bool VECTORS, typename T>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, int count) {
  if constexpr (VECTORS) {
    cp_async_16_or_zero(to, from, count > 0);
  } else {
    constexpr int kVector = kChunkBytes / static_cast<int>(sizeof(T));
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                    std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
    Bits elements[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      elements[v] = v < count ? reinterpret_cast<const Bits*>(from)[v] : Bits(0);
    }
    uint4 chunk;
    memcpy(&chunk, elements, sizeof chunk);
    *reinterpret_cast<uint4*>(to) = chunk;
  }
}

// ---- Multiplication ----

// Everything that follows from the template arguments of a kernel.
template <typename OPERAND, typename TILE, bool A_TURNED, bool B_TURNED>
struct ProductTraits : TILE {
  using Operand = OPERAND;
  using T = Stored<OPERAND>;
  using Acc = Accumulator<OPERAND>;
  using A = Slice<T, TILE::kRows, A_TURNED>;
  using B = Slice<T, TILE::kColumns, B_TURNED>;

  static constexpr bool kATurned = A_TURNED, kBTurned = B_TURNED;
  static constexpr int kVector = A::kVector;
  static constexpr int kDepth = A::kDepth;
  static constexpr int kChain = kDepth;  // floats that are added up in one chain
  static constexpr int kStageElements = A::kElements + B::kElements;
  static constexpr int kStageBytes = kStageElements * static_cast<int>(sizeof(T));
  static constexpr int kPipelineBytes = TILE::kStages * kStageBytes;
  // Of a warp, in units of 16 x 8 sums.
  static constexpr int kUnitRows = TILE::kWarpRows / 16, kUnitColumns = TILE::kWarpColumns / 8;

  static_assert(TILE::kStages >= 3 && kPipelineBytes <= kMostSharedBytes);
};

template <typename Traits>
constexpr int min_blocks() {
  constexpr int kFit = kMultiprocessorBytes / (Traits::kSharedBytes + kReservedBytes);
  return kFit < 1 ? 1 : kFit < Traits::kMinBlocks ? kFit : Traits::kMinBlocks;
}

template <typename Traits>
using Accumulators = Sums<typename Traits::Acc>[Traits::kUnitRows][Traits::kUnitColumns];

// Where a warp's sums begin in the tile.
template <typename Traits>
__device__ __forceinline__ int warp_row() {
  return warp_id() / (Traits::kColumns / Traits::kWarpColumns) * Traits::kWarpRows;
}
template <typename Traits>
__device__ __forceinline__ int warp_column() {
  return warp_id() % (Traits::kColumns / Traits::kWarpColumns) * Traits::kWarpColumns;
}

// Floats become TF32 here, rounded to nearest: the tensor cores themselves would cut them off.
template <typename Operand>
__device__ __forceinline__ void round_operands(uint32_t (&reg)[4]) {
  if constexpr (std::is_same_v<Operand, tf32>) {
#pragma unroll
    for (uint32_t& bits : reg) bits = to_tf32(__uint_as_float(bits)).bits;
  }
}

// One fragment after the other of an operand's slice, for load_matrices: four 8 x 8 matrices (seen
// as 16-bit elements), two of them EXTENT_FIRST along rows (columns), then two along depth, or the
// other way round. All that fragments share is one place in the slice: lines are added to it,
// chunks are flipped in it by an exclusive or, because tiles begin at multiples of a warp's, whose
// bits no fragment's place inside of it touches.
template <typename Operand, typename Slice, bool TURNED, bool EXTENT_FIRST>
class FragmentReader {
 public:
  using T = Stored<Operand>;

  // Of the warp that begins at row (column) `first`.
  __device__ __forceinline__ FragmentReader(const T* slice, int first) : slice_(slice) {
    const int lane = lane_id();
    if constexpr (kByElement) {
      const int chunk = first / Slice::kVector ^ lane / 4 / Slice::kVector ^ Slice::twist(lane % 4);
      place_ =
          Unit::b_k(lane, 0) * Slice::kLength + chunk * Slice::kVector + lane / 4 % Slice::kVector;
    } else {
      const int line = lane % 8, outer = lane / 16, inner = lane / 8 % 2;
      const int extent = EXTENT_FIRST ? inner : outer, depth = EXTENT_FIRST ? outer : inner;
      const int chunk = (TURNED ? first / Slice::kVector ^ extent : depth) ^ Slice::twist(line);
      place_ = (line + (TURNED ? 8 * depth : first + 8 * extent)) * Slice::kLength +
               chunk * Slice::kVector;
    }
  }

  // 16 rows (columns) from `first + extent` on, step `step` of the depth.
  __device__ __forceinline__ void read(int extent, int step, uint32_t (&reg)[4]) const {
    if constexpr (kByElement) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int outer = i / 2, inner = i % 2;
        const int block = EXTENT_FIRST ? inner : outer, half = EXTENT_FIRST ? outer : inner;
        const int line = Unit::K * step + Unit::K / 2 * half;
        reg[i] = __float_as_uint(slice_[line * Slice::kLength + (place_ ^ (extent + 8 * block))]);
      }
    } else if constexpr (TURNED) {
      load_matrices<true>(reg, slice_ + Unit::K * step * Slice::kLength + (place_ ^ extent));
    } else {
      load_matrices<false>(reg,
                           slice_ + extent * Slice::kLength + (place_ ^ 2 * step * Slice::kVector));
    }
  }

 private:
  using Unit = Mma<Operand>;
  // ldmatrix turns 16-bit elements only.
  static constexpr bool kByElement = TURNED && sizeof(Operand) == 4;
  static_assert(Unit::K == 2 * Slice::kVector && 8 % Slice::kVector == 0);

  const T* slice_;
  int place_;
};

// sums += A slice times B slice, a [rows, depth], b [depth, columns].
template <typename Traits>
__device__ __forceinline__ void multiply_on_tensor_cores(const typename Traits::T* a,
                                                         const typename Traits::T* b,
                                                         Accumulators<Traits>& sums) {
  using Operand = typename Traits::Operand;
  const FragmentReader<Operand, typename Traits::A, Traits::kATurned, true> a_reader(
      a, warp_row<Traits>());
  const FragmentReader<Operand, typename Traits::B, Traits::kBTurned, false> b_reader(
      b, warp_column<Traits>());

#pragma unroll
  for (int step = 0; step < Traits::kDepth / Mma<Operand>::K; ++step) {
    FragmentA<Operand> a_fragments[Traits::kUnitRows];
    FragmentB<Operand> b_fragments[Traits::kUnitColumns];
#pragma unroll
    for (int m = 0; m < Traits::kUnitRows; ++m) {
      auto& reg = a_fragments[m].reg;
      a_reader.read(16 * m, step, reg);
      round_operands<Operand>(reg);
    }
#pragma unroll
    for (int n = 0; n < Traits::kUnitColumns; n += 2) {
      uint32_t reg[4];
      b_reader.read(8 * n, step, reg);
      round_operands<Operand>(reg);
#pragma unroll
      for (int i = 0; i < 4; ++i) b_fragments[n + i / 2].reg[i % 2] = reg[i];
    }
#pragma unroll
    for (int m = 0; m < Traits::kUnitRows; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kUnitColumns; ++n) {
        mma(sums[m][n], a_fragments[m], b_fragments[n]);
      }
    }
  }
}

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T value[2];
};

// The same sums, in the same registers, one product after the other, between two depths of a slice.
template <typename Traits>
__device__ __forceinline__ void multiply_one_by_one(const typename Traits::T* a,
                                                    const typename Traits::T* b, int begin, int end,
                                                    Accumulators<Traits>& sums) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  using B = typename Traits::B;
  using Unit = Mma<tf32>;  // for where its sums lie
  constexpr int kRows = 2 * Traits::kUnitRows, kColumns = 2 * Traits::kUnitColumns;
  const auto pair = [](const T* source) { return *reinterpret_cast<const Pair<T>*>(source); };
  const int lane = lane_id();
  const int first_row = warp_row<Traits>() + Unit::d_row(lane, 0);
  const int first_column = warp_column<Traits>() + Unit::d_column(lane, 0);

#pragma unroll 2
  for (int depth = begin; depth < end; depth += 2) {
    T rows[kRows][2], columns[kColumns][2];  // [.., depth]
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if constexpr (Traits::kATurned) {
#pragma unroll
        for (int e = 0; e < 2; ++e) rows[i][e] = a[A::element(first_row + 8 * i, depth + e)];
      } else {
        const Pair<T> both = pair(a + A::element(first_row + 8 * i, depth));
        rows[i][0] = both.value[0], rows[i][1] = both.value[1];
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      const int column = first_column + 4 * i;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if constexpr (Traits::kBTurned) {
          const Pair<T> both = pair(b + B::element(column, depth + e));
          columns[i][e] = both.value[0], columns[i + 1][e] = both.value[1];
        } else {
          const Pair<T> both = pair(b + B::element(column + e, depth));
          columns[i + e][0] = both.value[0], columns[i + e][1] = both.value[1];
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          T& sum = sums[i / 2][j / 2].reg[2 * (i % 2) + j % 2];
          sum = multiply_add(rows[i][e], columns[j][e], sum);
        }
      }
    }
  }
}

// sums += A slice times B slice.
template <typename Traits>
__device__ __forceinline__ void multiply_slice(const typename Traits::T* a,
                                               const typename Traits::T* b,
                                               Accumulators<Traits>& sums) {
  if constexpr (kOnTensorCores<typename Traits::Operand>) {
    multiply_on_tensor_cores<Traits>(a, b, sums);
  } else if constexpr (std::is_same_v<typename Traits::T, double>) {
    multiply_one_by_one<Traits>(a, b, 0, Traits::kDepth, sums);
  } else {
    // A float loses what it is too large for: added up chain by chain, it is large less often.
#pragma unroll 1
    for (int begin = 0; begin < Traits::kDepth; begin += Traits::kChain) {
      Accumulators<Traits> chain = {};
      multiply_one_by_one<Traits>(a, b, begin, begin + Traits::kChain, chain);
#pragma unroll
      for (int m = 0; m < Traits::kUnitRows; ++m) {
#pragma unroll
        for (int n = 0; n < Traits::kUnitColumns; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][n].reg[i] += chain[m][n].reg[i];
        }
      }
    }
  }
}

// The depth of a tile, slice after slice. fill(a, b) copies the next slice of both operands; it is
// called `slices` times. Afterwards shared memory is free. Every thread of the block has to call
// this.
template <typename Traits, typename Fill>
__device__ __forceinline__ void multiply_slices(int slices, typename Traits::T* shared,
                                                Accumulators<Traits>& sums, Fill fill) {
  using T = typename Traits::T;
  constexpr int kStages = Traits::kStages;
  const auto fill_stage = [&](int stage) {
    T* const a = shared + stage * Traits::kStageElements;
    fill(a, a + Traits::A::kElements);
  };
#pragma unroll 1  // once more would take registers from the loop behind it
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < slices) fill_stage(stage);
    cp_async_commit();
  }
  int stage = kStages - 1;  // the one that is free
  for (int left = slices; left > 0; --left) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the slice has landed, and everybody is done with the stage before it
    if (left >= kStages) fill_stage(stage);
    cp_async_commit();
    stage = stage + 1 < kStages ? stage + 1 : 0;

    const T* const a = shared + stage * Traits::kStageElements;  // [rows, depth]
    const T* const b = a + Traits::A::kElements;                 // [depth, columns]
    multiply_slice<Traits>(a, b, sums);
  }
  cp_async_wait<0>();
  __syncthreads();
}

// ---- Pixels ----

// Position (row, column) of a rectangle of `rows` x `columns` positions in each image.
struct Pixel {
  int image, row, column;
};

// The one with number `index`, columns fastest, then rows, then images.
__device__ __forceinline__ Pixel pixel_at(int64_t index, const Divider& rows,
                                          const Divider& columns) {
  const int64_t area = static_cast<int64_t>(rows.divisor) * columns.divisor;
  const int64_t image = index / area;
  const int64_t rest = index - image * area;
  const int64_t row = rest / columns.divisor;
  return {static_cast<int>(image), static_cast<int>(row),
          static_cast<int>(rest - row * columns.divisor)};
}

// The one `ahead` places behind `first`; not so many that their sum with a side leaves 31 bits.
__device__ __forceinline__ Pixel pixel_behind(const Pixel& first, int ahead, const Divider& rows,
                                              const Divider& columns) {
  const int column = first.column + ahead;
  const int rows_on = columns.quotient(column);
  const int row = first.row + rows_on;
  const int images_on = rows.quotient(row);
  return {first.image + images_on, row - images_on * rows.divisor,
          column - rows_on * columns.divisor};
}

}  // namespace dilated
}  // namespace fastseg
