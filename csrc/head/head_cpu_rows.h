// What the head's kernels do with one row: put it together from an input row, take it apart into
// the input row's gradient. Compiled once per instruction set, see csrc/common/simd.h.
//
// Along a row the vector axis is the row: the inputs of a vector of outputs lie so close together
// that one or two loads fetch them, and a permutation gives each lane its two. The way back adds up
// neighbouring outputs, which lie in neighbouring lanes: rows are transposed first, so that lanes
// are rows and neighbours are vectors.

#include "csrc/common/simd.h"
#include "csrc/head/head_cpu_plan.h"

namespace fastseg {
namespace FASTSEG_SIMD {

using head_cpu::Index;
using head_cpu::Spread;
using head_cpu::Taps;

// All that is not finite in a or b arrives, whatever the weights.
template <class V>
FASTSEG_INLINE V mix(V a, V b, V share_a, V share_b) {
  return a * share_a + b * share_b;
}

template <class T>
FASTSEG_INLINE Vector<T> pick(Vector<T> v, Vector<Index<T>> lanes) {
#if defined(__clang__)
  Vector<T> picked;
  for (int64_t i = 0; i < kLanes<T>; ++i) picked[i] = v[lanes[i]];
  return picked;
#else
  return __builtin_shuffle(v, lanes);
#endif
}

template <class T>
FASTSEG_INLINE Vector<T> pick(Vector<T> low, Vector<T> high, Vector<Index<T>> lanes) {
#if defined(__clang__)
  Vector<T> picked;
  for (int64_t i = 0; i < kLanes<T>; ++i) {
    picked[i] = lanes[i] < kLanes<T> ? low[lanes[i]] : high[lanes[i] - kLanes<T>];
  }
  return picked;
#else
  return __builtin_shuffle(low, high, lanes);
#endif
}

template <class T>
FASTSEG_INLINE Vector<Index<T>> load_index(const Index<T>* p) {
  Vector<Index<T>> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Vector v of the outputs. kSources is spread.sources; kShort: the row is shorter than as many
// vectors, and nothing behind it may be read.
template <int kSources, bool kShort, class S, class A>
FASTSEG_INLINE Vector<A> spread_vector(const Spread<A>& spread, int64_t v, const S* row) {
  constexpr int64_t n = kLanes<A>;
  const Vector<A> share = load(spread.share + v * n);
  const S* from = row + spread.base[v];
  Vector<A> first, second;
  if constexpr (kSources == 0) {
    const Index<A>*at = spread.first + v * n, *next = spread.second + v * n;
    FASTSEG_UNROLL for (int64_t i = 0; i < n; ++i) {
      first[i] = widen(from[at[i]]);
      second[i] = widen(from[next[i]]);
    }
  } else {
    const Vector<Index<A>> at = load_index<A>(spread.first + v * n);
    const Vector<Index<A>> next = load_index<A>(spread.second + v * n);
    if constexpr (kSources == 1) {
      const Vector<A> low = kShort ? load_first(from, spread.inputs) : load(from);
      first = pick<A>(low, at), second = pick<A>(low, next);
    } else {
      const Vector<A> low = load(from);
      const Vector<A> high = kShort ? load_first(from + n, spread.inputs - n) : load(from + n);
      first = pick<A>(low, high, at), second = pick<A>(low, high, next);
    }
  }
  return mix(first, second, A(1) - share, share);
}

template <int kSources, bool kShort, class S, class A>
FASTSEG_NOINLINE void spread_row_of(const Spread<A>& spread, const S* row, A* out) {
  for (int64_t v = 0; v < spread.vectors; ++v) {
    store(out + v * kLanes<A>, spread_vector<kSources, kShort>(spread, v, row));
  }
}

// All outputs of a row [inputs]; `out` has room for whole vectors.
template <class S, class A>
FASTSEG_INLINE void spread_row(const Spread<A>& spread, const S* row, A* out) {
  if (spread.sources == 0) return spread_row_of<0, false>(spread, row, out);
  const bool is_short = spread.inputs < spread.sources * kLanes<A>;
  if (spread.sources == 1) {
    return is_short ? spread_row_of<1, true>(spread, row, out)
                    : spread_row_of<1, false>(spread, row, out);
  }
  is_short ? spread_row_of<2, true>(spread, row, out) : spread_row_of<2, false>(spread, row, out);
}

// to[i] = the sum over k of weight[k] * from[k * stride + i], and what it was if kAdds.
template <bool kAdds = false, class S, class A, class Target>
FASTSEG_NOINLINE void sum_rows(const S* from, int64_t stride, const A* weight, int64_t count,
                               int64_t length, Target* to) {
  constexpr int64_t n = kLanes<A>;
  constexpr int kWide = 4;
  int64_t i = 0;
  for (; i + kWide * n <= length; i += kWide * n) {
    Vector<A> acc[kWide] = {};
    if constexpr (kAdds) {
      FASTSEG_UNROLL for (int j = 0; j < kWide; ++j) acc[j] = load(to + i + j * n);
    }
    const S* at = from + i;
    for (int64_t k = 0; k < count; ++k, at += stride) {
      FASTSEG_UNROLL for (int j = 0; j < kWide; ++j) acc[j] += load(at + j * n) * weight[k];
    }
    FASTSEG_UNROLL for (int j = 0; j < kWide; ++j) store(to + i + j * n, acc[j]);
  }
  for (; i < length; i += n) {
    const int64_t live = length - i < n ? length - i : n;
    // Some once more rather than in part, where that does not add them twice.
    const bool whole = live == n || (!kAdds && length >= n);
    const int64_t first = whole && live < n ? length - n : i;
    Vector<A> acc{};
    if (kAdds) acc = whole ? load(to + first) : load_first(to + first, live);
    const S* at = from + first;
    for (int64_t k = 0; k < count; ++k, at += stride) {
      acc += (whole ? load(at) : load_first(at, live)) * weight[k];
    }
    whole ? store(to + first, acc) : store_first(to + first, acc, live);
  }
}

// The same for rows in memory, a few at a time: more than that the hardware does not prefetch.
template <class S, class A>
FASTSEG_INLINE void sum_distant_rows(const S* from, int64_t stride, const A* weight, int64_t count,
                                     int64_t length, A* to) {
  constexpr int64_t kStreams = 8, kMost = kStreams + kStreams / 2;
  int64_t k = count <= kMost ? count : kStreams;
  sum_rows(from, stride, weight, k, length, to);
  for (; k < count; k += kStreams) {
    const int64_t next = count - k < kStreams ? count - k : kStreams;
    sum_rows<true>(from + k * stride, stride, weight + k, next, length, to);
  }
}

// Vectors of kLanes rows, vector v of row i at rows[i * row_stride + v * vector_stride], become
// columns [vectors * lanes][lanes]. Rows past the live ones are zero.
template <class A>
FASTSEG_NOINLINE void rows_to_columns(const A* rows, int64_t row_stride, int64_t vector_stride,
                                      int64_t vectors, int64_t live, A* columns) {
  constexpr int64_t n = kLanes<A>;
  for (int64_t v = 0; v < vectors; ++v) {
    Vector<A> block[n];
    for (int64_t i = 0; i < n; ++i) {
      block[i] = i < live ? load(rows + i * row_stride + v * vector_stride) : Vector<A>{};
    }
    transpose<A>(block);
    for (int64_t i = 0; i < n; ++i) store(columns + (v * n + i) * n, block[i]);
  }
}

// What element c of input pixel i is owed by the columns [pixels][inner][lanes].
template <class A>
FASTSEG_INLINE Vector<A> sum_columns(const Taps<A>& taps, int64_t i, const A* columns,
                                     int64_t inner, int64_t c) {
  constexpr int64_t n = kLanes<A>;
  const A* weight = taps.weight + taps.offset[i];
  const A* column = columns + (taps.begin[i] * inner + c) * n;
  Vector<A> acc{};
  for (int64_t k = 0; k < taps.count[i]; ++k) acc += load(column + k * inner * n) * weight[k];
  return acc;
}

// The gradients of `live` input rows [pixels * inner], each `stride` behind the one before.
template <class S, class A>
FASTSEG_NOINLINE void columns_to_gradients(const Taps<A>& taps, int64_t pixels, int64_t inner,
                                           const A* columns, int64_t live, S* out, int64_t stride) {
  constexpr int64_t n = kLanes<A>;
  const int64_t length = pixels * inner;
  int64_t pixel = 0, c = 0;
  for (int64_t i = 0; i < length; i += n) {
    const int64_t count = length - i < n ? length - i : n;
    Vector<A> block[n];
    for (int64_t j = 0; j < n; ++j) {
      block[j] = j < count ? sum_columns(taps, pixel, columns, inner, c) : Vector<A>{};
      if (++c == inner) c = 0, ++pixel;
    }
    transpose<A>(block);
    for (int64_t j = 0; j < live; ++j) {
      S* at = out + j * stride + i;
      if (count == n) {
        store(at, block[j]);
      } else {
        store_first(at, block[j], count);
      }
    }
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
