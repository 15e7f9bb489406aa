// The gradient of the loss with respect to the low-resolution logits, gathered: no atomics, nothing
// with classes at full resolution.
//
//   g[n, c, h, w] = sum over pixels (p, q) of b * a * scale * (exp(s[c] - lse) * 1 - wanted[c] / S)
//
// with b, a the shares that pixel (p, q) has in row h and column w, S = sum of wanted[c], and scale
// = S * grad_losses[n, p, q]; s[c] is interpolated again, lse comes from head_pixels.cuh.
//
// The walk. Pixels between four neighbouring low-resolution pixels form a cell. A lane owns CLASSES
// classes of COLUMNS columns and goes down the rows of pixels that its low-resolution rows see:
//
//        w0-1   w0    w0+1   ...         `upper`, `lower`: the two rows of logits around the pixel
//     ----+------o------o------+---  h    row, in registers; mixed into one row for each pixel row.
//         | .. .. .. .. .. .. .|         Every pixel costs one exponential and adds to the columns
//         | .. .. .. .. .. .. .|         on its both sides, in `row`; at the end of a pixel row
//         that
//     ----+------o------o------+---  h+1  goes into the sums of the rows above (`current`) and
//     below
//         | .. .. .. .. .. .. .|         (`next`). Where the walk enters the next row of cells,
//                                        `current` is finished and stored.
//
// So each pixel and class takes one exponential, not four; the cells at the borders of a tile are
// computed by both neighbours: (COLUMNS + 1) / COLUMNS * (kMaxRows + 1) / kMaxRows = 1.20 times for
// 8 columns, 1.33 for 4. What does not depend on the class lies in shared memory, one record of 16
// bytes a pixel, staged for as many rows as fit and read by all lanes at once:
//
//     lse, share of the right column, scale, target; smoothed targets: wanted[c] / S as two factors
//
// Lanes are neighbouring classes: of channels-last logits a warp reads full lines. Of
// channels-first logits it reads COLUMNS + 2 neighbours of 32 planes, sectors that are half used;
// that is a hundredth of the work and comes from L2.
//
// What limits it. Of each pixel and class 2 instructions mix columns, 4 subtract, scale,
// exponentiate and multiply, 2 compare the target, 2 add to both columns, 3 load the record, find
// 1 - share and count; each row of a cell costs another 17, and each row of pixels 36, which at
// four pixels a cell and 8 columns makes about 18 issue slots of 128 a clock and multiprocessor. At
// 16x150x128x128 -> 512x512 (150 of 160 lanes busy) that is 0.5 ms of instructions with the
// borders, beside 0.23 ms of exponentials, on 132 multiprocessors at 1.7 GHz; 79 MB of logits, 157
// of gradient and 50 of targets and lse take 0.08. Instructions limit.
#pragma once

#include "csrc/head/head.cuh"

namespace fastseg {
namespace head {

// ---- What a pixel counts ----

// The gradient of a pixel's loss by the score of class c is
//   scale * (p[c] - ratio * (c == label) - spread * weight[c])
template <typename Acc>
struct PixelFactors {
  Acc scale, ratio, spread;
  int label;
};

template <typename T>
struct GradientParams {
  using Acc = Accumulator<T>;

  int64_t N;
  int C;
  KernelAxis<Acc> rows, columns;
  const T* logits;  // [N, C, H, W]
  Strides4 strides;
  LossTerms<T> terms;
  const Acc* lse;          // [N, P, Q] contiguous
  const Acc* grad_losses;  // [N, P, Q] or nullptr
  Strides3 grad_losses_strides;
  Acc* gradient;  // [N, C, H, W]
  Strides4 gradient_strides;
  bool channels_last;  // direct kernel only: the order of threads
  // Walks only. A block is `groups` sets of columns side by side, of `lanes` threads each.
  Divider lanes, slabs, column_tiles, row_tiles;
  int groups;
  int rows_per_tile;
  int records;  // that fit into shared memory
};

template <bool SMOOTH, typename T>
__device__ __forceinline__ PixelFactors<Accumulator<T>> pixel_factors(
    const GradientParams<T>& params, int64_t n, int p, int q) {
  using Acc = Accumulator<T>;
  const LossTerms<T>& terms = params.terms;
  const int label = load_target(terms, n, p, q).label;
  Acc grad = Acc(1);
  if (params.grad_losses != nullptr) {
    const Strides3& strides = params.grad_losses_strides;
    grad = __ldg(params.grad_losses + n * strides.n + p * strides.h + q * strides.w);
  }
  if (label == kNoClass) return {static_cast<Acc>(NAN), Acc(0), Acc(0), kIgnored};
  if (label == kIgnored) return {grad * Acc(0), Acc(0), Acc(0), kIgnored};
  const Acc weight = terms.weight_of_class(label);
  if constexpr (!SMOOTH) return {grad * weight, Acc(1), Acc(0), label};
  const Acc chosen = weight * (Acc(1) - terms.smoothing);
  const Acc each = terms.smoothing / static_cast<Acc>(terms.C);
  const Acc all = multiply_add(each, terms.weights_of_all(), chosen);
  const Acc inverse = all == Acc(0) ? Acc(0) : Acc(1) / all;
  return {grad * all, chosen * inverse, each * inverse, label};
}

// ---- The walk ----

template <typename T, int CLASSES, int COLUMNS, bool SMOOTH>
struct GradientTraits {
  using Acc = Accumulator<T>;
  static_assert(std::is_same_v<Acc, float>, "a record is four floats");

  static constexpr int kMaxThreads = 256;
  static constexpr int kMaxRows = 16;   // low-resolution rows of a tile
  static constexpr int kRecords = 512;  // pixels in shared memory, if a row of them is not longer
  static constexpr int kMaxRecords = 1024;
  static constexpr int kRecordBytes = SMOOTH ? 24 : 16;
  // `upper`, `lower` and the mixed row; `row`; `current` and `next`.
  static constexpr int kRegisters = CLASSES * (3 * (COLUMNS + 2) + COLUMNS + 1 + 2 * COLUMNS);
  static_assert(kRegisters <= 64);
};

template <typename T, int CLASSES, int COLUMNS, bool SMOOTH>
__global__ void __launch_bounds__(GradientTraits<T, CLASSES, COLUMNS, SMOOTH>::kMaxThreads, 2)
    head_gradient_walk(const __grid_constant__ GradientParams<T> params) {
  using Traits = GradientTraits<T, CLASSES, COLUMNS, SMOOTH>;
  using Acc = typename Traits::Acc;
  constexpr int kColumns = COLUMNS, kNeighbours = COLUMNS + 2;
  // Pixels of a cell in flight. Scaling up fourfold it has four; smoothing leaves registers for
  // two.
  constexpr int kUnrolled = SMOOTH ? 2 : 4;

  // Shared: records [rows][columns] of the pixels, their smoothing, and where cells begin.
  FASTSEG_DYNAMIC_SHARED(shared);
  float4* const records = reinterpret_cast<float4*>(shared);
  float2* const smoothing = reinterpret_cast<float2*>(records + params.records);
  int* const cells = reinterpret_cast<int*>(shared + params.records * Traits::kRecordBytes);

  const int thread = thread_id_x(), threads = block_size_x();
  const int group = params.lanes.quotient(thread), lanes = params.lanes.divisor;
  const int lane = thread - group * lanes;
  int block = static_cast<int>(block_id_x());
  const int slab = split<false>(params.slabs, block);
  const int column_tile = split<false>(params.column_tiles, block);
  const int row_tile = split<false>(params.row_tiles, block);
  const int n = block;

  const KernelAxis<Acc>&rows = params.rows, &columns = params.columns;
  const int H = rows.inputs, W = columns.inputs;
  const int w_tile = column_tile * params.groups * kColumns, w0 = w_tile + group * kColumns;
  const int h0 = row_tile * params.rows_per_tile, h1 = min(h0 + params.rows_per_tile, H);
  const int cell_count = params.groups * kColumns + 1;  // from w_tile - 1 on
  const int q_begin = columns.outputs_before(w_tile - 1);
  const int width = columns.outputs_before(w_tile + cell_count - 1) - q_begin;
  for (int i = thread; i <= cell_count; i += threads) {
    cells[i] = columns.outputs_before(w_tile - 1 + i) - q_begin;
  }
  const int* const own_cells = cells + group * kColumns;  // [kColumns + 2]

  // The classes of this lane; lanes beyond the last class repeat it, and store nothing.
  int classes[CLASSES];
  const T* source[CLASSES];  // [H, W]
  Acc weights[CLASSES];
#pragma unroll
  for (int k = 0; k < CLASSES; ++k) {
    classes[k] = (slab * CLASSES + k) * lanes + lane;
    const int c = min(classes[k], params.C - 1);
    source[k] = params.logits + n * params.strides.n + c * params.strides.c;
    weights[k] = SMOOTH ? params.terms.weight_of_class(c) : Acc(0);
  }

  Acc upper[CLASSES][kNeighbours], lower[CLASSES][kNeighbours];
  Acc current[CLASSES][kColumns] = {}, next[CLASSES][kColumns] = {};
  const auto load_row = [&](int h, Acc(&values)[CLASSES][kNeighbours]) {
    // Beyond the image its border is repeated: no pixel looks there.
    const int64_t offset =
        min(max(h, 0), H - 1) * params.strides.h + min(max(w0 - 1, 0), W - 1) * params.strides.w;
#pragma unroll
    for (int k = 0; k < CLASSES; ++k) {
      const T* place = source[k] + offset;
#pragma unroll
      for (int j = 0; j < kNeighbours; ++j) {
        values[k][j] = widen(__ldg(place));
        if (w0 - 1 + j >= 0 && w0 + j < W) place += params.strides.w;
      }
    }
  };
  const auto store = [&](int h) {
    const Strides4& strides = params.gradient_strides;
#pragma unroll
    for (int k = 0; k < CLASSES; ++k) {
      if (classes[k] >= params.C) continue;
      Acc* const line = params.gradient + n * strides.n + classes[k] * strides.c + h * strides.h;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (w0 + j < W) line[(w0 + j) * strides.w] = current[k][j];
      }
    }
  };
  const auto advance = [&] {
#pragma unroll
    for (int k = 0; k < CLASSES; ++k) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) current[k][j] = next[k][j], next[k][j] = Acc(0);
    }
  };

  int h = h0 - 1;  // `current` belongs to it
  load_row(h, upper);
  load_row(h + 1, lower);
  const int p_end = rows.outputs_before(h1);
  const int rows_at_once = max(params.records / max(width, 1), 1);
  for (int p_chunk = rows.outputs_before(h0 - 1); p_chunk < p_end; p_chunk += rows_at_once) {
    const int height = min(rows_at_once, p_end - p_chunk);
    __syncthreads();  // the records before have been read; the first time: cells are written
    for (int i = thread; i < height * width; i += threads) {
      const int r = i / width, p = p_chunk + r, q = q_begin + i - r * width;
      const PixelFactors<Acc> factors = pixel_factors<SMOOTH>(params, n, p, q);
      const int64_t line = int64_t{n} * rows.outputs + p;
      const Acc lse = params.lse[line * columns.outputs + q];
      records[i] =
          make_float4(lse, columns.sample(q).share, factors.scale, __int_as_float(factors.label));
      if constexpr (SMOOTH) smoothing[i] = make_float2(factors.ratio, factors.spread);
    }
    __syncthreads();

    for (int r = 0; r < height; ++r) {
      const Sample<Acc, int> y = rows.sample(p_chunk + r);
      for (; h < y.first; ++h) {
        if (h >= h0) store(h);
        advance();
#pragma unroll
        for (int k = 0; k < CLASSES; ++k) {
#pragma unroll
          for (int j = 0; j < kNeighbours; ++j) upper[k][j] = lower[k][j];
        }
        load_row(h + 2, lower);
      }
      Acc mixed[CLASSES][kNeighbours], row[CLASSES][kColumns + 1] = {};
#pragma unroll
      for (int k = 0; k < CLASSES; ++k) {
#pragma unroll
        for (int j = 0; j < kNeighbours; ++j) {
          mixed[k][j] = interpolate(upper[k][j], lower[k][j], y.share);
        }
      }
      const int begin = r * width;
#pragma unroll
      for (int j = 0; j <= kColumns; ++j) {  // cell w0 - 1 + j
        const auto add_pixel = [&](int i) {
          const float4 record = records[i];
          const Acc right = record.y, left = Acc(1) - right;
          float2 smooth = make_float2(1.0f, 0.0f);
          if constexpr (SMOOTH) smooth = smoothing[i];
          const int label = __float_as_int(record.w);
#pragma unroll
          for (int k = 0; k < CLASSES; ++k) {
            const Acc score = multiply_add(mixed[k][j + 1], right, mixed[k][j] * left);
            Acc grad = exponential(score - record.x);
            if (label == classes[k]) grad -= smooth.x;
            if constexpr (SMOOTH) grad = multiply_add(-weights[k], smooth.y, grad);
            grad *= record.z;
            if (j > 0) row[k][j - 1] = multiply_add(left, grad, row[k][j - 1]);
            row[k][j] = multiply_add(right, grad, row[k][j]);
          }
        };
        int i = begin + own_cells[j];
        const int last = begin + own_cells[j + 1];
#pragma unroll 1
        for (; i + kUnrolled <= last; i += kUnrolled) {
#pragma unroll
          for (int u = 0; u < kUnrolled; ++u) add_pixel(i + u);
        }
#pragma unroll 1
        for (; i < last; ++i) add_pixel(i);
      }
#pragma unroll
      for (int k = 0; k < CLASSES; ++k) {
        if (w0 + kColumns >= W) {  // right of the last column there is only itself
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            if (w0 + j == W - 1) row[k][j] += row[k][j + 1];
          }
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          current[k][j] = multiply_add(Acc(1) - y.share, row[k][j], current[k][j]);
          next[k][j] = multiply_add(y.share, row[k][j], next[k][j]);
        }
      }
    }
  }
  for (; h < h1; ++h) {
    if (h == H - 1) {  // below the last row there is only itself
#pragma unroll
      for (int k = 0; k < CLASSES; ++k) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) current[k][j] += next[k][j];
      }
    }
    if (h >= h0) store(h);
    advance();
  }
}

// ---- One element at a time ----

template <typename T, bool SMOOTH>
__global__ void __launch_bounds__(kDirectThreads, 2)
    head_gradient_direct(const __grid_constant__ GradientParams<T> params) {
  using Acc = Accumulator<T>;
  const int H = params.rows.inputs, W = params.columns.inputs;
  const int64_t elements = params.N * params.C * H * W;
  for (int64_t i = block_id_x() * kDirectThreads + thread_id_x(); i < elements;
       i += grid_size_x() * kDirectThreads) {
    int64_t rest = i;
    const auto remainder = [&](int divisor) {
      const int64_t quotient = rest / divisor;
      const int found = static_cast<int>(rest - quotient * divisor);
      rest = quotient;
      return found;
    };
    int c = params.channels_last ? remainder(params.C) : 0;
    const int w = remainder(W), h = remainder(H);
    if (!params.channels_last) c = remainder(params.C);
    const int64_t n = rest;

    const T* const plane = params.logits + n * params.strides.n + c * params.strides.c;  // [H, W]
    const Acc weight = SMOOTH ? params.terms.weight_of_class(c) : Acc(0);
    const int p_end = params.rows.outputs_before(h + 1);
    const int q_begin = params.columns.outputs_before(w - 1);
    const int q_end = params.columns.outputs_before(w + 1);
    Acc acc = Acc(0);
    for (int p = params.rows.outputs_before(h - 1); p < p_end; ++p) {
      const Sample<Acc, int> y = params.rows.sample(p);
      Acc row = Acc(0);
      for (int q = q_begin; q < q_end; ++q) {
        const Sample<Acc, int> x = params.columns.sample(q);
        const PixelFactors<Acc> factors = pixel_factors<SMOOTH>(params, n, p, q);
        const Acc lse = params.lse[(n * params.rows.outputs + p) * params.columns.outputs + q];
        const Acc score = load_score(plane, params.strides.h, params.strides.w, y, x);
        Acc grad = exponential(score - lse);
        if (factors.label == c) grad -= factors.ratio;
        if constexpr (SMOOTH) grad = multiply_add(-weight, factors.spread, grad);
        row = multiply_add(weight_of(x, w), grad * factors.scale, row);
      }
      acc = multiply_add(weight_of(y, h), row, acc);
    }
    const Strides4& strides = params.gradient_strides;
    params.gradient[n * strides.n + c * strides.c + h * strides.h + w * strides.w] = acc;
  }
}

}  // namespace head
}  // namespace fastseg
