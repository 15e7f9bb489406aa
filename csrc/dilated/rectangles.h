// How the targets of a dense convolution are cut into rectangles on which the live taps are the
// same.
//
// A tap that looks at padding adds nothing, but an implicit matrix product over all taps pays for
// it. At ASPP's rates most taps do: along each axis tap t of output p reads p * stride - pad + t *
// dilation, so it goes in and out of the image at fixed p. Cutting both axes there leaves, for a
// 3x3 filter with "same" padding, at most nine rectangles, each with a static list of taps and no
// bounds tests. A rate that leaves one tap alive is a 1x1 convolution by this rule, not by a
// special case.
//
// grad_input is the same with inputs as targets; a stride splits those into classes, which are
// rectangles with gaps (period > 1). grad_weight uses the forward rectangles: tap (r, s) sums over
// those that list it.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/common/conv_shape.h"
#include "csrc/common/live_taps.h"

namespace fastseg {
namespace dilated {

// Targets index + period * j for j in [0, count), and the taps that are live there: target j reads
// source taps[i].source + step * j.
struct Span {
  int64_t index, period, count;
  int64_t step;
  std::vector<Tap> taps;
};

struct Rectangle {
  Span rows, columns;

  int64_t area() const { return rows.count * columns.count; }
  int64_t taps() const { return static_cast<int64_t>(rows.taps.size() * columns.taps.size()); }
};

inline std::vector<Span> spans_of(const Axis& axis) {
  std::vector<Span> spans;
  for (size_t index = 0; index < axis.classes.size(); ++index) {
    const AxisClass& cls = axis.classes[index];
    for (const Segment& segment : cls.segments) {
      Span span{static_cast<int64_t>(index) + axis.period * segment.begin,
                axis.period,
                segment.end - segment.begin,
                axis.step,
                {}};
      for (int64_t t = segment.first; t < segment.last; ++t) {
        const Tap& tap = cls.taps[t];
        span.taps.push_back({tap.source + axis.step * segment.begin, tap.weight});
      }
      spans.push_back(span);
    }
  }
  return spans;
}

inline std::vector<Rectangle> rectangles_of(const Axes& axes) {
  std::vector<Rectangle> rectangles;
  for (const Span& rows : spans_of(axes.rows)) {
    for (const Span& columns : spans_of(axes.columns)) rectangles.push_back({rows, columns});
  }
  return rectangles;
}

// Every output lies in exactly one rectangle; one without taps holds the bias alone.
inline std::vector<Rectangle> output_rectangles(const ConvShape& shape) {
  return rectangles_of(output_axes(shape));
}

// Every input lies in exactly one rectangle; one without taps has gradient zero.
inline std::vector<Rectangle> input_rectangles(const ConvShape& shape) {
  return rectangles_of(input_axes(shape));
}

}  // namespace dilated
}  // namespace fastseg
