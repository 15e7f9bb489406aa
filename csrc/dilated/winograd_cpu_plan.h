// Winograd's convolution on the CPU: a 3x3 filter of stride 1 on tiles of a few outputs, with fewer
// products a channel than outputs have taps. Plain arithmetic on the host, free of torch headers;
// winograd_cpu_kernels.h does the work.
//
// With dilation d the outputs of a tile are d apart, as are the inputs they look at: a dilated
// convolution is d x d undilated ones of every d-th pixel. Those are small images at DeepLab's
// rates, down to two pixels a side. Each axis has its form, see winograd_forms.h:
//
//     V = B x B'       of a tile's inputs, channel by channel
//     U = G w G'       of a filter's 3x3 taps
//     y = A M A'       with M = sum over channels of U * V, element by element
//
//     form       outputs   products      of the 9 (inside) products of each output remain
//     kTwo         2x2       4x4         4
//     kTwo, kThree 2x3       4x5         3.33
//     kTriple      3x3       5x5         2.78, where the image leaves 5.44
//     kPair        2x2       3x3         2.25, where the image leaves 4
//
// Two axes of kThree would round too coarsely, and but for AVX-512 one does. grad_input is the
// convolution of grad_y with the filter turned around. grad_weight is the same computation the
// other way round, one product for each element again:
//
//     grad_U = sum over tiles of V * (A' grad_y A),   grad_w = G' grad_U G
//
// What lies outside the image is read as zero.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "csrc/common/conv_shape.h"
#include "csrc/common/live_taps.h"
#include "csrc/common/simd.h"
#include "csrc/dilated/dilated_cpu_plan.h"
#include "csrc/dilated/winograd_forms.h"

namespace fastseg {
namespace winograd {

// Channels that are transformed and multiplied at a time. Their products are one chain of
// additions, and have to be few: M is larger than y, and so is its rounding.
constexpr int64_t kDepth = 64;
// Elements of V of a channel at a time: as many as stay in the second-level cache, and are worth
// reading U.
constexpr int64_t kMaxElements = 1792;
// Output channels at a time, and elements of M: of all threads together a quarter of a last-level
// cache, and of one at least part of its own.
constexpr int64_t kMaxColumns = 256, kSums = 1 << 21, kLeastSums = 1 << 18;
// Tiles, input channels and output channels that a product of grad_weight takes at a time. The
// number of tiles must not depend on the threads, or the result would.
constexpr int64_t kWeightTiles = 128, kWeightChannels = 256, kWeightColumns = 128;

// The first outputs of the tiles along one axis; the others are `dilation` further.
inline std::vector<int64_t> tile_starts(Form form, int64_t targets, int64_t dilation) {
  std::vector<int64_t> starts;
  for (int64_t phase = 0; phase < std::min(dilation, targets); ++phase) {
    for (int64_t p = phase; p < targets; p += size_of(form).outputs * dilation) starts.push_back(p);
  }
  return starts;
}

// How many tiles that are.
inline int64_t tile_count(Form form, int64_t targets, int64_t dilation) {
  const int64_t outputs = size_of(form).outputs, longer = targets % dilation;
  return longer * ceil_div(targets / dilation + 1, outputs) +
         (dilation - longer) * ceil_div(targets / dilation, outputs);
}

// One axis of a convolution: target p reads sources p - pad + (0, 1, 2) * dilation.
struct TiledAxis {
  int64_t targets, sources, pad, dilation;
};

// Whether the inputs that a form takes for padding are padding, in every tile.
inline bool fits(Form form, const TiledAxis& axis) {
  const FormSize size = size_of(form);
  if (size.inputs == size.outputs + 2) return true;
  const auto is_padding = [&](int64_t source) { return source < 0 || source >= axis.sources; };
  for (int64_t phase = 0; phase < std::min(axis.dilation, axis.targets); ++phase) {
    for (int64_t p = phase; p < axis.targets; p += size.outputs * axis.dilation) {
      const int64_t first = p - axis.pad, last = first + (size.outputs + 1) * axis.dilation;
      if (!is_padding(first) || !is_padding(last)) return false;
    }
  }
  return true;
}

// One convolution of targets [N, P, Q, columns] by sources [N, H, W, channels]: y over x, or grad_x
// over grad_y with the filter turned around. Channels are adjacent in both.
struct Call {
  int64_t N, H, W, channels;
  int64_t P, Q, columns;
  int64_t pad_top, pad_left;
  int64_t dilation_h, dilation_w;
  int64_t elements;  // of U, V and M: one matrix product for each of them
  dilated_cpu::Image source, target;
  const int64_t *row_starts, *column_starts;  // tile_starts() of both axes
  int64_t row_count, column_count;
  const float* scale;  // [columns], or nullptr
  const float* bias;   // likewise
  Activation activation;

  int64_t tiles() const { return N * row_count * column_count; }
};

// The taps of a 3x3 filter [columns][channels], in elements.
struct Taps {
  const float* data;
  int64_t column, channel;  // distances
  int64_t row, tap;
};

// How a convolution is done: the form of each axis.
struct Forms {
  Form rows, columns;

  int64_t elements() const { return size_of(rows).products * size_of(columns).products; }
};

inline TiledAxis rows_of(const ConvShape& shape) {
  return {shape.P, shape.H, shape.pad_top, shape.dilation_h};
}
inline TiledAxis columns_of(const ConvShape& shape) {
  return {shape.Q, shape.W, shape.pad_left, shape.dilation_w};
}

// The kernels of two forms, for one instruction set.
struct Transforms {
  void (*filters)(const Taps&, int64_t, int64_t, int64_t, float*);
  void (*inputs)(const Call&, int64_t, int64_t, int64_t, int64_t, char*);
  bool (*outputs)(const Call&, int64_t, int64_t, const float*);
  void (*panels)(const Call&, int64_t, int64_t, int64_t, int64_t, float*);
  void (*grads)(const Call&, int64_t, int64_t, int64_t, int64_t, float*);
  bool (*weights)(const float*, int64_t, int64_t, int64_t, int64_t, float*);
};

// What a convolution of some tiles costs this way, in multiply-adds: their products, sums and
// differences of their inputs and outputs, and those of the filter. The weights of the latter are
// from times on 2 AVX-512 cores.
inline int64_t cost(const Forms& forms, int64_t tiles, int64_t channels, int64_t columns) {
  constexpr int64_t kOfPixels = 15, kOfFilter = 12;  // an element
  const int64_t pairs = channels * columns;
  return forms.elements() *
         (tiles * (pairs + kOfPixels * (channels + columns)) + kOfFilter * pairs);
}

inline int64_t cost(const Forms& forms, const ConvShape& shape) {
  const int64_t tiles = shape.N * tile_count(forms.rows, shape.P, shape.dilation_h) *
                        tile_count(forms.columns, shape.Q, shape.dilation_w);
  return cost(forms, tiles, shape.C, shape.K);
}

// Whether results would be less accurate than PyTorch's, whose own sums are shorter where vectors
// are.
inline bool is_coarse(const Forms& forms) {
  const int threes = (forms.rows == Form::kThree) + (forms.columns == Form::kThree);
  return threes > (capability() == Capability::kAvx512 ? 1 : 0);
}

// The forms that cost least.
inline Forms best_forms(const ConvShape& shape) {
  Forms best = {Form::kTwo, Form::kTwo};
  for (int32_t i = 0; i < kForms * kForms; ++i) {
    const Forms forms = {static_cast<Form>(i / kForms), static_cast<Form>(i % kForms)};
    if (!is_coarse(forms) && fits(forms.rows, rows_of(shape)) &&
        fits(forms.columns, columns_of(shape)) && cost(forms, shape) < cost(best, shape)) {
      best = forms;
    }
  }
  return best;
}

// Of multiplying with every live tap.
inline int64_t direct_cost(const ConvShape& shape) {
  const auto live_taps = [](const Axis& axis) {
    int64_t count = 0;
    for (const Segment& s : axis.classes[0].segments)
      count += (s.end - s.begin) * (s.last - s.first);
    return count;
  };
  const Axes axes = output_axes(shape);
  return shape.N * live_taps(axes.rows) * live_taps(axes.columns) * shape.C * shape.K;
}

// The forms of a convolution that can be done this way, and is faster so. Tests set
// FASTSEG_FORCE_WINOGRAD=1 to do it wherever it can be, and =0 to do it nowhere.
inline std::optional<Forms> forms_that_pay(const ConvShape& shape) {
  constexpr int64_t kFewChannels = 32;  // whose products are too small to be fast
  if (shape.R != 3 || shape.S != 3 || shape.stride_h != 1 || shape.stride_w != 1) return {};
  const Forms best = best_forms(shape);
  const char* forced = std::getenv("FASTSEG_FORCE_WINOGRAD");
  const bool pays = forced != nullptr ? std::strcmp(forced, "1") == 0
                                      : std::min(shape.C, shape.K) >= kFewChannels &&
                                            cost(best, shape) < direct_cost(shape);
  return pays ? std::optional(best) : std::nullopt;
}

}  // namespace winograd
}  // namespace fastseg
