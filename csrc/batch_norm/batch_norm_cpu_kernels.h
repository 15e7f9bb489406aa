// y = act(y * scale + shift) in place, and the sums that batch statistics are made of. Compiled
// once per instruction set: see csrc/common/simd.h.

#include "csrc/common/simd.h"

namespace fastseg {
namespace FASTSEG_SIMD {

// y: [rows][channels]; scale and shift: [channels].
template <class S, class A>
void scale_rows(S* y, int64_t rows, int64_t channels, const A* scale, const A* shift,
                Activation activation) {
  constexpr int64_t n = kLanes<A>;
  for (int64_t row = 0; row < rows; ++row, y += channels) {
    int64_t c = 0;
    for (; c + n <= channels; c += n) {
      const Vector<A> z = load(y + c) * load(scale + c) + load(shift + c);
      store(y + c, activate<A>(z, activation));
    }
    if (c < channels) {
      const int64_t rest = channels - c;
      Vector<A> z = load_first(y + c, rest) * load_first(scale + c, rest);
      z += load_first(shift + c, rest);
      store_first(y + c, activate<A>(z, activation), rest);
    }
  }
}

// y: [planes][pixels]; the scale and shift of plane i are those of channel (first + i) % channels.
template <class S, class A>
void scale_planes(S* y, int64_t first, int64_t planes, int64_t pixels, int64_t channels,
                  const A* scale, const A* shift, Activation activation) {
  constexpr int64_t n = kLanes<A>;
  for (int64_t plane = first; plane < first + planes; ++plane, y += pixels) {
    const Vector<A> a = broadcast(scale[plane % channels]), b = broadcast(shift[plane % channels]);
    int64_t i = 0;
    for (; i + n <= pixels; i += n) {
      const Vector<A> z = load(y + i) * a + b;
      store(y + i, activate<A>(z, activation));
    }
    if (i < pixels) {
      const Vector<A> z = load_first(y + i, pixels - i) * a + b;
      store_first(y + i, activate<A>(z, activation), pixels - i);
    }
  }
}

// Sums [channels] and sums of squares [channels] behind them, of `count` pixels with adjacent
// channels, which begin at pixels[i].
template <class S, class A>
void sum_pixels(const S* const* pixels, int64_t count, int64_t channels, A* sums) {
  constexpr int64_t n = kLanes<A>;
  for (int64_t c = 0; c < channels; c += n) {
    const int64_t live = channels - c;
    Vector<A> sum{}, squares{};
    for (int64_t i = 0; i < count; ++i) {
      const Vector<A> value = live >= n ? load(pixels[i] + c) : load_first(pixels[i] + c, live);
      sum += value;
      squares += value * value;
    }
    if (live >= n) {
      store(sums + c, sum);
      store(sums + channels + c, squares);
    } else {
      store_first(sums + c, sum, live);
      store_first(sums + channels + c, squares, live);
    }
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
