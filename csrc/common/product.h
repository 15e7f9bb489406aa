// Matrix products on the CPU, in float or double: what a convolution spends its time in.
//
//     y[i][k] (+)= sum over c < depth of a[i][c] * b[c][k]       i < rows, k < columns
//
// A tile of rows stays in registers, two vectors wide, while c runs: each step loads two vectors of
// b, and for every row broadcasts one element of a and does two multiply-adds. With 14 rows of two
// AVX-512 vectors that is 16 loads to 28 multiply-adds, and all 32 registers are taken.
//
// Rows of `a` are equally far apart. What does not lie like that, or 4 KB apart (as 2048 channels
// do, which would share a few sets of the first-level cache), is copied before into a tile with
// rows kTilePitch apart. `b` is packed into panels [column panel][c][column], zeros behind the last
// column, so that it is read front to back.
//
// Compiled once per instruction set: see csrc/common/simd.h.

#include "csrc/common/simd.h"

namespace fastseg {
namespace FASTSEG_SIMD {

// Rows of a tile: their sums, two vectors of b and one broadcast fill the registers.
constexpr int kTileRows = FASTSEG_SIMD_BYTES == 64 ? 14 : 6;
template <class T>
constexpr int64_t kPanelColumns = 2 * kLanes<T>;
// Products that are summed up in registers: a tile this deep stays in the first-level cache, and
// panels stream past it from the second.
template <class T>
constexpr int64_t kMaxDepth = 2048 / sizeof(T);
template <class T>
constexpr int64_t kTilePitch = kMaxDepth<T> + 64 / sizeof(T);

// What happens to a sum when its last product is in: activation(sum * scale + bias). Pointers are
// at the first column; nullptr stands for ones, or zeros.
template <class T>
struct Finish {
  const T* scale;
  const T* bias;
  Activation activation;
};

// The first `count` elements, or a whole vector if there are as many.
template <class S>
FASTSEG_INLINE auto load_columns(const S* p, int64_t count) {
  return count >= kLanes<typename Accumulator<S>::type> ? load(p) : load_first(p, count);
}
template <class S, class V>
FASTSEG_INLINE void store_columns(S* p, V v, int64_t count) {
  count >= kLanes<typename Accumulator<S>::type> ? store(p, v) : store_first(p, v, count);
}

// One tile. `y` has the rows' addresses; `starts` overwrites them; `finish` may be nullptr.
template <class T, int kRows, int kVectors>
FASTSEG_NOINLINE void multiply_rows(const T* a, int64_t pitch, const T* b, int64_t depth,
                                    T* const* y, int64_t columns, bool starts,
                                    const Finish<T>* finish) {
  constexpr int64_t n = kLanes<T>;
  // Sums may come from far, and have time until the products are summed up.
  FASTSEG_UNROLL for (int i = 0; i < kRows; ++i) {
    FASTSEG_UNROLL for (int v = 0; v < kVectors; ++v) __builtin_prefetch(y[i] + v * n, 1);
  }
  Vector<T> acc[kRows][kVectors];
  FASTSEG_UNROLL for (int i = 0; i < kRows; ++i) {
    FASTSEG_UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] = Vector<T>{};
  }
  // Three rows share an address register: x86 adds once or twice the pitch by itself.
  constexpr int kBases = (kRows + 2) / 3;
  const T* base[kBases];
  FASTSEG_UNROLL for (int j = 0; j < kBases; ++j) base[j] = a + 3 * j * pitch;
  for (int64_t c = 0; c < depth; ++c) {
    Vector<T> row[kVectors];
    FASTSEG_UNROLL for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * n);
    FASTSEG_UNROLL for (int i = 0; i < kRows; ++i) {
      const Vector<T> value = broadcast(base[i / 3][i % 3 * pitch]);
      FASTSEG_UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] += value * row[v];
    }
    FASTSEG_UNROLL for (int j = 0; j < kBases; ++j) base[j] += 1;
    b += kVectors * n;
  }
  FASTSEG_UNROLL for (int v = 0; v < kVectors; ++v) {
    const int64_t count = columns - v * n;
    if (!starts) {
      FASTSEG_UNROLL for (int i = 0; i < kRows; ++i) {
        acc[i][v] += load_columns(y[i] + v * n, count);
      }
    }
    if (finish != nullptr) {
      if (finish->scale != nullptr) {
        const Vector<T> scale = load_columns(finish->scale + v * n, count);
        FASTSEG_UNROLL for (int i = 0; i < kRows; ++i) acc[i][v] *= scale;
      }
      if (finish->bias != nullptr) {
        const Vector<T> bias = load_columns(finish->bias + v * n, count);
        FASTSEG_UNROLL for (int i = 0; i < kRows; ++i) acc[i][v] += bias;
      }
    }
  }
  if (finish != nullptr) activate_all<T, kRows * kVectors>(&acc[0][0], finish->activation);
  FASTSEG_UNROLL for (int v = 0; v < kVectors; ++v) {
    const int64_t count = columns - v * n;
    FASTSEG_UNROLL for (int i = 0; i < kRows; ++i) store_columns(y[i] + v * n, acc[i][v], count);
  }
}

template <class T>
using MultiplyRows = void (*)(const T*, int64_t, const T*, int64_t, T* const*, int64_t, bool,
                              const Finish<T>*);

template <class T, int kVectors, size_t... I>
MultiplyRows<T> multiply_rows_of(int rows, std::index_sequence<I...>) {
  static constexpr MultiplyRows<T> kKernels[] = {
      multiply_rows<T, static_cast<int>(I) + 1, kVectors>...};
  return kKernels[rows - 1];
}

// Vectors of the panel that begins `columns` before the end.
template <class T>
inline int64_t panel_vectors(int64_t columns) {
  return columns > kLanes<T> ? 2 : 1;
}

// Elements that `columns` columns of b take when they are packed.
template <class T>
inline int64_t packed_size(int64_t columns, int64_t depth) {
  return (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T> * depth;
}

// The tile a, rows `pitch` apart, times the packed columns b.
template <class T>
inline void multiply_tile(const T* a, int64_t pitch, int rows, const T* b, int64_t depth,
                          T* const* y, int64_t columns, bool starts, const Finish<T>* finish) {
  constexpr std::make_index_sequence<kTileRows> sizes;
  const MultiplyRows<T> wide = multiply_rows_of<T, 2>(rows, sizes);
  T* target[kTileRows];
  for (int i = 0; i < rows; ++i) target[i] = y[i];
  Finish<T> rest = finish == nullptr ? Finish<T>{} : *finish;
  while (columns > 0) {
    const int64_t vectors = panel_vectors<T>(columns);
    const MultiplyRows<T> kernel = vectors == 2 ? wide : multiply_rows_of<T, 1>(rows, sizes);
    kernel(a, pitch, b, depth, target, columns, starts, finish == nullptr ? nullptr : &rest);
    b += vectors * kLanes<T> * depth;
    columns -= kPanelColumns<T>;
    for (int i = 0; i < rows; ++i) target[i] += kPanelColumns<T>;
    if (rest.scale != nullptr) rest.scale += kPanelColumns<T>;
    if (rest.bias != nullptr) rest.bias += kPanelColumns<T>;
  }
}

// Whether rows this far apart, in elements, fall into the same sets of the first-level cache.
template <class T>
inline bool aliased(int64_t pitch) {
  return pitch * static_cast<int64_t>(sizeof(T)) % 4096 == 0;
}

// Fills rows of a tile, widened to T: element (i, c) lies at a[i * row_stride + c * depth_stride].
// Up to a vector behind the last element of a row is overwritten; a tile's pitch has room for it.
template <class S, class T>
inline void fill_tile(const S* a, int64_t row_stride, int64_t depth_stride, int64_t rows,
                      int64_t depth, T* tile) {
  constexpr int64_t n = kLanes<T>;
  if (depth_stride == 1) {
    for (int64_t i = 0; i < rows; ++i, a += row_stride, tile += kTilePitch<T>) {
      for (int64_t c = 0; c < depth; c += n) store(tile + c, load_columns(a + c, depth - c));
    }
  } else if (row_stride == 1) {
    for (int64_t c = 0; c < depth; c += n) {
      for (int64_t begin = 0; begin < rows; begin += n) {
        Vector<T> lines[n];
        const S* from = a + c * depth_stride + begin;
        FASTSEG_UNROLL for (int64_t i = 0; i < n; ++i) {
          lines[i] = Vector<T>{};
          if (c + i < depth) lines[i] = load_columns(from + i * depth_stride, rows - begin);
        }
        transpose<T>(lines);
        T* to = tile + begin * kTilePitch<T> + c;
        FASTSEG_UNROLL for (int64_t i = 0; i < n; ++i) {
          if (begin + i < rows) store(to + i * kTilePitch<T>, lines[i]);
        }
      }
    }
  } else {
    for (int64_t i = 0; i < rows; ++i, a += row_stride, tile += kTilePitch<T>) {
      for (int64_t c = 0; c < depth; ++c) tile[c] = widen(a[c * depth_stride]);
    }
  }
}

// Packs b, widened to T: element (c, k) lies at
// b[k * column_stride + c * depth_stride] and goes to the places from `first` on of panels that are
// `panel_depth` deep.
template <class S, class T>
inline void pack_panels(const S* b, int64_t column_stride, int64_t depth_stride, int64_t columns,
                        int64_t depth, T* packed, int64_t first, int64_t panel_depth) {
  constexpr int64_t n = kLanes<T>;
  for (int64_t k = 0; k < columns; k += kPanelColumns<T>) {
    const int64_t vectors = panel_vectors<T>(columns - k), pitch = vectors * n;
    for (int64_t v = 0; v < vectors; ++v) {
      const S* from = b + (k + v * n) * column_stride;
      const int64_t count = columns - k - v * n;
      T* to = packed + first * pitch + v * n;
      if (column_stride == 1) {
        for (int64_t c = 0; c < depth; ++c) {
          store(to + c * pitch, load_columns(from + c * depth_stride, count));
        }
      } else if (depth_stride == 1) {
        for (int64_t c = 0; c < depth; c += n) {
          Vector<T> rows[n];
          FASTSEG_UNROLL for (int64_t i = 0; i < n; ++i) {
            rows[i] = Vector<T>{};
            if (i < count) rows[i] = load_columns(from + i * column_stride + c, depth - c);
          }
          transpose<T>(rows);
          FASTSEG_UNROLL for (int64_t i = 0; i < n; ++i) {
            if (c + i < depth) store(to + (c + i) * pitch, rows[i]);
          }
        }
      } else {
        for (int64_t c = 0; c < depth; ++c) {
          for (int64_t i = 0; i < n; ++i) {
            to[c * pitch + i] =
                i < count ? widen(from[i * column_stride + c * depth_stride]) : T(0);
          }
        }
      }
    }
    packed += pitch * panel_depth;
  }
}

template <class T>
inline void clear_row(T* sums, int64_t columns) {
  int64_t k = 0;
  for (; k + kLanes<T> <= columns; k += kLanes<T>) store(sums + k, Vector<T>{});
  if (k < columns) store_first(sums + k, Vector<T>{}, columns - k);
}

template <class T>
FASTSEG_INLINE Vector<T> finished(Vector<T> sum, const Finish<T>& finish, int64_t k,
                                  int64_t count) {
  if (finish.scale != nullptr) sum *= load_columns(finish.scale + k, count);
  if (finish.bias != nullptr) sum += load_columns(finish.bias + k, count);
  return activate<T>(sum, finish.activation);
}

// Sums [count][pitch] of neighbouring pixels -> y.
template <class S, class T>
inline void finish_pixels(const T* sums, int64_t pitch, int64_t count, int64_t columns,
                          const Finish<T>& finish, S* y, int64_t channel_stride,
                          int64_t pixel_stride) {
  constexpr int64_t n = kLanes<T>;
  for (int64_t k = 0; k < columns; k += n) {
    const int64_t wide = columns - k;
    for (int64_t begin = 0; begin < count; begin += n) {
      const int64_t pixels = count - begin < n ? count - begin : n;
      const T* from = sums + begin * pitch + k;
      S* to = y + begin * pixel_stride + k * channel_stride;
      if (channel_stride == 1) {
        for (int64_t i = 0; i < pixels; ++i, from += pitch, to += pixel_stride) {
          const Vector<T> value = finished<T>(load_columns(from, wide), finish, k, wide);
          wide >= n ? store(to, value) : store_first(to, value, wide);
        }
      } else {
        Vector<T> rows[n];
        for (int64_t i = 0; i < n; ++i) {
          rows[i] = Vector<T>{};
          if (i < pixels)
            rows[i] = finished<T>(load_columns(from + i * pitch, wide), finish, k, wide);
        }
        transpose<T>(rows);
        for (int64_t i = 0; i < n && i < wide; ++i, to += channel_stride) {
          if (pixel_stride == 1) {
            pixels == n ? store(to, rows[i]) : store_first(to, rows[i], pixels);
          } else {
            for (int64_t j = 0; j < pixels; ++j) narrow(rows[i][j], to + j * pixel_stride);
          }
        }
      }
    }
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
