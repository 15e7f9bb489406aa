// Labels of upsampled logits, and how tiles of them come about: what the loss begins with as well.
// Compiled once per instruction set, see csrc/common/simd.h.
//
//   s[c]  = (1 - t) * above[c] + t * below[c]      of one pixel of the output
//   label = the first c with the largest s[c]
//
// Pixels are the vector axis, so that nothing is ever reduced across lanes and two classes are as
// fast as two hundred. The unit of work is a tile, the kRows output rows between two input rows
// times one vector of columns:
//
//      logits row h    --pack_row-->  [C][w]  --spread_vector-->  above [C][lanes]
//      logits row h+1  --pack_row-->  [C][w]  --spread_vector-->  below [C][lanes]
//
// Then one pass over C serves kRows * lanes pixels. Traffic is logits and labels once; the time
// goes into five instructions for a vector of scores.

#include "csrc/head/head_cpu_resize.h"

namespace fastseg {
namespace FASTSEG_SIMD {

using head_cpu::Argmax;
using head_cpu::Logits;
using head_cpu::Strip;

// Output rows of a tile: as many as there are registers for.
constexpr int kTileRowsOfHead = FASTSEG_SIMD_BYTES == 64 ? 4 : 2;

// Where a, b are NaN: b is.
template <class T>
FASTSEG_INLINE Vector<T> larger(Vector<T> a, Vector<T> b) {
#if FASTSEG_SIMD_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return bit_cast<Vector<T>>(
        _mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
  }
#endif
  return a > b ? a : b;
}

// Elements between the classes of a packed row: whole vectors may be read from any of its pixels,
// and rows are an odd number of cache lines apart.
template <class A>
inline int64_t packed_pitch(const Logits<A>& logits) {
  constexpr int64_t kLine = 64 / sizeof(A);
  return ((logits.w + 2 * kLanes<A> + kLine - 1) / kLine | 1) * kLine;
}

// Row h of an image as [C][w].
template <class S, class A>
FASTSEG_NOINLINE void pack_row(const Logits<A>& logits, int64_t image, int64_t h, A* packed) {
  constexpr int64_t n = kLanes<A>;
  const int64_t C = logits.C, w = logits.w, pitch = packed_pitch(logits);
  const S* row = static_cast<const S*>(logits.data) + image * logits.stride_n + h * logits.stride_h;
  if (logits.stride_w == 1) {
    for (int64_t c = 0; c < C; ++c, row += logits.stride_c, packed += pitch) {
      int64_t i = 0;
      for (; i + n <= w; i += n) store(packed + i, load(row + i));
      if (i < w) store(packed + i, load_first(row + i, w - i));
    }
    return;
  }
  if (logits.stride_c == 1) {
    for (int64_t c = 0; c < C; c += n) {
      const int64_t live = C - c < n ? C - c : n;
      for (int64_t i = 0; i < w; i += n) {
        Vector<A> block[n];
        for (int64_t j = 0; j < n; ++j) {
          const S* pixel = row + (i + j) * logits.stride_w + c;
          block[j] = i + j >= w ? Vector<A>{} : live == n ? load(pixel) : load_first(pixel, live);
        }
        transpose<A>(block);
        for (int64_t j = 0; j < live; ++j) store(packed + (c + j) * pitch + i, block[j]);
      }
    }
    return;
  }
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t i = 0; i < w; ++i) {
      packed[c * pitch + i] = widen(row[c * logits.stride_c + i * logits.stride_w]);
    }
  }
}

template <int kSources, class A>
FASTSEG_NOINLINE void spread_classes_of(const Logits<A>& logits, const A* packed, int64_t v,
                                        A* out) {
  const int64_t pitch = packed_pitch(logits);
  for (int64_t c = 0; c < logits.C; ++c) {
    store(out + c * kLanes<A>,
          spread_vector<kSources, false>(logits.spread, v, packed + c * pitch));
  }
}

// Two packed input rows and what a tile sees of them.
template <class A>
struct Window {
  A* packed[2];     // [C][pitch] each
  int64_t held[2];  // which rows these are, counted through all images
  A* seen[2];       // [C][lanes] each
  const A *above, *below;

  template <class S>
  FASTSEG_INLINE void pack(const Logits<A>& logits, int64_t image, const Strip& strip) {
    for (int64_t h = strip.above; h <= strip.below; ++h) {
      if (held[h % 2] == image * logits.h + h) continue;
      held[h % 2] = image * logits.h + h;
      pack_row<S>(logits, image, h, packed[h % 2]);
    }
  }

  FASTSEG_INLINE void spread(const Logits<A>& logits, const Strip& strip, int64_t v) {
    for (int64_t h = strip.above; h <= strip.below; ++h) {
      switch (logits.spread.sources) {
        case 1:
          spread_classes_of<1>(logits, packed[h % 2], v, seen[h % 2]);
          break;
        case 2:
          spread_classes_of<2>(logits, packed[h % 2], v, seen[h % 2]);
          break;
        default:
          spread_classes_of<0>(logits, packed[h % 2], v, seen[h % 2]);
      }
    }
    above = seen[strip.above % 2], below = seen[strip.below % 2];
  }
};

// Consecutive 64-byte aligned arrays in one buffer; without a buffer it only counts.
template <class A>
struct Shelf {
  char* base;
  int64_t used = 0;

  FASTSEG_INLINE A* take(int64_t count) {
    A* array = base == nullptr ? nullptr : reinterpret_cast<A*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(A)) + 63) / 64 * 64;
    return array;
  }

  FASTSEG_INLINE Window<A> window(const Logits<A>& logits) {
    Window<A> window;
    for (int side = 0; side < 2; ++side) {
      window.packed[side] = take(logits.C * packed_pitch(logits));
      window.seen[side] = take(logits.C * kLanes<A>);
      window.held[side] = -1;
    }
    return window;
  }
};

template <class A>
int64_t argmax_scratch_bytes(const Argmax<A>& call) {
  Shelf<A> shelf{nullptr};
  shelf.window(call.logits);
  return shelf.used;
}

// The labels of a tile. kFinite: no score can be NaN.
template <class A, int kRows, bool kFinite>
FASTSEG_NOINLINE void argmax_tile(const Window<A>& window, int64_t classes, const Sample<A>* rows,
                                  Vector<Index<A>>* labels) {
  constexpr int64_t n = kLanes<A>;
  Vector<A> share[kRows], best[kRows];
  Vector<Index<A>> label[kRows];
  const Vector<A> a = load(window.above), b = load(window.below);
  FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
    share[r] = broadcast(rows[r].share);
    best[r] = mix(a, b, A(1) - share[r], share[r]);
    label[r] = Vector<Index<A>>{};
  }
  for (int64_t c = 1; c < classes; ++c) {
    const Vector<A> a = load(window.above + c * n), b = load(window.below + c * n);
    const Vector<Index<A>> self = static_cast<Index<A>>(c) - Vector<Index<A>>{};
    FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vector<A> score = mix(a, b, A(1) - share[r], share[r]);
      if constexpr (kFinite) {
        label[r] = score > best[r] ? self : label[r];
        best[r] = larger<A>(score, best[r]);
      } else {
        const auto wins = (score > best[r]) | ((score != score) & (best[r] == best[r]));
        label[r] = wins ? self : label[r];
        best[r] = wins ? score : best[r];
      }
    }
  }
  FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) labels[r] = label[r];
}

template <class A, int kRows = kTileRowsOfHead>
FASTSEG_INLINE void argmax_tile_of(int64_t count, const Window<A>& window, int64_t classes,
                                   bool finite, const Sample<A>* rows, Vector<Index<A>>* labels) {
  if (count == kRows) {
    finite ? argmax_tile<A, kRows, true>(window, classes, rows, labels)
           : argmax_tile<A, kRows, false>(window, classes, rows, labels);
  } else if constexpr (kRows > 1) {
    argmax_tile_of<A, kRows - 1>(count, window, classes, finite, rows, labels);
  }
}

template <class A>
FASTSEG_NOINLINE bool all_finite(const Window<A>& window, int64_t classes) {
  Vector<A> zero{};
  for (int64_t i = 0; i < classes * kLanes<A>; i += kLanes<A>) {
    zero += load(window.above + i) * A(0) + load(window.below + i) * A(0);
  }
  A sum = 0;
  for (int64_t i = 0; i < kLanes<A>; ++i) sum += zero[i];
  return sum == 0;
}

template <class A>
FASTSEG_INLINE void store_labels(const Argmax<A>& call, int64_t at, Vector<Index<A>> labels,
                                 int64_t count) {
  if (call.bytes) {
    uint8_t* to = static_cast<uint8_t*>(call.labels) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(labels[i]);
    return;
  }
  int64_t* to = static_cast<int64_t*>(call.labels) + at;
  if (count == kLanes<A>) {
    typedef int64_t Wide __attribute__((vector_size(kLanes<A> * 8)));
    const Wide wide = __builtin_convertvector(labels, Wide);
    std::memcpy(to, &wide, sizeof(wide));
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i] = labels[i];
}

// Strips [begin, end) of all images.
template <class S, class A>
void argmax_strips(const Argmax<A>& call, int64_t begin, int64_t end, char* scratch) {
  constexpr int64_t n = kLanes<A>;
  const Logits<A>& logits = call.logits;
  Shelf<A> shelf{scratch};
  Window<A> window = shelf.window(logits);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / logits.strip_count;
    const Strip& strip = logits.strips[i % logits.strip_count];
    const Sample<A>* rows = logits.rows + strip.begin;
    window.template pack<S>(logits, image, strip);
    for (int64_t v = 0; v < logits.spread.vectors; ++v) {
      window.spread(logits, strip, v);
      const bool finite = all_finite(window, logits.C);
      Vector<Index<A>> labels[kTileRowsOfHead];
      argmax_tile_of<A>(strip.rows, window, logits.C, finite, rows, labels);
      const int64_t live = logits.Q - v * n < n ? logits.Q - v * n : n;
      for (int64_t r = 0; r < strip.rows; ++r) {
        const int64_t row = image * logits.P + strip.begin + r;
        store_labels(call, row * logits.Q + v * n, labels[r], live);
      }
    }
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
