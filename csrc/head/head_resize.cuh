// Bilinear resize of [N, C, H, W] to [N, C, P, Q], and its gradient.
//
//   y[n, c, p, q] = (1 - b) * ((1 - a) * x[h, w]  + a * x[h, w'])       h, h', b: sample of row p
//                 +      b  * ((1 - a) * x[h', w] + a * x[h', w'])      w, w', a: of column q
//
// Forward writes each output once, which is what limits it: the input is smaller and stays in L1
// and L2. Channels-last: a thread owns VEC channels (up to 16 bytes) of kColumns output pixels side
// by side and keeps the two input columns it stands between, mixed along the rows, in registers:
// scaling up fourfold it loads one input pair for four outputs. Channels-first: a thread owns 16
// bytes of the output as it lies in memory, wherever rows and planes end in it, so that stores are
// full for every Q.
//
// Backward gathers. Outputs between two neighbouring input pixels form a cell; a thread owns VEC
// channels of COLUMNS input columns and walks down the output rows that its kRows input rows see:
//
//        w-1    w     w+1    w+2
//         | cell | cell | cell |      The outputs of a cell add to the columns on its both sides
//     ----+------o------o------+---   in `row`; at the end of an output row that goes into the
//         | .. .. .. .. .. .. .|      sums of the input rows above (`current`) and below (`next`).
//     ----+------o------o------+---   Where the walk enters the next row of cells, `current` is
//         | .. .. .. .. .. .. .|      finished and stored, and `next` takes its place.
//
// Every output is read by (COLUMNS + 1) / COLUMNS x (kRows + 1) / kRows threads, mostly from L1 and
// L2, and memory is what limits. The order of a sum depends on neither COLUMNS nor kRows.
// Channels-first has no such walk: there a thread owns one input pixel and visits its outputs,
// neighbouring threads neighbouring columns. Every output is read four times, from L1, and about 24
// instructions an output limit it.
#pragma once

#include "csrc/head/head.cuh"

namespace fastseg {
namespace head {

// ---- Forward ----

struct ResizeTraits {
  static constexpr int kThreads = 256;
  static constexpr int kColumns = 4;  // output pixels of a thread, channels-last
};

template <typename Acc>
struct ResizeForwardParams {
  KernelAxis<Acc> rows, columns;
  const void* input;  // [N, C, H, W]
  Strides4 input_strides;
  void* output;         // [N, P, Q, C] or [N, C, P, Q], contiguous
  int64_t items;        // of all threads
  int64_t elements;     // of the output
  Divider C, P, Q;      // channels-first: Q is that of the output
  Divider vectors;      // channels-last: of channels
  Divider column_sets;  // channels-last: of kColumns pixels
};

template <typename T, int VEC, bool WIDE>
__global__ void __launch_bounds__(ResizeTraits::kThreads, 4)
    resize_forward_nhwc(const __grid_constant__ ResizeForwardParams<Accumulator<T>> params) {
  using Acc = Accumulator<T>;
  constexpr int kColumns = ResizeTraits::kColumns;
  const int64_t item = block_id_x() * ResizeTraits::kThreads + thread_id_x();
  if (item >= params.items) return;
  Item<WIDE> rest = static_cast<Item<WIDE>>(item);
  const int c = split<WIDE>(params.vectors, rest) * VEC;
  const int q0 = split<WIDE>(params.column_sets, rest) * kColumns;
  const int p = split<WIDE>(params.P, rest);
  const int64_t n = rest;

  const Sample<Acc, int> y = params.rows.sample(p);
  const Strides4& strides = params.input_strides;
  const T* const image = static_cast<const T*>(params.input) + n * strides.n + c;  // [H, W, VEC]
  const T* const upper = image + y.first * strides.h;
  const T* const lower = image + y.second * strides.h;
  const auto load_column = [&](int w, Acc(&column)[VEC]) {
    Acc above[VEC], below[VEC];
    widen(load_pack<T, VEC>(upper + w * strides.w), above);
    widen(load_pack<T, VEC>(lower + w * strides.w), below);
#pragma unroll
    for (int v = 0; v < VEC; ++v) column[v] = interpolate(above[v], below[v], y.share);
  };

  const int Q = params.columns.outputs;
  T* target = static_cast<T*>(params.output) +
              ((n * params.P.divisor + p) * Q + q0) * params.C.divisor + c;  // [kColumns, C]
  Acc left[VEC] = {}, right[VEC] = {};
  int loaded = -1;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    if (q0 + i >= Q) break;
    const Sample<Acc, int> x = params.columns.sample(q0 + i);
    if (x.first != loaded) {
      if (i > 0 && x.first == loaded + 1) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) left[v] = right[v];
      } else {
        load_column(x.first, left);
      }
      load_column(x.second, right);
      loaded = x.first;
    }
    Acc acc[VEC];
#pragma unroll
    for (int v = 0; v < VEC; ++v) acc[v] = interpolate(left[v], right[v], x.share);
    store_pack<T, VEC>(target, narrow<T, VEC>(acc));
    target += params.C.divisor;
  }
}

// `VEC` elements of the output side by side; the last thread may have fewer.
template <typename T, int VEC, bool WIDE>
__global__ void __launch_bounds__(ResizeTraits::kThreads, 4)
    resize_forward_nchw(const __grid_constant__ ResizeForwardParams<Accumulator<T>> params) {
  using Acc = Accumulator<T>;
  const int64_t item = block_id_x() * ResizeTraits::kThreads + thread_id_x();
  if (item >= params.items) return;
  const int64_t element = item * VEC;
  Item<WIDE> plane = static_cast<Item<WIDE>>(element);
  int q = split<WIDE>(params.Q, plane);
  int p = split<WIDE>(params.P, plane);

  const Strides4& strides = params.input_strides;
  const T *upper = nullptr, *lower = nullptr;  // [W]
  Sample<Acc, int> y{};
  int loaded = -1;
  const auto enter_row = [&] {
    Item<WIDE> n = plane;
    const int c = split<WIDE>(params.C, n);
    y = params.rows.sample(p);
    const T* const image = static_cast<const T*>(params.input) + n * strides.n + c * strides.c;
    upper = image + y.first * strides.h;
    lower = image + y.second * strides.h;
    loaded = -1;
  };
  const auto load_column = [&](int w) {
    return interpolate(widen(__ldg(upper + w * strides.w)), widen(__ldg(lower + w * strides.w)),
                       y.share);
  };
  enter_row();

  const int count = static_cast<int>(min(params.elements - element, int64_t{VEC}));
  Acc left = Acc(0), right = Acc(0), acc[VEC];
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    acc[v] = Acc(0);
    if (v >= count) continue;
    if (q == params.Q.divisor) {
      q = 0;
      if (++p == params.P.divisor) p = 0, ++plane;
      enter_row();
    }
    const Sample<Acc, int> x = params.columns.sample(q);
    if (x.first != loaded) {
      left = loaded >= 0 && x.first == loaded + 1 ? right : load_column(x.first);
      right = load_column(x.second);
      loaded = x.first;
    }
    acc[v] = interpolate(left, right, x.share);
    ++q;
  }

  T* const target = static_cast<T*>(params.output) + element;  // [VEC]
  if (count == VEC) {
    store_pack<T, VEC>(target, narrow<T, VEC>(acc));
  } else {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      if (v < count) target[v] = narrow<T>(acc[v]);
    }
  }
}

// ---- Backward ----

template <typename T, int VEC>
struct ResizeBackwardTraits {
  using Acc = Accumulator<T>;

  static constexpr int kThreads = 128;
  static constexpr int kMaxRows = 16;
  // As many columns as their sums fit into registers: 3 * COLUMNS + 1 of VEC accumulators.
  static constexpr int kColumns = VEC * sizeof(Acc) >= 32 ? 2 : VEC * sizeof(Acc) >= 16 ? 4 : 8;
  static constexpr int kSumRegisters = (3 * kColumns + 1) * VEC * static_cast<int>(sizeof(Acc)) / 4;
  static_assert(kSumRegisters <= 64);
};

template <typename Acc>
struct ResizeBackwardParams {
  KernelAxis<Acc> rows, columns;
  const void* grad_output;  // [N, C, P, Q]
  Strides4 grad_output_strides;
  void* grad_input;  // [N, C, H, W]
  Strides4 grad_input_strides;
  int64_t items;                           // of all threads
  int rows_per_item;                       // walks only
  Divider vectors, column_sets, row_sets;  // walks only
  Divider C, H, W;                         // gathering only
  bool channels_last;                      // gathering only: the order of threads
};

template <typename T, int VEC, bool WIDE>
__global__ void __launch_bounds__(ResizeBackwardTraits<T, VEC>::kThreads, 4)
    resize_backward_walk(const __grid_constant__ ResizeBackwardParams<Accumulator<T>> params) {
  using Traits = ResizeBackwardTraits<T, VEC>;
  using Acc = typename Traits::Acc;
  constexpr int kColumns = Traits::kColumns;
  const int64_t item = block_id_x() * Traits::kThreads + thread_id_x();
  if (item >= params.items) return;
  Item<WIDE> rest = static_cast<Item<WIDE>>(item);
  const int c = split<WIDE>(params.vectors, rest) * VEC;
  const int w0 = split<WIDE>(params.column_sets, rest) * kColumns;
  const int h0 = split<WIDE>(params.row_sets, rest) * params.rows_per_item;
  const int64_t n = rest;

  const KernelAxis<Acc>&rows = params.rows, &columns = params.columns;
  const int H = rows.inputs, W = columns.inputs;
  const int h1 = min(h0 + params.rows_per_item, H);
  const Strides4& strides = params.grad_output_strides;
  const T* const source =
      static_cast<const T*>(params.grad_output) + n * strides.n + c;  // [P, Q, VEC]
  const Strides4& target_strides = params.grad_input_strides;
  T* const target = static_cast<T*>(params.grad_input) + n * target_strides.n +
                    w0 * target_strides.w + c;  // [H, kColumns, VEC]

  int cells[kColumns + 2];  // where the cells w0 - 1, w0, ... begin
#pragma unroll
  for (int j = 0; j < kColumns + 2; ++j) cells[j] = columns.outputs_before(w0 - 1 + j);

  Acc current[kColumns][VEC] = {}, next[kColumns][VEC] = {};
  const auto store = [&](int h) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (w0 + j >= W) break;
      store_pack<T, VEC>(target + h * target_strides.h + j * target_strides.w,
                         narrow<T, VEC>(current[j]));
    }
  };
  const auto advance = [&] {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) current[j][v] = next[j][v], next[j][v] = Acc(0);
    }
  };

  int h = h0 - 1;
  const int p_end = rows.outputs_before(h1);
  for (int p = rows.outputs_before(h0 - 1); p < p_end; ++p) {
    const Sample<Acc, int> y = rows.sample(p);
    for (; h < y.first; ++h) {
      if (h >= h0) store(h);
      advance();
    }
    const T* const line = source + p * strides.h;  // [Q, VEC]
    Acc row[kColumns + 1][VEC] = {};
#pragma unroll
    for (int j = 0; j <= kColumns; ++j) {  // cell w0 - 1 + j
      for (int q = cells[j]; q < cells[j + 1]; ++q) {
        const Acc share = columns.sample(q).share;
        Acc grad[VEC];
        widen(load_pack<T, VEC>(line + q * strides.w), grad);
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          if (j > 0) row[j - 1][v] = multiply_add(Acc(1) - share, grad[v], row[j - 1][v]);
          row[j][v] = multiply_add(share, grad[v], row[j][v]);
        }
      }
    }
    if (w0 + kColumns >= W) {  // right of the last column there is only itself
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (w0 + j != W - 1) continue;
#pragma unroll
        for (int v = 0; v < VEC; ++v) row[j][v] += row[j + 1][v];
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        current[j][v] = multiply_add(Acc(1) - y.share, row[j][v], current[j][v]);
        next[j][v] = multiply_add(y.share, row[j][v], next[j][v]);
      }
    }
  }
  for (; h < h1; ++h) {
    if (h == H - 1) {  // below the last row there is only itself
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) current[j][v] += next[j][v];
      }
    }
    if (h >= h0) store(h);
    advance();
  }
}

template <typename T, bool WIDE>
__global__ void __launch_bounds__(kDirectThreads, 2)
    resize_backward_gather(const __grid_constant__ ResizeBackwardParams<Accumulator<T>> params) {
  using Acc = Accumulator<T>;
  const int64_t item = block_id_x() * kDirectThreads + thread_id_x();
  if (item >= params.items) return;
  Item<WIDE> rest = static_cast<Item<WIDE>>(item);
  int c = params.channels_last ? split<WIDE>(params.C, rest) : 0;
  const int w = split<WIDE>(params.W, rest);
  const int h = split<WIDE>(params.H, rest);
  if (!params.channels_last) c = split<WIDE>(params.C, rest);
  const int64_t n = rest;

  const Strides4& strides = params.grad_output_strides;
  const T* const plane =
      static_cast<const T*>(params.grad_output) + n * strides.n + c * strides.c;  // [P, Q]
  const int p_end = params.rows.outputs_before(h + 1);
  const int q_begin = params.columns.outputs_before(w - 1);
  const int q_end = params.columns.outputs_before(w + 1);
  const int p_begin = params.rows.outputs_before(h - 1);
  constexpr int kColumns = 4;  // whose weights wait in registers for all rows
  Acc acc = Acc(0);
  for (int q = q_begin; q < q_end; q += kColumns) {
    Acc weights[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) weights[i] = weight_of(params.columns.sample(q + i), w);
    for (int p = p_begin; p < p_end; ++p) {
      const T* const line = plane + p * strides.h + q * strides.w;  // [kColumns]
      Acc row = Acc(0);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (q + i < q_end) {
          row = multiply_add(weights[i], widen(__ldg(line + i * strides.w)), row);
        }
      }
      acc = multiply_add(weight_of(params.rows.sample(p), h), row, acc);
    }
  }
  const Strides4& target = params.grad_input_strides;
  static_cast<T*>(params.grad_input)[n * target.n + c * target.c + h * target.h + w * target.w] =
      narrow<T>(acc);
}

}  // namespace head
}  // namespace fastseg
