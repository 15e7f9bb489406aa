// Winograd's convolution F(2x2, 3x3) on the CPU: a 3x3 filter of stride 1 on tiles of 2x2 outputs,
// with 16 products a channel instead of 36. Plain arithmetic on the host, free of torch headers;
// winograd_cpu_kernels.h does the work.
//
// With dilation d the outputs of a tile are d apart, as are the 4x4 inputs they look at: a dilated
// convolution is d x d undilated ones of every d-th pixel.
//
//     V = B' x B       of a tile's 4x4 inputs, channel by channel
//     U = G w G'       of a filter's 3x3 taps
//     y = A' M A       with M = sum over channels of U * V, element by element
//
// where in one dimension  V = (x0 - x2, x1 + x2, x2 - x1, x1 - x3),
// U = (w0, (w0 + w1 + w2) / 2, (w0 - w1 + w2) / 2, w2),  y = (M0 + M1 + M2, M1 - M2 - M3).
//
// grad_input is the convolution of grad_y with the filter turned around. grad_weight is the same
// computation the other way round, one product for each element again:
//
//     grad_U = sum over tiles of V * (A grad_y A'),   grad_w = G' grad_U G
//
// All factors are powers of two, so that small integers stay exact; what lies outside the image is
// read as zero. Source: A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks,
// 2015.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "csrc/common/conv_shape.h"
#include "csrc/common/live_taps.h"
#include "csrc/dilated/dilated_cpu_plan.h"

namespace fastseg {
namespace winograd {

// Elements of a transformed tile or filter: M is one matrix product for each of them.
constexpr int64_t kElements = 16;
// Channels that are transformed and multiplied at a time. Their products are one chain of
// additions, and have to be few: M is larger than y, and so is its rounding.
constexpr int64_t kDepth = 64;
// Tiles at a time: as many as keep their V in the second-level cache, and are worth reading U.
constexpr int64_t kMaxTiles = 112;
// Output channels at a time, and elements of M: half of a last-level cache.
constexpr int64_t kMaxColumns = 512, kSums = 1 << 22;
// Tiles, input channels and output channels that a product of grad_weight takes at a time. The
// number of tiles must not depend on the threads, or the result would.
constexpr int64_t kWeightTiles = 256, kWeightChannels = 512, kWeightColumns = 256;

// The first outputs of the tiles along one axis; the others are `dilation` further.
inline std::vector<int64_t> tile_starts(int64_t targets, int64_t dilation) {
  std::vector<int64_t> starts;
  for (int64_t phase = 0; phase < std::min(dilation, targets); ++phase) {
    for (int64_t p = phase; p < targets; p += 2 * dilation) starts.push_back(p);
  }
  return starts;
}

// One convolution of targets [N, P, Q, columns] by sources [N, H, W, channels]: y over x, or grad_x
// over grad_y with the filter turned around. Channels are adjacent in both.
struct Call {
  int64_t N, H, W, channels;
  int64_t P, Q, columns;
  int64_t pad_top, pad_left;  // target p reads sources p - pad + (0, 1, 2) * dilation
  int64_t dilation_h, dilation_w;
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

// What a convolution costs this way, in multiply-adds: the 16 products of a tile, sums and
// differences of its inputs and outputs, and those of the filter. The weights of the latter are
// from times on 2 AVX-512 cores, those when others kept the last-level cache busy.
inline int64_t cost(const ConvShape& shape) {
  constexpr int64_t kOfPixels = 600, kOfFilter = 400;
  const auto along = [](int64_t targets, int64_t dilation) {
    return static_cast<int64_t>(tile_starts(targets, dilation).size());
  };
  const int64_t tiles =
      shape.N * along(shape.P, shape.dilation_h) * along(shape.Q, shape.dilation_w);
  const int64_t pairs = shape.C * shape.K;
  return tiles * (kElements * pairs + kOfPixels * (shape.C + shape.K)) + kOfFilter * pairs;
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

// Whether a convolution can be done this way, and is faster so by a tenth. Tests set
// FASTSEG_FORCE_WINOGRAD=1 to do it wherever it can be.
inline bool pays(const ConvShape& shape) {
  constexpr int64_t kFewChannels = 64;  // whose products are too small to be fast
  if (shape.R != 3 || shape.S != 3 || shape.stride_h != 1 || shape.stride_w != 1) return false;
  const char* forced = std::getenv("FASTSEG_FORCE_WINOGRAD");
  if (forced != nullptr && std::strcmp(forced, "1") == 0) return true;
  return std::min(shape.C, shape.K) >= kFewChannels && cost(shape) * 11 < direct_cost(shape) * 10;
}

}  // namespace winograd
}  // namespace fastseg
