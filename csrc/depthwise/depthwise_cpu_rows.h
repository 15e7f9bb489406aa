// Rows of channels on their way between tensors and the kernels' scratch memory. A packed row is
// [pixels][lanes] in the accumulation type; lanes is the block's number of channels rounded up to
// whole vectors. Compiled once per instruction set: see csrc/common/simd.h.

#include "csrc/common/simd.h"
#include "csrc/depthwise/depthwise_cpu_plan.h"

namespace fastseg {
namespace FASTSEG_SIMD {

FASTSEG_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

// Vectors of the accumulation type that fill a cache line.
constexpr int kLine = 64 / FASTSEG_SIMD_BYTES;

// Stores a vector, one of kGroup neighbours; with `streams` past the caches, where together they
// fill cache lines, which then are not read before they are written.
template <int kGroup, class S, class V>
FASTSEG_INLINE void put(S* p, V v, bool streams) {
#if FASTSEG_SIMD_BYTES == 64
  if constexpr (sizeof(S) == sizeof(v[0])) {
    if (streams) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(v));
  }
#elif FASTSEG_SIMD_BYTES == 32
  if constexpr (sizeof(S) == sizeof(v[0]) && kGroup % kLine == 0) {
    if (streams) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(v));
  }
#endif
  store(p, v);
}

// Orders what was streamed before everything that follows, such as the end of a parallel loop.
FASTSEG_INLINE void end_streams() {
#if FASTSEG_SIMD_BYTES >= 32
  _mm_sfence();
#endif
}

// Lanes past the last channel become zero. The row `ahead` elements on is fetched into the cache.
template <class S, class A>
inline void pack_row(const S* row, int64_t stride_c, int64_t stride_w, int64_t channels,
                     int64_t pixels, A* packed, int64_t lanes, int64_t ahead) {
  constexpr int64_t n = kLanes<A>;
  if (stride_c == 1) {
    for (int64_t w = 0; w < pixels; ++w) {
      const S* pixel = row + w * stride_w;
      A* out = packed + w * lanes;
      int64_t c = 0;
      for (; c + n <= channels; c += n) {
        if (ahead != 0) __builtin_prefetch(pixel + ahead + c);
        store(out + c, load(pixel + c));
      }
      if (c < channels) store(out + c, load_first(pixel + c, channels - c));
    }
  } else if (stride_w == 1) {
    for (int64_t c = 0; c < channels; c += n) {
      const S* planes = row + c * stride_c;
      const int64_t live = min_of(channels - c, n);
      for (int64_t w = 0; w < pixels; w += n) {
        const int64_t count = min_of(pixels - w, n);
        Vector<A> square[n];
        if (ahead != 0) {
          for (int64_t i = 0; i < live; ++i) __builtin_prefetch(planes + i * stride_c + w + ahead);
        }
        if (live == n && count == n) {
          FASTSEG_UNROLL for (int64_t i = 0; i < n; ++i) square[i] =
              load(planes + i * stride_c + w);
        } else {
          FASTSEG_UNROLL for (int64_t i = 0; i < n; ++i) {
            square[i] = i < live ? load_first(planes + i * stride_c + w, count) : Vector<A>{};
          }
        }
        transpose<A>(square);
        A* out = packed + w * lanes + c;
        if (count == n) {
          FASTSEG_UNROLL for (int64_t j = 0; j < n; ++j) store(out + j * lanes, square[j]);
        } else {
          FASTSEG_UNROLL for (int64_t j = 0; j < n; ++j) {
            if (j < count) store(out + j * lanes, square[j]);
          }
        }
      }
    }
  } else {
    for (int64_t w = 0; w < pixels; ++w) {
      A* out = packed + w * lanes;
      for (int64_t c = 0; c < channels; ++c) out[c] = widen(row[w * stride_w + c * stride_c]);
      for (int64_t c = channels; c < lanes; ++c) out[c] = 0;
    }
  }
}

// The reverse: activation, then the one rounding. `ahead` as above.
template <class S, class A>
inline void unpack_row(const A* packed, int64_t lanes, int64_t channels, int64_t pixels,
                       Activation activation, S* row, int64_t stride_c, int64_t stride_w,
                       int64_t ahead) {
  constexpr int64_t n = kLanes<A>;
  if (stride_c == 1) {
    for (int64_t w = 0; w < pixels; ++w) {
      const A* in = packed + w * lanes;
      S* pixel = row + w * stride_w;
      int64_t c = 0;
      for (; c + n <= channels; c += n) store(pixel + c, activate<A>(load(in + c), activation));
      if (c < channels) store_first(pixel + c, activate<A>(load(in + c), activation), channels - c);
    }
    return;
  }
  for (int64_t c = 0; c < channels; c += n) {
    S* planes = row + c * stride_c;
    const int64_t live = min_of(channels - c, n);
    for (int64_t w = 0; w < pixels; w += n) {
      const int64_t count = min_of(pixels - w, n);
      const A* in = packed + w * lanes + c;
      Vector<A> square[n];
      FASTSEG_UNROLL for (int64_t j = 0; j < n; ++j) {
        square[j] = j < count ? activate<A>(load(in + j * lanes), activation) : Vector<A>{};
      }
      transpose<A>(square);
      if (ahead != 0) {
        for (int64_t i = 0; i < live; ++i) __builtin_prefetch(planes + i * stride_c + w + ahead, 1);
      }
      if (stride_w != 1) {
        A values[n * n];
        FASTSEG_UNROLL for (int64_t i = 0; i < n; ++i) store(values + i * n, square[i]);
        for (int64_t i = 0; i < live; ++i) {
          for (int64_t j = 0; j < count; ++j) {
            narrow(values[i * n + j], planes + i * stride_c + (w + j) * stride_w);
          }
        }
      } else if (live == n && count == n) {
        FASTSEG_UNROLL for (int64_t i = 0; i < n; ++i) store(planes + i * stride_c + w, square[i]);
      } else {
        FASTSEG_UNROLL for (int64_t i = 0; i < n; ++i) {
          if (i < live) store_first(planes + i * stride_c + w, square[i], count);
        }
      }
    }
  }
}

// The filters of output channels (begin + lane) * multiplier + u as packed rows [R][S][lanes].
template <class S, class A>
inline void pack_filter(const depthwise_cpu::Filter& filter, int64_t begin, int64_t channels,
                        int64_t multiplier, int64_t u, int64_t R, int64_t width, A* packed,
                        int64_t lanes) {
  if (filter.data == nullptr) {
    for (int64_t i = 0; i < R * width * lanes; ++i) packed[i] = 0;
    return;
  }
  const S* data = static_cast<const S*>(filter.data) + (begin * multiplier + u) * filter.stride_k;
  for (int64_t r = 0; r < R; ++r) {
    pack_row(data + r * filter.stride_r, filter.stride_k * multiplier, filter.stride_s, channels,
             width, packed + r * width * lanes, lanes, 0);
  }
}

template <class S, class A>
inline void unpack_filter(const A* packed, int64_t lanes, int64_t begin, int64_t channels,
                          int64_t multiplier, int64_t u, int64_t R, int64_t width,
                          const depthwise_cpu::Filter& filter) {
  S* data = static_cast<S*>(filter.data) + (begin * multiplier + u) * filter.stride_k;
  for (int64_t r = 0; r < R; ++r) {
    unpack_row(packed + r * width * lanes, lanes, channels, width, Activation::kNone,
               data + r * filter.stride_r, filter.stride_k * multiplier, filter.stride_s, 0);
  }
}

// The rows of one image and block as the kernels read them: in place, or packed on demand into a
// few slots. The slots are tagged, so the order in which rows are asked for only matters for speed.
// Source is S in place and the accumulation type in slots.
template <class S, class Source>
struct SourceRows {
  using A = typename Accumulator<S>::type;

  const S* image;
  int64_t stride_c, stride_h, stride_w;
  int64_t channels, lanes, pixels;
  bool direct;
  A* slots;       // [slot_count][pixels][lanes]
  int64_t* held;  // [slot_count]: the row in each slot, or -1
  int64_t slot_count, row_stride;
  int64_t ahead;  // elements to the row that will be asked for next, or 0

  int64_t pixel_stride() const { return direct ? stride_w : lanes; }

  const Source* row(int64_t at) const {
    if constexpr (std::is_same_v<S, Source>) {
      if (direct) return image + at * stride_h;
    }
    if constexpr (std::is_same_v<A, Source>) {
      const int64_t slot = at / row_stride % slot_count;
      A* packed = slots + slot * pixels * lanes;
      if (held[slot] != at) {
        held[slot] = at;
        pack_row(image + at * stride_h, stride_c, stride_w, channels, pixels, packed, lanes, ahead);
      }
      return packed;
    }
    return nullptr;  // 16-bit sources are direct
  }
};

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
