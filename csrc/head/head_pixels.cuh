// What is wanted of each full-resolution pixel: the label of its largest score, or its loss.
//
//   s[c]    = bilinear interpolation of logits[n, c, h, w] at pixel (p, q)
//   label   = first c with the largest s[c], NaN being larger than any number
//   lse     = log(sum over c of exp(s[c])), and the loss follows from it (LossPixels)
//
// A thread owns pixels and goes through the classes, keeping of each pixel the largest score so far
// and the sum of exponentials relative to it. Nothing with classes is stored at full resolution:
// per pixel 8 bytes of target come in, 4 of lse or 8 of label go out.
//
// The tile. A block owns kTileRows x kColumns pixels, a thread kRows of one column. The low-
// resolution cells below them, a few classes at a time, are staged in shared memory as float, four
// classes side by side, whatever the layout of the logits:
//
//        q: 32 lanes                       cells[class / 4][row][column][4]
//      +--------------------+
//   p  | warp 0: kRows rows |   scaled up fourfold 32 x 32 pixels stand on 10 x 10 cells: every
//   cell
//      | warp 1             |   is read from memory once, converted once, and serves 10 pixels.
//      | ...                |   Eight lanes at a time read 16 bytes each from different banks or
//      +--------------------+   the same address.
//
// A thread loads four neighbours of four classes once for all of its rows between the same two
// input rows. All lanes of a warp have the same rows, so nothing diverges. Rows are mixed before
// columns, as everywhere: the gradient's kernel has to find the same scores, to the bit, or the
// difference of two huge ones would be nothing like their logarithm.
//
// What limits it. Per pixel and class: 6 instructions to interpolate, 1 for the maximum, 4 to
// subtract, scale, exponentiate and add, a quarter of 10 to rescale the sum and look for the last
// class, and 3 to load: about 17 issue slots of 128 a clock and multiprocessor, and 1.25
// exponentials of 16. At 16x150x128x128 -> 512x512 that is 0.37 ms of instructions beside 0.22 ms
// of exponentials on 132 multiprocessors at 1.7 GHz; the bytes, 79 MB of logits and 50 of targets
// and lse, take 0.04.
//
// Sums over pixels, for the loss: each block adds up its own in float64, and one block adds those,
// both in a fixed order. Scaling down, or in float64, a thread reads its neighbours from memory.
#pragma once

#include "csrc/head/head.cuh"

namespace fastseg {
namespace head {

// ---- Constants ----

struct TileTraits {
  static constexpr int kVec = 4;  // classes side by side in shared memory
  static constexpr int kColumns = 32;
  static constexpr int kRows = 4;  // of a thread
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileRows = kRows * kWarps;
  static constexpr int kMaxClasses = 32;  // staged at a time: one class a lane
  static constexpr int kWantedBytes = 16 << 10;
  static_assert(kColumns == 32, "a warp is a row of pixels");
  static_assert(kMaxClasses % kVec == 0);
  static_assert(kDefaultSharedBytes / (kVec * sizeof(float)) < 1 << 15,
                "cells are counted in 16 bits");
};

// Sums over pixels; `offender` is a target that is no class, or ignore_index.
struct PixelSums {
  double loss, weight;
  int64_t offender;
};

__device__ __forceinline__ PixelSums add(const PixelSums& a, const PixelSums& b, int64_t none) {
  const int64_t offender = a.offender == none   ? b.offender
                           : b.offender == none ? a.offender
                                                : max(a.offender, b.offender);
  return {a.loss + b.loss, a.weight + b.weight, offender};
}

// The sums of a whole block, in thread 0. `shared` has one place for each thread.
__device__ __forceinline__ PixelSums block_sums(PixelSums sums, PixelSums* shared, int threads,
                                                int64_t none) {
  const int thread = thread_id_x();
  for (int active = threads; active > 1;) {
    const int kept = (active + 1) / 2;
    if (thread >= kept && thread < active) shared[thread] = sums;
    __syncthreads();
    if (thread < active - kept) sums = add(sums, shared[thread + kept], none);
    active = kept;
  }
  return sums;
}

template <typename T>
struct PixelParams {
  using Acc = Accumulator<T>;

  int64_t N;
  int C;
  KernelAxis<Acc> rows, columns;
  const T* logits;  // [N, C, H, W]
  Strides4 strides;
  // Tiles only.
  Divider row_tiles, column_tiles;
  int classes_at_a_time;
  bool channels_last;
  // Argmax only.
  void* labels;  // [N, P, Q]
  bool byte_labels;
  // Loss only.
  LossTerms<T> terms;
  Acc* lse;            // [N, P, Q] or nullptr
  Acc* losses;         // [N, P, Q] or nullptr
  PixelSums* partial;  // [blocks]

  __device__ __forceinline__ int64_t pixel(int64_t n, int p, int q) const {
    return (n * rows.outputs + p) * columns.outputs + q;
  }
};

// ---- What becomes of the scores ----

// Each has a State of one pixel that is shown all classes in order, VEC at a time, and an end.

template <typename T>
struct ArgmaxPixels {
  using Acc = Accumulator<T>;
  static constexpr bool kSums = false, kWeights = false;
  static constexpr int kBlocks = 3;  // of tiles that a multiprocessor holds

  struct State {
    Acc best = minus_infinity<Acc>();
    int label = 0;

    template <int VEC>
    __device__ __forceinline__ void show(const Acc (&scores)[VEC], int c, const Acc (&)[VEC]) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const bool first_nan = scores[v] != scores[v] && best == best;
        if (scores[v] > best || first_nan) best = scores[v], label = c + v;
      }
    }
  };

  static __device__ __forceinline__ void finish(const PixelParams<T>& params, const State& state,
                                                int64_t n, int p, int q, PixelSums&) {
    const int64_t pixel = params.pixel(n, p, q);
    if (params.byte_labels) {
      static_cast<uint8_t*>(params.labels)[pixel] = static_cast<uint8_t>(state.label);
    } else {
      static_cast<int64_t*>(params.labels)[pixel] = state.label;
    }
  }
};

// loss = sum over c of wanted[c] * (lse - s[c])
//   with wanted[c] = (1 - smoothing) * weight[c] * (c == target) + smoothing * weight[c] / C
// Classes that count nothing are left out, whatever their score.
template <typename T, bool SMOOTH>
struct LossPixels {
  using Acc = Accumulator<T>;
  static constexpr bool kSums = true, kWeights = SMOOTH;
  static constexpr int kBlocks = SMOOTH ? 2 : 3;

  struct State {
    Acc largest = minus_infinity<Acc>();
    Acc sum = Acc(0);  // of exp(s - largest)
    // Smoothing: sum of weight[c] * (s[c] - base), where base is the largest of the first scores.
    Acc base = Acc(0), weighted = Acc(0);

    // With nothing but -inf so far, exp(-inf - shift) has to be zero.
    __device__ __forceinline__ Acc shift() const {
      return largest == minus_infinity<Acc>() ? Acc(0) : largest;
    }

    template <int VEC>
    __device__ __forceinline__ void show(const Acc (&scores)[VEC], int c,
                                         const Acc (&weights)[VEC]) {
      Acc top = scores[0];
#pragma unroll
      for (int v = 1; v < VEC; ++v) top = max(top, scores[v]);
      const Acc before = largest;
      largest = max(before, top);
      const Acc now = shift();
      Acc terms = exponential(scores[0] - now);
#pragma unroll
      for (int v = 1; v < VEC; ++v) terms += exponential(scores[v] - now);
      sum = multiply_add(sum, exponential(before - now), terms);
      if constexpr (SMOOTH) {
        if (c == 0) base = now;
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          if (weights[v] != Acc(0)) {
            weighted = multiply_add(weights[v], scores[v] - base, weighted);
          }
        }
      }
    }
  };

  static __device__ __forceinline__ void finish(const PixelParams<T>& params, const State& state,
                                                int64_t n, int p, int q, PixelSums& sums) {
    const LossTerms<T>& terms = params.terms;
    const int64_t pixel = params.pixel(n, p, q);
    const Acc log_sum = std::log(state.sum);
    if (params.lse != nullptr) params.lse[pixel] = state.largest + log_sum;

    const Target target = load_target(terms, n, p, q);
    Acc loss = Acc(0), weight = Acc(0);
    if (target.label == kNoClass) {
      loss = static_cast<Acc>(NAN);
      sums.offender =
          sums.offender == terms.ignore_index ? target.value : max(sums.offender, target.value);
    } else if (target.label != kIgnored) {
      weight = terms.weight_of_class(target.label);
      const Acc share = SMOOTH ? weight * (Acc(1) - terms.smoothing) : weight;
      if (share != Acc(0)) {
        const Acc score = load_score(
            params.logits + n * params.strides.n + target.label * params.strides.c,
            params.strides.h, params.strides.w, params.rows.sample(p), params.columns.sample(q));
        loss = share * (state.largest - score + log_sum);  // the difference first: it may cancel
      }
      if constexpr (SMOOTH) {
        const Acc all = terms.weights_of_all();
        if (all != Acc(0)) {
          const Acc spread = all * (state.largest - state.base + log_sum) - state.weighted;
          loss = multiply_add(terms.smoothing / static_cast<Acc>(params.C), spread, loss);
        }
      }
    }
    if (params.losses != nullptr) params.losses[pixel] = loss;
    sums.loss += static_cast<double>(loss);
    sums.weight += static_cast<double>(weight);
  }
};

// ---- Tiles ----

// A sample's pixels relative to the first cell of a tile.
template <typename Acc>
__device__ __forceinline__ Sample<Acc, int> relative(Sample<Acc, int> sample, int origin) {
  return {sample.first - origin, sample.second - origin, sample.share};
}

// Stages the tile of `classes` planes from `source` [classes, rows, columns] on. Every thread of
// the block has to call this.
template <typename T>
__device__ __forceinline__ void stage_cells(const PixelParams<T>& params, const T* source,
                                            int classes, int rows, int columns, int group_stride,
                                            Accumulator<T>* cells) {
  using Traits = TileTraits;
  constexpr int kVec = Traits::kVec;
  const Strides4& strides = params.strides;
  const int lane = lane_id(), warp = warp_id();
  if (params.channels_last) {  // a warp copies the classes of one cell
    int row = 0, column = warp;
    const auto carry = [&] {
      while (column >= columns) column -= columns, ++row;
    };
    for (carry(); row < rows; column += Traits::kWarps, carry()) {
      if (lane < classes) {
        cells[(lane / kVec * group_stride + row * columns + column) * kVec + lane % kVec] =
            widen(source[lane * strides.c + row * strides.h + column * strides.w]);
      }
    }
  } else {  // a warp copies 32 cells of one class
    for (int cell = lane; cell < rows * columns; cell += 32) {
      const int row = cell / columns, column = cell - row * columns;
      const T* const place = source + row * strides.h + column * strides.w;
#pragma unroll 2
      for (int c = warp; c < classes; c += Traits::kWarps) {
        cells[(c / kVec * group_stride + cell) * kVec + c % kVec] = widen(place[c * strides.c]);
      }
    }
  }
}

// The scores of kVec classes in two neighbouring cells.
template <typename Acc>
struct CellPair {
  Acc left[TileTraits::kVec], right[TileTraits::kVec];
};

// `row` is staged [columns][kVec].
template <typename Acc>
__device__ __forceinline__ CellPair<Acc> load_pair(const Acc* row, const Sample<Acc, int>& column) {
  const float4 a = *reinterpret_cast<const float4*>(row + column.first * TileTraits::kVec);
  const float4 b = *reinterpret_cast<const float4*>(row + column.second * TileTraits::kVec);
  return {{a.x, a.y, a.z, a.w}, {b.x, b.y, b.z, b.w}};
}

template <typename T, typename Pixels>
__global__ void __launch_bounds__(TileTraits::kThreads, Pixels::kBlocks)
    head_pixels_tile(const __grid_constant__ PixelParams<T> params) {
  using Traits = TileTraits;
  using Acc = Accumulator<T>;
  constexpr int kVec = Traits::kVec, kRows = Traits::kRows;
  static_assert(std::is_same_v<Acc, float>, "cells are read as float4");

  FASTSEG_DYNAMIC_SHARED(shared);
  Acc* const cells = reinterpret_cast<Acc*>(shared);  // [classes / 4][rows][columns][4]
  int block = static_cast<int>(block_id_x());
  const int column_tile = split<false>(params.column_tiles, block);
  const int row_tile = split<false>(params.row_tiles, block);
  const int64_t n = block;
  const int P = params.rows.outputs, Q = params.columns.outputs;

  // The tile's pixels, and the cells below them.
  const int p_tile = row_tile * Traits::kTileRows, q_tile = column_tile * Traits::kColumns;
  const int p0 = p_tile + warp_id() * kRows, q = q_tile + lane_id();
  const int h0 = params.rows.first(p_tile), w0 = params.columns.first(q_tile);
  const int rows = params.rows.sample(min(p_tile + Traits::kTileRows, P) - 1).second - h0 + 1;
  const int columns = params.columns.sample(min(q_tile + Traits::kColumns, Q) - 1).second - w0 + 1;
  const int group_stride = rows * columns | 1;  // odd: eight groups are stored to different banks
  const T* const source = params.logits + n * params.strides.n + h0 * params.strides.h +
                          w0 * params.strides.w;  // [C, rows, columns]

  // Pixels beyond the image repeat its last ones, and are not finished.
  const Sample<Acc, int> column = relative(params.columns.sample(min(q, Q - 1)), w0);
  int between[kRows];  // the first cells of the rows above and below, 16 bits each
  Acc share[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const Sample<Acc, int> row = relative(params.rows.sample(min(p0 + r, P - 1)), h0);
    between[r] = row.first * columns | row.second * columns << 16;
    share[r] = row.share;
  }

  typename Pixels::State states[kRows];
  for (int chunk = 0; chunk < params.C; chunk += params.classes_at_a_time) {
    const int classes = min(params.classes_at_a_time, params.C - chunk);
    if (chunk > 0) __syncthreads();  // the cells before have been read
    stage_cells(params, source + chunk * params.strides.c, classes, rows, columns, group_stride,
                cells);
    __syncthreads();
    for (int c = 0; c < classes; c += kVec) {
      const Acc* const group = cells + c * group_stride;  // [rows, columns, 4]
      Acc weights[kVec] = {};
      if constexpr (Pixels::kWeights) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          if (c + v < classes) weights[v] = params.terms.weight_of_class(chunk + c + v);
        }
      }
      CellPair<Acc> upper, lower;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r == 0 || between[r] != between[r - 1]) {
          const bool further = r > 0 && (between[r] & 0xffff) == between[r - 1] >> 16;
          upper = further ? lower : load_pair(group + (between[r] & 0xffff) * kVec, column);
          lower = load_pair(group + (between[r] >> 16) * kVec, column);
        }
        Acc scores[kVec];
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          scores[v] =
              interpolate(interpolate(upper.left[v], lower.left[v], share[r]),
                          interpolate(upper.right[v], lower.right[v], share[r]), column.share);
        }
        if (c + kVec > classes) {  // no class: smaller than all, and what was read is nobody's
#pragma unroll
          for (int v = 1; v < kVec; ++v) {
            if (c + v >= classes) scores[v] = minus_infinity<Acc>();
          }
        }
        states[r].show(scores, chunk + c, weights);
      }
    }
  }

  PixelSums sums{0.0, 0.0, params.terms.ignore_index};
  const int height = q < Q ? min(kRows, P - p0) : 0;
#pragma unroll 1  // four at once would take more registers than the loop above
  for (int r = 0; r < height; ++r) {
    Pixels::finish(params, states[0], n, p0 + r, q, sums);
#pragma unroll
    for (int i = 1; i < kRows; ++i) states[i - 1] = states[i];
  }
  if constexpr (Pixels::kSums) {
    FASTSEG_SHARED(PixelSums, places, [Traits::kThreads]);
    sums = block_sums(sums, places, Traits::kThreads, params.terms.ignore_index);
    if (thread_id_x() == 0) params.partial[block_id_x()] = sums;
  }
}

// ---- One pixel at a time ----

template <typename T, typename Pixels>
__global__ void __launch_bounds__(kDirectThreads, 2)
    head_pixels_direct(const __grid_constant__ PixelParams<T> params) {
  using Acc = Accumulator<T>;
  const int P = params.rows.outputs, Q = params.columns.outputs;
  const int64_t pixels = params.N * P * Q;
  PixelSums sums{0.0, 0.0, params.terms.ignore_index};
  for (int64_t pixel = block_id_x() * kDirectThreads + thread_id_x(); pixel < pixels;
       pixel += grid_size_x() * kDirectThreads) {
    const int64_t line = pixel / Q, n = line / P;
    const int q = static_cast<int>(pixel - line * Q), p = static_cast<int>(line - n * P);
    const Sample<Acc, int> row = params.rows.sample(p), column = params.columns.sample(q);
    typename Pixels::State state;
    const T* plane = params.logits + n * params.strides.n;  // [H, W]
    for (int c = 0; c < params.C; ++c, plane += params.strides.c) {
      const Acc scores[1] = {load_score(plane, params.strides.h, params.strides.w, row, column)};
      Acc weights[1] = {};
      if constexpr (Pixels::kWeights) weights[0] = params.terms.weight_of_class(c);
      state.show(scores, c, weights);
    }
    Pixels::finish(params, state, n, p, q, sums);
  }
  if constexpr (Pixels::kSums) {
    FASTSEG_SHARED(PixelSums, places, [kDirectThreads]);
    sums = block_sums(sums, places, kDirectThreads, params.terms.ignore_index);
    if (thread_id_x() == 0) params.partial[block_id_x()] = sums;
  }
}

// ---- Sums ----

template <typename Acc>
struct LossSumParams {
  const PixelSums* partial;  // [blocks]
  int64_t blocks;
  int64_t ignore_index;
  bool mean;
  Acc* loss;  // or nullptr
  Acc* total_weight;
  int64_t* offender;
};

// One block.
template <typename Acc>
__global__ void __launch_bounds__(kDirectThreads, 2)
    head_loss_sum(const __grid_constant__ LossSumParams<Acc> params) {
  PixelSums sums{0.0, 0.0, params.ignore_index};
  for (int64_t i = thread_id_x(); i < params.blocks; i += kDirectThreads) {
    sums = add(sums, params.partial[i], params.ignore_index);
  }
  FASTSEG_SHARED(PixelSums, places, [kDirectThreads]);
  sums = block_sums(sums, places, kDirectThreads, params.ignore_index);
  if (thread_id_x() != 0) return;
  if (params.loss != nullptr) {
    *params.loss = static_cast<Acc>(params.mean ? sums.loss / sums.weight : sums.loss);
  }
  *params.total_weight = static_cast<Acc>(sums.weight);
  *params.offender = sums.offender;
}

// The sum of all class weights, by one block.
template <typename T>
__global__ void __launch_bounds__(kDirectThreads, 2)
    head_weight_sum(const T* weight, int64_t classes, Accumulator<T>* sum) {
  PixelSums sums{0.0, 0.0, 0};
  for (int64_t c = thread_id_x(); c < classes; c += kDirectThreads) {
    sums.weight += static_cast<double>(widen(weight[c]));
  }
  FASTSEG_SHARED(PixelSums, places, [kDirectThreads]);
  sums = block_sums(sums, places, kDirectThreads, 0);
  if (thread_id_x() == 0) *sum = static_cast<Accumulator<T>>(sums.weight);
}

}  // namespace head
}  // namespace fastseg
