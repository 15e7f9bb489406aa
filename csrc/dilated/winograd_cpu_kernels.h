// Winograd's convolution on the CPU, compiled once per instruction set: see winograd_cpu_plan.h for
// the algorithm and csrc/common/simd.h for the rest. In float only: elsewhere it is not faster, or
// too coarse.
//
//     channels, 64 at a time
//       U [16][channel][column]     sums and differences of 3x3 taps, as panels
//       tiles, up to 112 at a time
//         V [16][tile][channel]     sums and differences of 4x4 inputs              <= 576 KB, L2
//         M [16][tile][column]      += V * U, 16 products: see product.h
//     y                             sums and differences of M, scaled, biased, activated
//
// Between the lines threads wait for each other. They share U and M, and have V to themselves.

#include "csrc/common/product.h"  // and with it simd.h
#include "csrc/dilated/winograd_cpu_plan.h"

namespace fastseg {
namespace FASTSEG_SIMD {

using WinogradCall = winograd::Call;

// Distances in memory, in elements. Planes lie a cache line off whole pages, so that the 16
// elements of a tile do not share a few sets of the first-level cache.
constexpr int64_t winograd_plane(int64_t tiles, int64_t pitch) {
  constexpr int64_t kPage = 4096 / sizeof(float), kLine = 64 / sizeof(float);
  return (tiles * pitch + kPage - 1) / kPage * kPage + kLine;
}
constexpr int64_t kWinogradPitch = winograd::kDepth + 64 / sizeof(float);  // of V
inline int64_t winograd_sums_pitch(int64_t columns) {                      // of M
  constexpr int64_t kLine = 64 / sizeof(float);
  return (columns + kLine - 1) / kLine * kLine + kLine;
}

// Bytes of V and a line of zeros; elements of M of one block of tiles.
inline int64_t winograd_scratch_bytes(int64_t tiles) {
  return (winograd::kElements * winograd_plane(tiles, kWinogradPitch) + winograd::kDepth) *
         static_cast<int64_t>(sizeof(float));
}
inline int64_t winograd_sums_size(int64_t tiles, int64_t columns) {
  return winograd::kElements * winograd_plane(tiles, winograd_sums_pitch(columns));
}
// Elements of U of one block of channels.
inline int64_t winograd_filters_size(int64_t columns) {
  return winograd::kElements * packed_size<float>(columns, winograd::kDepth);
}

// (a0, a1, a2) -> G a, in place of four.
FASTSEG_INLINE void transform_taps(const Vector<float>* a, int64_t step, Vector<float>* u,
                                   int64_t to) {
  const Vector<float> outer = (a[0] + a[2 * step]) * 0.5f, inner = a[step] * 0.5f;
  u[0] = a[0];
  u[to] = outer + inner;
  u[2 * to] = outer - inner;
  u[3 * to] = a[2 * step];
}

// U of the columns [first, last), from whole vectors on, and of `depth` channels from `channel` on:
// 16 matrices of panels.
inline void winograd_filters(const winograd::Taps& taps, int64_t columns, int64_t channel,
                             int64_t depth, int64_t first, int64_t last, float* filters) {
  constexpr int64_t n = kLanes<float>, kChannels = 16;
  const int64_t element = packed_size<float>(columns, depth);
  float tile[9][kChannels * n];
  for (int64_t k = first; k < last; k += n) {
    // Panels are two vectors wide, the last one may be one.
    const int64_t panel = k / kPanelColumns<float> * kPanelColumns<float>;
    const int64_t pitch = panel_vectors<float>(columns - panel) * n;
    const int64_t wide = columns - k < n ? columns - k : n;
    for (int64_t c = 0; c < depth; c += kChannels) {
      const int64_t deep = depth - c < kChannels ? depth - c : kChannels;
      const float* from = taps.data + k * taps.column + (channel + c) * taps.channel;
      for (int64_t t = 0; t < 9; ++t) {
        pack_panels(from + t / 3 * taps.row + t % 3 * taps.tap, taps.column, taps.channel, wide,
                    deep, tile[t], 0, deep);
      }
      float* to = filters + packed_size<float>(panel, depth) + (k - panel) + c * pitch;
      for (int64_t i = 0; i < deep; ++i, to += pitch) {
        Vector<float> w[9], half[12], u[16];
        FASTSEG_UNROLL for (int64_t t = 0; t < 9; ++t) w[t] = load(tile[t] + i * n);
        FASTSEG_UNROLL for (int64_t s = 0; s < 3; ++s) transform_taps(w + s, 3, half + s, 3);
        FASTSEG_UNROLL for (int64_t r = 0; r < 4; ++r) {
          transform_taps(half + 3 * r, 1, u + 4 * r, 1);
        }
        FASTSEG_UNROLL for (int64_t e = 0; e < 16; ++e) store(to + e * element, u[e]);
      }
    }
  }
}

// (a0, a1, a2, a3) -> B' a, in place.
FASTSEG_INLINE void transform_inputs(Vector<float>* a, int64_t step) {
  const Vector<float> a1 = a[step], a2 = a[2 * step];
  a[0] -= a2;
  a[step] = a1 + a2;
  a[2 * step] = a2 - a1;
  a[3 * step] = a1 - a[3 * step];
}

// Sums of values times zero are NaN if one of them is not finite.
FASTSEG_INLINE bool is_zero(Vector<float> poison) {
  for (int64_t i = 0; i < kLanes<float>; ++i) {
    if (poison[i] != 0.0f) return false;
  }
  return true;
}

// The pixels of one tile.
struct WinogradTile {
  int64_t n, p, q;

  WinogradTile(const WinogradCall& call, int64_t index) {
    q = call.column_starts[index % call.column_count];
    index /= call.column_count;
    p = call.row_starts[index % call.row_count];
    n = index / call.row_count;
  }
};

// V of one tile and the channels [channel, channel + depth): one row for each element, or its place
// `index` in panels of `tiles` tiles.
template <bool kPanels>
inline void winograd_input(const WinogradCall& call, const WinogradTile& tile, int64_t channel,
                           int64_t depth, const float* zeros, float* v, int64_t v_plane,
                           int64_t index, int64_t tiles) {
  constexpr int64_t n = kLanes<float>;
  const float* from[16];
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t h = tile.p - call.pad_top + i * call.dilation_h;
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t w = tile.q - call.pad_left + j * call.dilation_w;
      const bool inside = h >= 0 && h < call.H && w >= 0 && w < call.W;
      from[4 * i + j] = inside
                            ? static_cast<const float*>(call.source.data) + tile.n * call.source.n +
                                  h * call.source.h + w * call.source.w + channel
                            : zeros;
    }
  }
  for (int64_t c = 0; c < depth; c += n) {
    Vector<float> x[16];
    if (depth - c >= n) {
      FASTSEG_UNROLL for (int64_t i = 0; i < 16; ++i) x[i] = load(from[i] + c);
    } else {
      FASTSEG_UNROLL for (int64_t i = 0; i < 16; ++i) x[i] = load_first(from[i] + c, depth - c);
    }
    FASTSEG_UNROLL for (int64_t j = 0; j < 4; ++j) transform_inputs(x + j, 4);
    FASTSEG_UNROLL for (int64_t i = 0; i < 4; ++i) transform_inputs(x + 4 * i, 1);
    float* to = v + index * kWinogradPitch + c;
    if (kPanels) {
      const int64_t panel = c / kPanelColumns<float> * kPanelColumns<float>;
      to = v + panel * tiles + index * panel_vectors<float>(depth - panel) * n + (c - panel);
    }
    FASTSEG_UNROLL for (int64_t e = 0; e < 16; ++e) store(to + e * v_plane, x[e]);
  }
}

// The outputs of one tile. What is not finite leaves NaN in `poison`.
inline void winograd_output(const WinogradCall& call, const WinogradTile& tile, const float* m,
                            int64_t m_plane, Vector<float>* poison) {
  constexpr int64_t n = kLanes<float>;
  const Finish<float> finish = {call.scale, call.bias, call.activation};
  float* to = static_cast<float*>(call.target.data) + tile.n * call.target.n +
              tile.p * call.target.h + tile.q * call.target.w;
  const bool two_rows = tile.p + call.dilation_h < call.P;
  const bool two_columns = tile.q + call.dilation_w < call.Q;
  const int64_t row = call.dilation_h * call.target.h, column = call.dilation_w * call.target.w;
  Vector<float> bad = *poison;
  for (int64_t k = 0; k < call.columns; k += n) {
    const int64_t count = call.columns - k;
    Vector<float> half[8], y[4];
    FASTSEG_UNROLL for (int64_t j = 0; j < 4; ++j) {
      const float* from = m + j * m_plane + k;
      const Vector<float> m1 = load_columns(from + 4 * m_plane, count);
      const Vector<float> m2 = load_columns(from + 8 * m_plane, count);
      half[j] = load_columns(from, count) + m1 + m2;
      half[4 + j] = m1 - m2 - load_columns(from + 12 * m_plane, count);
    }
    FASTSEG_UNROLL for (int64_t i = 0; i < 2; ++i) {
      const Vector<float>* a = half + 4 * i;
      y[2 * i] = a[0] + a[1] + a[2];
      y[2 * i + 1] = a[1] - a[2] - a[3];
    }
    FASTSEG_UNROLL for (int64_t i = 0; i < 4; ++i) bad += y[i] * 0.0f;
    FASTSEG_UNROLL for (int64_t i = 0; i < 4; ++i) y[i] = finished<float>(y[i], finish, k, count);
    store_columns(to + k, y[0], count);
    if (two_columns) store_columns(to + k + column, y[1], count);
    if (two_rows) store_columns(to + k + row, y[2], count);
    if (two_rows && two_columns) store_columns(to + k + row + column, y[3], count);
  }
  *poison = bad;
}

// Adds the products of `depth` channels from `channel` on to M of the tiles [begin, end), at most
// kMaxTiles; the first ones start it.
inline void winograd_products(const WinogradCall& call, int64_t begin, int64_t end, int64_t channel,
                              int64_t depth, const float* filters, float* sums, char* scratch) {
  const int64_t tiles = end - begin;
  const int64_t v_plane = winograd_plane(tiles, kWinogradPitch);
  const int64_t pitch = winograd_sums_pitch(call.columns), plane = winograd_plane(tiles, pitch);
  float* zeros = reinterpret_cast<float*>(scratch);
  float* v = zeros + winograd::kDepth;
  clear_row(zeros, winograd::kDepth);
  for (int64_t t = 0; t < tiles; ++t) {
    winograd_input<false>(call, WinogradTile(call, begin + t), channel, depth, zeros, v, v_plane, t,
                          tiles);
  }
  // Products of equal height.
  const int64_t products = (tiles + kTileRows - 1) / kTileRows;
  for (int64_t e = 0; e < winograd::kElements; ++e) {
    // A panel stays in the first-level cache while all tiles are multiplied with it.
    for (int64_t k = 0; k < call.columns; k += kPanelColumns<float>) {
      const int64_t left = call.columns - k;
      const int64_t columns = left < kPanelColumns<float> ? left : kPanelColumns<float>;
      for (int64_t i = 0, t = 0; i < products; ++i) {
        const int64_t rows = (tiles - t + products - i - 1) / (products - i);
        float* targets[kTileRows];
        for (int64_t j = 0; j < rows; ++j) targets[j] = sums + e * plane + (t + j) * pitch + k;
        multiply_tile<float>(v + e * v_plane + t * kWinogradPitch, kWinogradPitch,
                             static_cast<int>(rows), filters, depth, targets, columns, channel == 0,
                             nullptr);
        t += rows;
      }
      filters += packed_size<float>(columns, depth);
    }
  }
}

// The outputs of the tiles [begin, end) from their M; whether all are finite.
inline bool winograd_outputs(const WinogradCall& call, int64_t begin, int64_t end,
                             const float* sums) {
  const int64_t pitch = winograd_sums_pitch(call.columns);
  const int64_t plane = winograd_plane(end - begin, pitch);
  Vector<float> poison = {};
  for (int64_t t = begin; t < end; ++t) {
    winograd_output(call, WinogradTile(call, t), sums + (t - begin) * pitch, plane, &poison);
  }
  return is_zero(poison);
}

// ---- grad_weight ----

// (y0, y1) -> A y, in place of four.
FASTSEG_INLINE void transform_grads(const Vector<float>* y, int64_t step, Vector<float>* m,
                                    int64_t to) {
  const Vector<float> y0 = y[0], y1 = y[step];
  m[0] = y0;
  m[to] = y0 + y1;
  m[2 * to] = y0 - y1;
  m[3 * to] = -y1;
}

// (u0, u1, u2, u3) -> G' u.
FASTSEG_INLINE void transform_sums(const Vector<float>* u, int64_t step, Vector<float>* w,
                                   int64_t to) {
  const Vector<float> sum = (u[step] + u[2 * step]) * 0.5f;
  const Vector<float> difference = (u[step] - u[2 * step]) * 0.5f;
  w[0] = u[0] + sum;
  w[to] = difference;
  w[2 * to] = sum + u[3 * step];
}

// Elements of V of a block of tiles as panels, and of A grad_y A' as rows.
inline int64_t winograd_panels_plane(int64_t tiles, int64_t channels) {
  return winograd_plane(packed_size<float>(channels, tiles), 1);
}
inline int64_t winograd_grads_plane(int64_t tiles, int64_t columns) {
  return winograd_plane(tiles, winograd_sums_pitch(columns));
}

// V of the channels [channel, channel + depth) of the tiles [begin, end) of a block of `tiles` that
// begins with tile `first`.
inline void winograd_panels(const WinogradCall& call, int64_t first, int64_t tiles, int64_t begin,
                            int64_t end, int64_t channel, int64_t depth, float* v) {
  const float zeros[winograd::kWeightChannels] = {};
  for (int64_t t = begin; t < end; ++t) {
    winograd_input<true>(call, WinogradTile(call, first + t), channel, depth, zeros, v,
                         winograd_panels_plane(tiles, depth), t, tiles);
  }
}

// A grad_y A' of the columns [column, column + count) of the same tiles.
inline void winograd_grads(const WinogradCall& call, int64_t first, int64_t tiles, int64_t begin,
                           int64_t end, int64_t column, int64_t count, float* grads) {
  constexpr int64_t n = kLanes<float>;
  const int64_t plane = winograd_grads_plane(tiles, count), pitch = winograd_sums_pitch(count);
  for (int64_t t = begin; t < end; ++t) {
    const WinogradTile tile(call, first + t);
    const float* from = static_cast<const float*>(call.target.data) + tile.n * call.target.n +
                        tile.p * call.target.h + tile.q * call.target.w + column;
    const bool two_rows = tile.p + call.dilation_h < call.P;
    const bool two_columns = tile.q + call.dilation_w < call.Q;
    const int64_t row = call.dilation_h * call.target.h, next = call.dilation_w * call.target.w;
    float* to = grads + t * pitch;
    for (int64_t k = 0; k < count; k += n) {
      const int64_t wide = count - k;
      Vector<float> y[4] = {}, half[8], m[16];
      y[0] = load_columns(from + k, wide);
      if (two_columns) y[1] = load_columns(from + k + next, wide);
      if (two_rows) y[2] = load_columns(from + k + row, wide);
      if (two_rows && two_columns) y[3] = load_columns(from + k + row + next, wide);
      FASTSEG_UNROLL for (int64_t j = 0; j < 2; ++j) transform_grads(y + j, 2, half + j, 2);
      FASTSEG_UNROLL for (int64_t i = 0; i < 4; ++i) transform_grads(half + 2 * i, 1, m + 4 * i, 1);
      FASTSEG_UNROLL for (int64_t e = 0; e < 16; ++e) store(to + e * plane + k, m[e]);
    }
  }
}

constexpr int64_t kWinogradWeightScratchBytes = kTileRows * kTilePitch<float> * sizeof(float);

// Adds a block of tiles to grad_U of `count` columns and `depth` channels, [16][column][channel]
// with elements `plane` apart: a few columns of one element, those of `task` of 16 * ceil(count /
// kTileRows).
inline void winograd_weight_products(int64_t task, int64_t tiles, const float* v, int64_t depth,
                                     const float* grads, int64_t count, float* sums, int64_t plane,
                                     bool starts, char* scratch) {
  float* tile = reinterpret_cast<float*>(scratch);
  const int64_t groups = (count + kTileRows - 1) / kTileRows;
  const int64_t e = task / groups, k = task % groups * kTileRows;
  const int64_t rows = count - k < kTileRows ? count - k : kTileRows;
  fill_tile(grads + e * winograd_grads_plane(tiles, count) + k, 1, winograd_sums_pitch(count), rows,
            tiles, tile);
  float* targets[kTileRows];
  for (int64_t i = 0; i < rows; ++i) targets[i] = sums + e * plane + (k + i) * depth;
  multiply_tile<float>(tile, kTilePitch<float>, static_cast<int>(rows),
                       v + e * winograd_panels_plane(tiles, depth), tiles, targets, depth, starts,
                       nullptr);
}

// grad_w [K][3][3][C] of the columns [begin, end) and `depth` channels from grad_U; whether all of
// it is finite.
inline bool winograd_weights(const float* sums, int64_t plane, int64_t depth, int64_t begin,
                             int64_t end, int64_t C, float* grad) {
  constexpr int64_t n = kLanes<float>;
  Vector<float> poison = {};
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t c = 0; c < depth; c += n) {
      const int64_t count = depth - c;
      Vector<float> u[16], half[12], w[9];
      FASTSEG_UNROLL for (int64_t e = 0; e < 16; ++e) {
        u[e] = load_columns(sums + e * plane + k * depth + c, count);
      }
      FASTSEG_UNROLL for (int64_t j = 0; j < 4; ++j) transform_sums(u + j, 4, half + j, 4);
      FASTSEG_UNROLL for (int64_t i = 0; i < 3; ++i) transform_sums(half + 4 * i, 1, w + 3 * i, 1);
      FASTSEG_UNROLL for (int64_t t = 0; t < 9; ++t) {
        poison += w[t] * 0.0f;
        store_columns(grad + (k * 9 + t) * C + c, w[t], count);
      }
    }
  }
  return is_zero(poison);
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
