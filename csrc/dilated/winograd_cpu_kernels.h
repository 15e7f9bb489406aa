// Winograd's convolution on the CPU, compiled once per instruction set: see winograd_cpu_plan.h for
// the algorithm and csrc/common/simd.h for the rest. In float only: elsewhere it is not faster, or
// too coarse.
//
//     channels, 64 at a time
//       U [element][channel][column]    sums and differences of 3x3 taps, as panels
//       tiles, some 100 at a time
//         V [element][tile][channel]    sums and differences of inputs              <= 576 KB, L2
//         M [element][tile][column]     += V * U, a product for each element: see product.h
//     y                                 sums and differences of M, scaled, biased, activated
//
// A thread has tiles and columns of its own, and U, V and M to itself: to write what another core
// has just read takes longer than to compute it again.

#include "csrc/common/product.h"  // and with it simd.h
#include "csrc/dilated/winograd_cpu_plan.h"

namespace fastseg {
namespace FASTSEG_SIMD {

using WinogradCall = winograd::Call;

// Distances in memory, in elements. Planes lie a cache line off whole pages, so that the
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
inline int64_t winograd_scratch_bytes(int64_t elements, int64_t tiles) {
  return (elements * winograd_plane(tiles, kWinogradPitch) + winograd::kDepth) *
         static_cast<int64_t>(sizeof(float));
}
inline int64_t winograd_sums_size(int64_t elements, int64_t tiles, int64_t columns) {
  return elements * winograd_plane(tiles, winograd_sums_pitch(columns));
}
// Of U, and elements of one block of channels.
inline int64_t winograd_filters_plane(int64_t columns, int64_t depth) {
  return winograd_plane(packed_size<float>(columns, depth), 1);
}
inline int64_t winograd_filters_size(int64_t elements, int64_t columns) {
  return elements * winograd_filters_plane(columns, winograd::kDepth);
}

// y = kMatrix x, or its transpose times x; neighbours of x and y are `from` and `to` apart. Known
// elements of the matrix leave sums and differences.
template <const auto& kMatrix, bool kTransposed = false>
FASTSEG_INLINE void transform(const Vector<float>* x, int64_t from, Vector<float>* y, int64_t to) {
  constexpr int64_t kHeight = std::extent_v<std::remove_reference_t<decltype(kMatrix)>, 0>;
  constexpr int64_t kWidth = std::extent_v<std::remove_reference_t<decltype(kMatrix)>, 1>;
  constexpr int64_t kRows = kTransposed ? kWidth : kHeight;
  constexpr int64_t kColumns = kTransposed ? kHeight : kWidth;
  FASTSEG_UNROLL for (int64_t i = 0; i < kRows; ++i) {
    Vector<float> sum = {};
    bool starts = true;
    FASTSEG_UNROLL for (int64_t j = 0; j < kColumns; ++j) {
      const float factor = kTransposed ? kMatrix[j][i] : kMatrix[i][j];
      if (factor == 0) continue;
      const Vector<float> value = x[j * from];
      if (starts) {
        sum = factor == 1 ? value : factor == -1 ? -value : factor * value;
      } else {
        sum = factor == 1 ? sum + value : factor == -1 ? sum - value : sum + factor * value;
      }
      starts = false;
    }
    y[i * to] = sum;
  }
}

// The forms of both axes. Matrices of what they transform lie row by row.
template <class RowForm, class ColumnForm>
struct WinogradForms {
  using Rows = RowForm;
  using Columns = ColumnForm;
  static constexpr int64_t kElements = Rows::kProducts * Columns::kProducts;
  static constexpr int64_t kInputs = Rows::kInputs * Columns::kInputs;
  static constexpr int64_t kOutputs = Rows::kOutputs * Columns::kOutputs;
  static constexpr float kDivisor = Rows::kDivisor * Columns::kDivisor;

  // w [3][3] -> G w G'.
  static FASTSEG_INLINE void of_taps(const Vector<float>* w, Vector<float>* u) {
    Vector<float> half[Rows::kProducts * 3];
    FASTSEG_UNROLL for (int64_t s = 0; s < 3; ++s) {
      transform<Rows::kOfTaps>(w + s, 3, half + s, 3);
    }
    FASTSEG_UNROLL for (int64_t r = 0; r < Rows::kProducts; ++r) {
      transform<Columns::kOfTaps>(half + 3 * r, 1, u + r * Columns::kProducts, 1);
    }
  }

  // x -> B x B'.
  static FASTSEG_INLINE void of_inputs(const Vector<float>* x, Vector<float>* v) {
    Vector<float> half[Rows::kProducts * Columns::kInputs];
    FASTSEG_UNROLL for (int64_t j = 0; j < Columns::kInputs; ++j) {
      transform<Rows::kOfInputs>(x + j, Columns::kInputs, half + j, Columns::kInputs);
    }
    FASTSEG_UNROLL for (int64_t i = 0; i < Rows::kProducts; ++i) {
      transform<Columns::kOfInputs>(half + i * Columns::kInputs, 1, v + i * Columns::kProducts, 1);
    }
  }

  // M -> A M A'; element e of M is read by load(e).
  template <class Load>
  static FASTSEG_INLINE void of_products(const Load& load, Vector<float>* y) {
    Vector<float> half[Rows::kOutputs * Columns::kProducts];
    FASTSEG_UNROLL for (int64_t j = 0; j < Columns::kProducts; ++j) {
      Vector<float> m[Rows::kProducts];
      FASTSEG_UNROLL for (int64_t i = 0; i < Rows::kProducts; ++i) {
        m[i] = load(i * Columns::kProducts + j);
      }
      transform<Rows::kOfProducts>(m, 1, half + j, Columns::kProducts);
    }
    FASTSEG_UNROLL for (int64_t i = 0; i < Rows::kOutputs; ++i) {
      transform<Columns::kOfProducts>(half + i * Columns::kProducts, 1, y + i * Columns::kOutputs,
                                      1);
    }
    if (kDivisor != 1) {
      FASTSEG_UNROLL for (int64_t i = 0; i < kOutputs; ++i) y[i] /= Vector<float>{} + kDivisor;
    }
  }

  // grad_y -> A' grad_y A.
  static FASTSEG_INLINE void of_grads(const Vector<float>* y, Vector<float>* m) {
    Vector<float> half[Rows::kProducts * Columns::kOutputs];
    FASTSEG_UNROLL for (int64_t j = 0; j < Columns::kOutputs; ++j) {
      transform<Rows::kOfProducts, true>(y + j, Columns::kOutputs, half + j, Columns::kOutputs);
    }
    FASTSEG_UNROLL for (int64_t i = 0; i < Rows::kProducts; ++i) {
      transform<Columns::kOfProducts, true>(half + i * Columns::kOutputs, 1,
                                            m + i * Columns::kProducts, 1);
    }
  }

  // grad_U -> G' grad_U G; element e of grad_U is read by load(e).
  template <class Load>
  static FASTSEG_INLINE void of_sums(const Load& load, Vector<float>* w) {
    Vector<float> half[3 * Columns::kProducts];
    FASTSEG_UNROLL for (int64_t j = 0; j < Columns::kProducts; ++j) {
      Vector<float> u[Rows::kProducts];
      FASTSEG_UNROLL for (int64_t i = 0; i < Rows::kProducts; ++i) {
        u[i] = load(i * Columns::kProducts + j);
      }
      transform<Rows::kOfTaps, true>(u, 1, half + j, Columns::kProducts);
    }
    FASTSEG_UNROLL for (int64_t r = 0; r < 3; ++r) {
      transform<Columns::kOfTaps, true>(half + r * Columns::kProducts, 1, w + 3 * r, 1);
    }
    if (kDivisor != 1) {
      FASTSEG_UNROLL for (int64_t t = 0; t < 9; ++t) w[t] /= Vector<float>{} + kDivisor;
    }
  }
};

// U of `depth` channels from `channel` on: a matrix of panels for each element.
template <class Forms>
void winograd_filters(const winograd::Taps& taps, int64_t columns, int64_t channel, int64_t depth,
                      float* filters) {
  constexpr int64_t n = kLanes<float>, kChannels = 16;
  const int64_t element = winograd_filters_plane(columns, depth);
  alignas(64) float tile[9 * kChannels * n];
  // Contiguous weights have a channel's taps side by side, and so has the tile then.
  const bool side_by_side = taps.tap == 1 && taps.row == 3 && taps.channel == 9;
  const int64_t next_tap = side_by_side ? n : kChannels * n,
                next_channel = side_by_side ? 9 * n : n;
  for (int64_t k = 0; k < columns; k += n) {
    // Panels are two vectors wide, the last one may be one.
    const int64_t panel = k / kPanelColumns<float> * kPanelColumns<float>;
    const int64_t pitch = panel_vectors<float>(columns - panel) * n;
    const int64_t wide = columns - k < n ? columns - k : n;
    for (int64_t c = 0; c < depth; c += kChannels) {
      const int64_t deep = depth - c < kChannels ? depth - c : kChannels;
      const float* from = taps.data + k * taps.column + (channel + c) * taps.channel;
      if (side_by_side) {
        pack_panels(from, taps.column, 1, wide, 9 * deep, tile, 0, 9 * deep);
      } else {
        for (int64_t t = 0; t < 9; ++t) {
          pack_panels(from + t / 3 * taps.row + t % 3 * taps.tap, taps.column, taps.channel, wide,
                      deep, tile + t * next_tap, 0, deep);
        }
      }
      float* to = filters + packed_size<float>(panel, depth) + (k - panel) + c * pitch;
      for (int64_t i = 0; i < deep; ++i, to += pitch) {
        Vector<float> w[9], u[Forms::kElements];
        FASTSEG_UNROLL for (int64_t t = 0; t < 9; ++t) w[t] =
            load(tile + t * next_tap + i * next_channel);
        Forms::of_taps(w, u);
        FASTSEG_UNROLL for (int64_t e = 0; e < Forms::kElements; ++e) {
          store(to + e * element, u[e]);
        }
      }
    }
  }
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

  // Where its first output lies.
  FASTSEG_INLINE int64_t target(const WinogradCall& call) const {
    return n * call.target.n + p * call.target.h + q * call.target.w;
  }

  // Where output (i, j) lies from the first one on, or a negative number: behind the image.
  FASTSEG_INLINE int64_t output(const WinogradCall& call, int64_t i, int64_t j) const {
    const bool inside = p + i * call.dilation_h < call.P && q + j * call.dilation_w < call.Q;
    return inside ? i * call.dilation_h * call.target.h + j * call.dilation_w * call.target.w : -1;
  }
};

// V of one tile and the channels [channel, channel + depth): a row for each element, or the place
// `index` in panels of `tiles` tiles.
template <class Forms, bool kPanels>
FASTSEG_INLINE void winograd_input(const WinogradCall& call, const WinogradTile& tile,
                                   int64_t channel, int64_t depth, const float* zeros, float* v,
                                   int64_t v_plane, int64_t index, int64_t tiles) {
  using Rows = typename Forms::Rows;
  using Columns = typename Forms::Columns;
  constexpr int64_t n = kLanes<float>;
  const float* from[Forms::kInputs];
  for (int64_t i = 0; i < Rows::kInputs; ++i) {
    const int64_t h = tile.p - call.pad_top + (Rows::kFirst + i) * call.dilation_h;
    for (int64_t j = 0; j < Columns::kInputs; ++j) {
      const int64_t w = tile.q - call.pad_left + (Columns::kFirst + j) * call.dilation_w;
      const bool inside = h >= 0 && h < call.H && w >= 0 && w < call.W;
      from[i * Columns::kInputs + j] = inside ? static_cast<const float*>(call.source.data) +
                                                    tile.n * call.source.n + h * call.source.h +
                                                    w * call.source.w + channel
                                              : zeros;
    }
  }
  for (int64_t c = 0; c < depth; c += n) {
    Vector<float> x[Forms::kInputs], u[Forms::kElements];
    if (depth - c >= n) {
      FASTSEG_UNROLL for (int64_t i = 0; i < Forms::kInputs; ++i) x[i] = load(from[i] + c);
    } else {
      FASTSEG_UNROLL for (int64_t i = 0; i < Forms::kInputs; ++i) {
        x[i] = load_first(from[i] + c, depth - c);
      }
    }
    Forms::of_inputs(x, u);
    float* to = v + index * kWinogradPitch + c;
    if (kPanels) {
      const int64_t panel = c / kPanelColumns<float> * kPanelColumns<float>;
      to = v + panel * tiles + index * panel_vectors<float>(depth - panel) * n + (c - panel);
    }
    FASTSEG_UNROLL for (int64_t e = 0; e < Forms::kElements; ++e) store(to + e * v_plane, u[e]);
  }
}

// V of the channels [channel, channel + depth) of the tiles [begin, end), at most kMaxElements; the
// line of zeros lies before it.
template <class Forms>
void winograd_inputs(const WinogradCall& call, int64_t begin, int64_t end, int64_t channel,
                     int64_t depth, char* scratch) {
  float* zeros = reinterpret_cast<float*>(scratch);
  clear_row(zeros, winograd::kDepth);
  for (int64_t t = begin; t < end; ++t) {
    winograd_input<Forms, false>(call, WinogradTile(call, t), channel, depth, zeros,
                                 zeros + winograd::kDepth,
                                 winograd_plane(end - begin, kWinogradPitch), t - begin, 0);
  }
}

// Adds the products of these channels to M of these tiles; the first ones start it.
inline void winograd_products(const WinogradCall& call, int64_t tiles, int64_t channel,
                              int64_t depth, const float* filters, float* sums,
                              const char* scratch) {
  const float* v = reinterpret_cast<const float*>(scratch) + winograd::kDepth;
  const int64_t v_plane = winograd_plane(tiles, kWinogradPitch);
  const int64_t pitch = winograd_sums_pitch(call.columns), plane = winograd_plane(tiles, pitch);
  // Products of equal height.
  const int64_t products = (tiles + kTileRows - 1) / kTileRows;
  for (int64_t e = 0; e < call.elements; ++e) {
    const float* panel = filters + e * winograd_filters_plane(call.columns, depth);
    // A panel stays in the first-level cache while all tiles are multiplied with it.
    for (int64_t k = 0; k < call.columns; k += kPanelColumns<float>) {
      const int64_t left = call.columns - k;
      const int64_t columns = left < kPanelColumns<float> ? left : kPanelColumns<float>;
      for (int64_t i = 0, t = 0; i < products; ++i) {
        const int64_t rows = (tiles - t + products - i - 1) / (products - i);
        float* targets[kTileRows];
        for (int64_t j = 0; j < rows; ++j) targets[j] = sums + e * plane + (t + j) * pitch + k;
        multiply_tile<float>(v + e * v_plane + t * kWinogradPitch, kWinogradPitch,
                             static_cast<int>(rows), panel, depth, targets, columns, channel == 0,
                             nullptr);
        t += rows;
      }
      panel += packed_size<float>(columns, depth);
    }
  }
}

// The outputs of the tiles [begin, end) from their M; whether all are finite.
template <class Forms>
bool winograd_outputs(const WinogradCall& call, int64_t begin, int64_t end, const float* sums) {
  constexpr int64_t n = kLanes<float>, kWide = Forms::Columns::kOutputs;
  const int64_t pitch = winograd_sums_pitch(call.columns);
  const int64_t plane = winograd_plane(end - begin, pitch);
  const Finish<float> finish = {call.scale, call.bias, call.activation};
  Vector<float> poison = {};
  for (int64_t t = begin; t < end; ++t) {
    const WinogradTile tile(call, t);
    float* to = static_cast<float*>(call.target.data) + tile.target(call);
    int64_t places[Forms::kOutputs];
    for (int64_t i = 0; i < Forms::kOutputs; ++i) {
      places[i] = tile.output(call, i / kWide, i % kWide);
    }
    const float* m = sums + (t - begin) * pitch;
    for (int64_t k = 0; k < call.columns; k += n) {
      const int64_t count = call.columns - k;
      Vector<float> y[Forms::kOutputs];
      Forms::of_products([&](int64_t e) { return load_columns(m + e * plane + k, count); }, y);
      FASTSEG_UNROLL for (int64_t i = 0; i < Forms::kOutputs; ++i) {
        poison += y[i] * 0.0f;
        y[i] = finished<float>(y[i], finish, k, count);
        if (places[i] >= 0) store_columns(to + places[i] + k, y[i], count);
      }
    }
  }
  return is_zero(poison);
}

// ---- grad_weight ----

// Elements of V of a block of tiles as panels, and of A' grad_y A as rows.
inline int64_t winograd_panels_plane(int64_t tiles, int64_t channels) {
  return winograd_plane(packed_size<float>(channels, tiles), 1);
}
inline int64_t winograd_grads_plane(int64_t tiles, int64_t columns) {
  return winograd_plane(tiles, winograd_sums_pitch(columns));
}

// V of the tiles [begin, end) and the channels [channel, channel + depth).
template <class Forms>
void winograd_panels(const WinogradCall& call, int64_t begin, int64_t end, int64_t channel,
                     int64_t depth, float* v) {
  const float zeros[winograd::kWeightChannels] = {};
  for (int64_t t = begin; t < end; ++t) {
    winograd_input<Forms, true>(call, WinogradTile(call, t), channel, depth, zeros, v,
                                winograd_panels_plane(end - begin, depth), t - begin, end - begin);
  }
}

// A' grad_y A of the same tiles and the columns [column, column + count).
template <class Forms>
void winograd_grads(const WinogradCall& call, int64_t begin, int64_t end, int64_t column,
                    int64_t count, float* grads) {
  constexpr int64_t n = kLanes<float>, kWide = Forms::Columns::kOutputs;
  const int64_t plane = winograd_grads_plane(end - begin, count);
  const int64_t pitch = winograd_sums_pitch(count);
  for (int64_t t = begin; t < end; ++t) {
    const WinogradTile tile(call, t);
    const float* from = static_cast<const float*>(call.target.data) + tile.target(call) + column;
    float* to = grads + (t - begin) * pitch;
    for (int64_t k = 0; k < count; k += n) {
      Vector<float> y[Forms::kOutputs], m[Forms::kElements];
      FASTSEG_UNROLL for (int64_t i = 0; i < Forms::kOutputs; ++i) {
        const int64_t place = tile.output(call, i / kWide, i % kWide);
        y[i] = place < 0 ? Vector<float>{} : load_columns(from + place + k, count - k);
      }
      Forms::of_grads(y, m);
      FASTSEG_UNROLL for (int64_t e = 0; e < Forms::kElements; ++e) {
        store(to + e * plane + k, m[e]);
      }
    }
  }
}

// Adds a block of tiles to grad_U of `count` columns and `depth` channels: a matrix
// [column][channel] for each element, `plane` apart.
inline void winograd_weight_products(int64_t elements, int64_t tiles, const float* v, int64_t depth,
                                     const float* grads, int64_t count, float* sums, int64_t plane,
                                     bool starts) {
  alignas(64) float tile[kTileRows * kTilePitch<float>];
  for (int64_t e = 0; e < elements; ++e) {
    for (int64_t k = 0; k < count; k += kTileRows) {
      const int64_t rows = count - k < kTileRows ? count - k : kTileRows;
      fill_tile(grads + e * winograd_grads_plane(tiles, count) + k, 1, winograd_sums_pitch(count),
                rows, tiles, tile);
      float* targets[kTileRows];
      for (int64_t i = 0; i < rows; ++i) targets[i] = sums + e * plane + (k + i) * depth;
      multiply_tile<float>(tile, kTilePitch<float>, static_cast<int>(rows),
                           v + e * winograd_panels_plane(tiles, depth), tiles, targets, depth,
                           starts, nullptr);
    }
  }
}

// grad_w [K][3][3][C] of `columns` columns and `depth` channels from grad_U; whether all of it is
// finite.
template <class Forms>
bool winograd_weights(const float* sums, int64_t plane, int64_t columns, int64_t depth, int64_t C,
                      float* grad) {
  constexpr int64_t n = kLanes<float>;
  Vector<float> poison = {};
  for (int64_t k = 0; k < columns; ++k) {
    for (int64_t c = 0; c < depth; c += n) {
      const int64_t count = depth - c;
      const float* from = sums + k * depth + c;
      Vector<float> w[9];
      Forms::of_sums([&](int64_t e) { return load_columns(from + e * plane, count); }, w);
      FASTSEG_UNROLL for (int64_t t = 0; t < 9; ++t) {
        poison += w[t] * 0.0f;
        store_columns(grad + (k * 9 + t) * C + c, w[t], count);
      }
    }
  }
  return is_zero(poison);
}

// ---- what the host calls ----

template <class Rows, class Columns>
constexpr winograd::Transforms winograd_transforms_of() {
  using Forms = WinogradForms<Rows, Columns>;
  return {winograd_filters<Forms>, winograd_inputs<Forms>, winograd_outputs<Forms>,
          winograd_panels<Forms>,  winograd_grads<Forms>,  winograd_weights<Forms>};
}

template <class Rows>
constexpr winograd::Transforms winograd_transforms_of(winograd::Form columns) {
  using namespace winograd;
  constexpr Transforms kAll[kForms] = {
      winograd_transforms_of<Rows, Two>(), winograd_transforms_of<Rows, Pair>(),
      winograd_transforms_of<Rows, Triple>(), winograd_transforms_of<Rows, Three>()};
  return kAll[static_cast<int32_t>(columns)];
}

inline winograd::Transforms winograd_transforms(const winograd::Forms& forms) {
  using namespace winograd;
  switch (forms.rows) {
    case Form::kTwo:
      return winograd_transforms_of<Two>(forms.columns);
    case Form::kPair:
      return winograd_transforms_of<Pair>(forms.columns);
    case Form::kTriple:
      return winograd_transforms_of<Triple>(forms.columns);
    default:
      return winograd_transforms_of<Three>(forms.columns);
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
