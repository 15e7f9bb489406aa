// grad_weight: for each tap the product of grad_y and the x it sees. See dilated.cuh for the
// product.
//
//   grad_weight[k, c, r, s] = sum over images and over the outputs (p, q) at which the tap is live
//                             of grad_y[n, p, q, k] * x[n, p * stride + .., q * stride + .., c]
//
// A tap is live on one rectangle of outputs (rows at which r is live times columns at which s is),
// so depth is the pixels of that rectangle of all images, rows are output channels and columns
// input channels: both operands lie with their pixels across, and are turned on the way to the
// tensor cores.
//
// There are many pixels and few weights, so the pixels are split; a block adds up one split of one
// tap and tile, and writes its sums into the workspace, [splits, weights]. The second kernel adds
// the splits in their order. No atomics: the same bits in every run.
//
// The weights of several branches are further tiles of the same grid.
#pragma once

#include "csrc/dilated/dilated.cuh"

namespace fastseg {
namespace dilated {

// One axis of the outputs at which a tap is live: `output` + j reads the input `input` + stride *
// j.
struct TapParams {
  int output, input;
  Divider count;
};

// Limits of one launch: six branches of 3x3, or 16x16 taps of one. More take several launches.
constexpr int kMaxTaps = 36;      // along each axis, of all grids
constexpr int kMaxGridTaps = 16;  // of one grid
constexpr int kMaxGrids = 12;

// Taps of one branch, those of some rows of its filter times those of some columns.
struct TapGrid {
  int first_tile;   // of output channels
  int row, column;  // where its taps stand in the tables of them all
  int row_taps, column_taps;
  int K, channel;        // its channels of grad_output: how many, and the first
  int64_t first_weight;  // in the workspace, [row_taps, column_taps, K, C]
  void* grad_weight;     // [K, C, R, S], at its first tap
  Strides4 grad_weight_strides;
};

struct GradWeightParams {
  TapParams rows[kMaxTaps], columns[kMaxTaps];
  TapGrid grids[kMaxGrids];
  int grid_count;
  int images;
  int64_t split;  // pixels of a split, a whole number of slices
  int C;
  const void* grad_output;  // [N, P, Q, K]
  Strides4 grad_output_strides;
  const void* input;  // [N, H, W, C]
  Strides4 input_strides;
  int64_t input_row, input_column;  // from what one output sees to what the next one does
  void* partial;                    // [splits of the tap with the most pixels, weights]
  int64_t weights;
};
static_assert(sizeof(GradWeightParams) <= 4096);

// What a block computes, in shared memory lest it take registers while products are summed up.
struct alignas(16) SplitTile {
  int64_t first_weight;  // of the tap and split, in the workspace [K, C]
  int first_k, K;
  Divider rows, columns;  // of the tap's rectangle
};

// How many pixels a thread still has to copy, of each operand: from the start none of one that has
// not as many channels.
struct PixelsLeft {
  int a, b;

  __device__ __forceinline__ void operator-=(int pixels) { a -= pixels, b -= pixels; }
};

template <typename OPERAND, typename TILE, bool A_VECTORS, bool B_VECTORS>
struct GradWeightTraits : ProductTraits<OPERAND, TILE, true, true> {
  using Base = ProductTraits<OPERAND, TILE, true, true>;

  static constexpr bool kAVectors = A_VECTORS, kBVectors = B_VECTORS;
  static constexpr int kChain = Base::kDepth / 2;  // cuDNN's gradients of weights are as accurate
  // Neighbouring lines, that is pixels, of which a thread copies one chunk each, of A and of B.
  static constexpr int kLines = Base::A::kLines * Base::A::kChunks / TILE::kThreads;
  static constexpr int kSharedBytes = Base::kPipelineBytes + static_cast<int>(sizeof(SplitTile));

  static_assert(TILE::kRows == TILE::kColumns);
  static_assert(Base::A::kLines * Base::A::kChunks % TILE::kThreads == 0);
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, min_blocks<Traits>())
    dilated_grad_weight_split(const __grid_constant__ GradWeightParams params) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  using A = typename Traits::A;
  constexpr int kVector = Traits::kVector, kDepth = Traits::kDepth;

  FASTSEG_DYNAMIC_SHARED(shared);
  const int thread = thread_id_x();
  const int k_tile = static_cast<int>(block_id_y());
  int number = 0;
  while (number + 1 < params.grid_count && params.grids[number + 1].first_tile <= k_tile) ++number;
  const TapGrid& grid = params.grids[number];
  const int first_c = static_cast<int>(block_id_x()) * Traits::kColumns;
  const int first_k = (k_tile - grid.first_tile) * Traits::kRows;
  const int taps = grid.row_taps * grid.column_taps;
  const int split = static_cast<int>(block_id_z()) / taps;
  const int tap = static_cast<int>(block_id_z()) - split * taps;
  const TapParams& rows = params.rows[grid.row + tap / grid.column_taps];
  const TapParams& columns = params.columns[grid.column + tap % grid.column_taps];

  const int64_t pixels =
      static_cast<int64_t>(params.images) * rows.count.divisor * columns.count.divisor;
  const int64_t begin = split * params.split;
  if (begin >= pixels) return;  // another tap or grid has more
  const int length = static_cast<int>(min(params.split, pixels - begin));
  const int slices = (length + kDepth - 1) / kDepth;

  SplitTile* const own = reinterpret_cast<SplitTile*>(shared + Traits::kPipelineBytes);
  if (thread == 0) {
    *own = {
        split * params.weights + grid.first_weight + static_cast<int64_t>(tap) * grid.K * params.C,
        first_k, grid.K, rows.count, columns.count};
  }

  __syncthreads();

  // ---- What this thread copies ----

  const int chunk = thread % A::kChunks, first_line = thread / A::kChunks * Traits::kLines;
  const NeighbouringLines<A> place(first_line, chunk);
  const int k = first_k + chunk * kVector, c = first_c + chunk * kVector;
  const T* const grad_output = static_cast<const T*>(params.grad_output) +
                               rows.output * params.grad_output_strides.h +
                               columns.output * params.grad_output_strides.w + grid.channel + k;
  const T* const input = static_cast<const T*>(params.input) + rows.input * params.input_strides.h +
                         columns.input * params.input_strides.w + c;
  Pixel pixel = pixel_at(begin, rows.count, columns.count);

  const int k_count = Traits::kAVectors ? kVector : grid.K - k;
  const int c_count = Traits::kBVectors ? kVector : params.C - c;
  PixelsLeft left{k < grid.K ? length : 0, c < params.C ? length : 0};

  const auto fill = [&](T* a, T* b) {
#pragma unroll
    for (int i = 0; i < Traits::kLines; ++i) {
      const int line = first_line + i;
      const Pixel at = pixel_behind(pixel, line, own->rows, own->columns);
      copy_chunk<Traits::kAVectors>(a + place.of(i),
                                    grad_output + at.image * params.grad_output_strides.n +
                                        at.row * params.grad_output_strides.h +
                                        at.column * params.grad_output_strides.w,
                                    line < left.a ? k_count : 0);
      copy_chunk<Traits::kBVectors>(b + place.of(i),
                                    input + at.image * params.input_strides.n +
                                        at.row * params.input_row + at.column * params.input_column,
                                    line < left.b ? c_count : 0);
    }
    pixel = pixel_behind(pixel, kDepth, own->rows, own->columns);
    left -= kDepth;
  };

  Accumulators<Traits> sums = {};
  multiply_slices<Traits>(slices, reinterpret_cast<T*>(shared), sums, fill);

  using Unit = Mma<tf32>;
  const int lane = lane_id();
  Acc* const partial = static_cast<Acc*>(params.partial) + own->first_weight;  // [K, C]
#pragma unroll
  for (int m = 0; m < Traits::kUnitRows; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kUnitColumns; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = own->first_k + warp_row<Traits>() + 16 * m + Unit::d_row(lane, 2 * half);
        const int column = first_c + warp_column<Traits>() + 8 * n + Unit::d_column(lane, 0);
        if (row >= own->K || column >= params.C) continue;
        Acc* const to = partial + static_cast<int64_t>(row) * params.C + column;
        const Acc(&unit)[4] = sums[m][n].reg;
        if (params.C % 2 == 0) {
          *reinterpret_cast<Pair<Acc>*>(to) = {unit[2 * half], unit[2 * half + 1]};
        } else {
          to[0] = unit[2 * half];
          if (column + 1 < params.C) to[1] = unit[2 * half + 1];
        }
      }
    }
  }
}

// ---- The second stage of the sums ----

constexpr int kReduceThreads = 256;

// A thread adds up the splits of one weight. Neighbouring threads take neighbouring weights of
// grad_weight, whose taps or whose input channels are adjacent.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    dilated_grad_weight_reduce(const __grid_constant__ GradWeightParams params) {
  using Acc = Accumulator<T>;
  for (int64_t i = block_id_x() * kReduceThreads + thread_id_x(); i < params.weights;
       i += grid_size_x() * kReduceThreads) {
    int number = 0;
    while (number + 1 < params.grid_count && params.grids[number + 1].first_weight <= i) ++number;
    const TapGrid& grid = params.grids[number];
    const Strides4& strides = grid.grad_weight_strides;
    const int taps = grid.row_taps * grid.column_taps;
    const int64_t weight = i - grid.first_weight;
    int64_t k, c;
    int tap;
    if (strides.c == 1) {
      const int64_t line = weight / params.C;
      c = weight - line * params.C;
      k = line / taps;
      tap = static_cast<int>(line - k * taps);
    } else {
      const int64_t channel = weight / taps;
      tap = static_cast<int>(weight - channel * taps);
      k = channel / params.C;
      c = channel - k * params.C;
    }
    const int r = tap / grid.column_taps, s = tap - r * grid.column_taps;
    const int64_t pixels = static_cast<int64_t>(params.images) *
                           params.rows[grid.row + r].count.divisor *
                           params.columns[grid.column + s].count.divisor;
    const Acc* partial = static_cast<const Acc*>(params.partial) + grid.first_weight +
                         (static_cast<int64_t>(tap) * grid.K + k) * params.C + c;
    Acc sum = Acc(0);
    for (int64_t begin = 0; begin < pixels; begin += params.split) {
      sum += *partial;
      partial += params.weights;
    }
    static_cast<T*>(
        grid.grad_weight)[k * strides.n + c * strides.c + r * strides.h + s * strides.w] =
        narrow<T>(sum);
  }
}

}  // namespace dilated
}  // namespace fastseg
