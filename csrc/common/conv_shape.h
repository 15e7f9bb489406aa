// The shape of one 2-D convolution, as every kernel receives it: a plain struct passed by value,
// free of torch headers.
#pragma once

#include <cstdint>

namespace fastseg {

// Applied to the accumulator before it is rounded to the output's dtype.
enum class Activation : int32_t { kNone = 0, kRelu = 1, kRelu6 = 2, kHardswish = 3, kSilu = 4 };

// Sizes in elements. The output pixel (p, q) reads the input pixel
//   (p * stride_h - pad_top + r * dilation_h, q * stride_w - pad_left + s * dilation_w)
// for every filter tap (r, s) that lands inside the image. Padding below and to the right of the
// image only shows in P and Q.
struct ConvShape {
  int64_t N, C, H, W;  // input
  int64_t K, P, Q;     // output channels, height, width
  int64_t R, S;        // filter height, width
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;
  int64_t dilation_h, dilation_w;

  // Output channels per input channel of a depthwise convolution: k reads c = k / multiplier().
  constexpr int64_t multiplier() const { return K / C; }
};

// Distances in elements between neighbours of a [N, C, H, W] tensor, or of a weight [K, C, R, S].
struct Strides4 {
  int64_t n, c, h, w;
};

}  // namespace fastseg
