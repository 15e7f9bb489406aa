// Bilinear resize and its gradient, compiled once per instruction set: see csrc/common/simd.h.
//
//   y[p, q]      = (1 - t) * row[first][q] + t * row[second][q],  first, second, t = rows[p]
//   row[h][q]    = the input row h resized to Q columns
//   grad_x[h, w] = sum over q of tap[w, q] * (sum over p of tap[h, p] * grad_y[p, q])
//
// Forward: a task is a run of output rows of one plane (an image of one channel, or in
// channels-last memory a block of columns with all channels). Each input row is resized along the
// row once and kept, in the first-level cache, for the next three to eight output rows, which are
// then sums of two arrays: y is written once, past the caches where it would only flush them, and
// that is the time it takes. In channels-last memory four input pixels are mixed directly where
// rows would not be used again, or where y is fresh pages and their coming flushes what was kept.
//
// Backward: a gradient row is gathered by whoever owns it, so that no two threads add to one place
// and the order of every sum is fixed. grad_y is read twice, the second time from a cache.
//
//   channels-last   grad_y rows --sum_rows--> [Q][channels of a block] --> [w][channels]
//   NCHW, and few   `lanes` gradient rows at once: --sum_rows--> [lanes][Q] --transposed-->
//   channels        [Q][lanes] --> [w][lanes] --transposed--> [lanes][w]

#include "csrc/head/head_cpu_rows.h"

namespace fastseg {
namespace FASTSEG_SIMD {

using head_cpu::Resize;

// One pixel after the other, channels as vectors: row [w][channels], out [columns][channels].
template <class S, class A>
FASTSEG_NOINLINE void spread_pixels(const Sample<A>* samples, int64_t columns, const S* row,
                                    int64_t channels, A* out) {
  constexpr int64_t n = kLanes<A>;
  for (int64_t q = 0; q < columns; ++q, out += channels) {
    const S *first = row + samples[q].first * channels,
            *second = row + samples[q].second * channels;
    const Vector<A> b = broadcast(samples[q].share), a = A(1) - b;
    for (int64_t c = 0; c < channels; c += n) {
      if (c + n > channels) c = channels - n;  // some once more, rather than in part
      store(out + c, mix<Vector<A>>(load(first + c), load(second + c), a, b));
    }
  }
}

// The same between two rows at once: y [columns][channels].
template <class S, class A>
FASTSEG_NOINLINE void mix_pixels(const Sample<A>* samples, int64_t columns, const S* above,
                                 const S* below, A share, int64_t channels, S* y) {
  constexpr int64_t n = kLanes<A>;
  const Vector<A> t = broadcast(share), u = A(1) - t;
  for (int64_t q = 0; q < columns; ++q, y += channels) {
    const int64_t first = samples[q].first * channels, second = samples[q].second * channels;
    const Vector<A> b = broadcast(samples[q].share), a = A(1) - b;
    for (int64_t c = 0; c < channels; c += n) {
      if (c + n > channels) c = channels - n;  // some once more, rather than in part
      const Vector<A> up = mix<Vector<A>>(load(above + first + c), load(above + second + c), a, b);
      const Vector<A> low = mix<Vector<A>>(load(below + first + c), load(below + second + c), a, b);
      store(y + c, mix(up, low, u, t));
    }
  }
}

// y[length] between two rows, which may be read to the end of a vector.
template <class S, class A>
FASTSEG_NOINLINE void mix_rows(const A* above, const A* below, A share, int64_t length,
                               bool streams, S* y) {
  constexpr int64_t n = kLanes<A>;
  const Vector<A> b = broadcast(share), a = A(1) - b;
  int64_t i = 0;
#if FASTSEG_SIMD_BYTES == 64
  if constexpr (sizeof(S) == sizeof(A)) {
    if (streams) {
      const int64_t past = reinterpret_cast<uintptr_t>(y) / sizeof(S) % n;
      if (past > 0) {
        i = n - past < length ? n - past : length;
        store_first(y, mix(load(above), load(below), a, b), i);
      }
      for (; i + n <= length; i += n) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(y + i),
                            bit_cast<__m512i>(mix(load(above + i), load(below + i), a, b)));
      }
    }
  }
#endif
  for (; i + n <= length; i += n) store(y + i, mix(load(above + i), load(below + i), a, b));
  if (i == length) return;
  if (length >= n && !streams) {
    i = length - n;  // some once more, rather than in part
    return store(y + i, mix(load(above + i), load(below + i), a, b));
  }
  store_first(y + i, mix(load(above + i), load(below + i), a, b), length - i);
}

// Elements of a resized row of one plane, with room for whole vectors behind it.
template <class A>
inline int64_t resized_row(const Resize<A>& call) {
  const int64_t columns = call.blocks == 1 ? call.Q : call.block;
  return (columns * call.channels + 2 * kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

template <class A>
int64_t resize_scratch_bytes(const Resize<A>& call) {
  return 2 * resized_row(call) * static_cast<int64_t>(sizeof(A));
}

// Output rows [begin, end) of [images * blocks][P].
template <class S, class A>
void resize_rows(const Resize<A>& call, int64_t begin, int64_t end, char* scratch) {
  const S* x = static_cast<const S*>(call.source);
  S* y = static_cast<S*>(call.target);
  A* const rows = reinterpret_cast<A*>(scratch);
  const int64_t pitch = resized_row(call);
  const int64_t x_row = call.w * call.channels, y_row = call.Q * call.channels;
  int64_t held[2] = {-1, -1};  // the input rows, counted through all planes, in rows[0] and rows[1]
  int64_t plane = begin / call.P, p = begin % call.P;
  for (int64_t i = begin; i < end; ++i, ++p) {
    if (p == call.P) p = 0, ++plane;
    const int64_t image = plane / call.blocks, q = plane % call.blocks * call.block;
    const int64_t columns = call.Q - q < call.block ? call.Q - q : call.block;
    const Sample<A>& sample = call.rows[p];
    S* to = y + (image * call.P + p) * y_row + q * call.channels;
    if (call.direct) {
      const S* image_x = x + image * call.h * x_row;
      mix_pixels(call.columns + q, columns, image_x + sample.first * x_row,
                 image_x + sample.second * x_row, sample.share, call.channels, to);
      continue;
    }
    for (int64_t h = sample.first; h <= sample.second; ++h) {
      A* row = rows + h % 2 * pitch;
      if (held[h % 2] == plane * call.h + h) continue;
      held[h % 2] = plane * call.h + h;
      const S* from = x + (image * call.h + h) * x_row;
      if (call.spread.vectors > 0) {
        spread_row(call.spread, from, row);
      } else {
        spread_pixels(call.columns + q, columns, from, call.channels, row);
      }
    }
    mix_rows(rows + sample.first % 2 * pitch, rows + sample.second % 2 * pitch, sample.share,
             columns * call.channels, call.streams, to);
  }
#if FASTSEG_SIMD_BYTES == 64
  if (call.streams) _mm_sfence();
#endif
}

// A row of grad_y in whole vectors.
template <class A>
inline int64_t gradient_vectors(const Resize<A>& call) {
  return (call.Q * call.channels + kLanes<A> - 1) / kLanes<A>;
}

template <class A>
int64_t resize_backward_scratch_bytes(const Resize<A>& call) {
  const int64_t rows =
      call.blocks == 0 ? 2 * kLanes<A> * gradient_vectors(call) * kLanes<A> : call.Q * call.block;
  return rows * static_cast<int64_t>(sizeof(A));
}

// Groups [begin, end) of kLanes gradient rows each, of all [images][h].
template <class S, class A>
void resize_backward_lanes(const Resize<A>& call, int64_t begin, int64_t end, char* scratch) {
  constexpr int64_t n = kLanes<A>;
  const S* grad_y = static_cast<const S*>(call.source);
  S* grad_x = static_cast<S*>(call.target);
  const int64_t length = call.Q * call.channels, vectors = gradient_vectors(call);
  A* const sums = reinterpret_cast<A*>(scratch);  // [lanes][vectors * lanes]
  A* const columns = sums + n * vectors * n;      // [vectors * lanes][lanes]
  const int64_t x_row = call.w * call.channels;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t row = group * n, rest = call.images * call.h - row, live = rest < n ? rest : n;
    for (int64_t i = 0; i < live; ++i) {
      const int64_t image = (row + i) / call.h, h = (row + i) % call.h;
      sum_distant_rows(grad_y + (image * call.P + call.row_taps.begin[h]) * length, length,
                       call.row_taps.weight + call.row_taps.offset[h], call.row_taps.count[h],
                       length, sums + i * vectors * n);
    }
    rows_to_columns(sums, vectors * n, n, vectors, live, columns);
    columns_to_gradients(call.column_taps, call.w, call.channels, columns, live,
                         grad_x + row * x_row, x_row);
  }
}

// Tasks [begin, end) of [images][h][blocks]: a gradient row of a block of channels each, at least
// kLanes of them.
template <class S, class A>
void resize_backward_channels(const Resize<A>& call, int64_t begin, int64_t end, char* scratch) {
  const int64_t C = call.channels, y_row = call.Q * C;
  A* const sums = reinterpret_cast<A*>(scratch);  // [Q][channels of the block]
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / call.blocks, image = row / call.h, h = row % call.h;
    const int64_t c_begin = C * (task % call.blocks) / call.blocks;
    const int64_t channels = C * (task % call.blocks + 1) / call.blocks - c_begin;
    const S* from = static_cast<const S*>(call.source) +
                    (image * call.P + call.row_taps.begin[h]) * y_row + c_begin;
    const A* weight = call.row_taps.weight + call.row_taps.offset[h];
    const int64_t count = call.row_taps.count[h];
    S* to = static_cast<S*>(call.target) + row * call.w * C + c_begin;
    if (count == 0) {  // a row that a smaller image leaves out
      for (int64_t w = 0; w < (channels == C ? 1 : call.w); ++w) {
        std::memset(to + w * C, 0, (channels == C ? call.w * C : channels) * sizeof(S));
      }
      continue;
    }
    if (channels == C) {
      sum_distant_rows(from, y_row, weight, count, y_row, sums);
    } else {
      for (int64_t q = 0; q < call.Q; ++q) {
        sum_distant_rows(from + q * C, y_row, weight, count, channels, sums + q * channels);
      }
    }
    for (int64_t w = 0; w < call.w; ++w, to += C) {
      sum_rows(sums + call.column_taps.begin[w] * channels, channels,
               call.column_taps.weight + call.column_taps.offset[w], call.column_taps.count[w],
               channels, to);
    }
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
