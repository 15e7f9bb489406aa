// Which taps of a filter are live where, along one axis of a convolution: those that read the image
// and not its padding. Plain arithmetic on the host.
//
// Forward and grad_input are the same computation, target[j] = sum over taps of weight * source:
// forward has targets y and sources x, grad_input targets grad_x and sources grad_y. Only the index
// map differs; output_axis() and input_axis() state it once for each direction.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "csrc/common/conv_shape.h"

namespace fastseg {

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }  // b > 0
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One filter tap along one axis: position j reads source j * step + source.
struct Tap {
  int64_t source;
  int64_t weight;  // index along the filter
};

// Positions [begin, end), all with the live taps [first, last).
struct Segment {
  int64_t begin, end;
  int64_t first, last;
};

// The targets index + period * j, j = 0, 1, ...: away from the border they share their taps.
struct AxisClass {
  std::vector<Tap> taps;  // ascending in source
  std::vector<Segment> segments;
};

struct Axis {
  int64_t targets, sources;
  int64_t period, step;
  std::vector<AxisClass> classes;
};

// The positions [begin, end) of an axis' class at which `tap` reads the image.
struct LiveRange {
  int64_t begin, end;
};

inline LiveRange live_range(const Axis& axis, const Tap& tap, int64_t positions) {
  return {std::clamp<int64_t>(ceil_div(-tap.source, axis.step), 0, positions),
          std::clamp<int64_t>(ceil_div(axis.sources - tap.source, axis.step), 0, positions)};
}

// Cuts the positions of a class where a tap enters or leaves the image, so that inside a segment
// nothing needs a bounds test and padding is never touched.
inline void cut_segments(const Axis& axis, int64_t index, AxisClass* cls) {
  const int64_t positions = ceil_div(axis.targets - index, axis.period);
  const int64_t count = static_cast<int64_t>(cls->taps.size());
  const auto live_from = [&](const Tap& tap) { return live_range(axis, tap, positions).begin; };
  const auto live_to = [&](const Tap& tap) { return live_range(axis, tap, positions).end; };
  std::vector<int64_t> cuts = {0, positions};
  cuts.reserve(2 * cls->taps.size() + 2);
  for (const Tap& tap : cls->taps) {
    cuts.push_back(live_from(tap));
    cuts.push_back(live_to(tap));
  }
  std::sort(cuts.begin(), cuts.end());
  // Both ends of a tap's live range move down as its source moves up.
  int64_t first = count, last = count;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const int64_t begin = cuts[i], end = cuts[i + 1];
    if (begin == end) continue;
    while (first > 0 && live_from(cls->taps[first - 1]) <= begin) --first;
    while (last > 0 && live_to(cls->taps[last - 1]) <= begin) --last;
    cls->segments.push_back({begin, end, std::min(first, last), last});
  }
}

// Forward: output p reads input p * stride - pad + t * dilation.
inline Axis output_axis(int64_t input, int64_t output, int64_t kernel, int64_t stride, int64_t pad,
                        int64_t dilation) {
  Axis axis{output, input, 1, stride, std::vector<AxisClass>(1)};
  AxisClass& cls = axis.classes[0];
  cls.taps.reserve(kernel);
  for (int64_t t = 0; t < kernel; ++t) cls.taps.push_back({t * dilation - pad, t});
  cut_segments(axis, 0, &cls);
  return axis;
}

// Its inverse: input h is read through tap t by output (h + pad - t * dilation) / stride, where
// that divides. The stride splits the inputs into classes.
inline Axis input_axis(int64_t input, int64_t output, int64_t kernel, int64_t stride, int64_t pad,
                       int64_t dilation) {
  Axis axis{input, output, stride, 1, std::vector<AxisClass>(std::min(stride, input))};
  for (size_t index = 0; index < axis.classes.size(); ++index) {
    AxisClass& cls = axis.classes[index];
    for (int64_t t = kernel - 1; t >= 0; --t) {
      const int64_t distance = static_cast<int64_t>(index) + pad - t * dilation;
      if (distance % stride == 0) cls.taps.push_back({distance / stride, t});
    }
    cut_segments(axis, index, &cls);
  }
  return axis;
}

struct Axes {
  Axis rows, columns;
};

inline Axes output_axes(const ConvShape& shape) {
  return {output_axis(shape.H, shape.P, shape.R, shape.stride_h, shape.pad_top, shape.dilation_h),
          output_axis(shape.W, shape.Q, shape.S, shape.stride_w, shape.pad_left, shape.dilation_w)};
}

inline Axes input_axes(const ConvShape& shape) {
  return {input_axis(shape.H, shape.P, shape.R, shape.stride_h, shape.pad_top, shape.dilation_h),
          input_axis(shape.W, shape.Q, shape.S, shape.stride_w, shape.pad_left, shape.dilation_w)};
}

}  // namespace fastseg
