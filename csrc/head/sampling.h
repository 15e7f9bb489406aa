// Which input pixels a bilinear resize reads along one axis: fastseg/ops/head/sampling.py in C++,
// for the host and for kernels. Free of torch headers.
//
// Output i looks at position max(step * (i + 0.5) - 0.5, 0) of the input, or step * i with
// align_corners. It lies `share` of the way from pixel `first` to pixel `second`:
//
//   output[i] = (1 - share) * input[first] + share * input[second]
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTSEG_HOST_DEVICE __host__ __device__
#else
#define FASTSEG_HOST_DEVICE
#endif

namespace fastseg {

struct SampleAxis {
  int64_t inputs, outputs;
  double step;  // how far apart two neighbouring outputs look at the input, in pixels
  bool align_corners;
};

// T is the type of positions: double for such tensors, else float.
template <class T, class Index = int64_t>
struct Sample {
  Index first, second;
  T share;
};

// `scale` is the scale factor that the caller gave, or 0.
inline SampleAxis sample_axis(int64_t inputs, int64_t outputs, double scale, bool align_corners) {
  const double n = static_cast<double>(inputs), m = static_cast<double>(outputs);
  double step = scale > 0 ? 1 / scale : n / m;
  if (align_corners) step = outputs > 1 ? (n - 1) / (m - 1) : 0;
  return {inputs, outputs, step, align_corners};
}

template <class T, class Index>
FASTSEG_HOST_DEVICE inline Sample<T, Index> sample_around(T position, Index inputs) {
  const Index last = inputs - 1;
  const Index first = position < static_cast<T>(last) ? static_cast<Index>(position) : last;
  const T share = position - static_cast<T>(first);
  return {first, first < last ? first + 1 : last, share < 1 ? share : T(1)};
}

// Float positions are rounded once: the steps to them are exact in double.
template <class T>
FASTSEG_HOST_DEVICE inline Sample<T> sample_at(const SampleAxis& axis, int64_t output) {
  const double step = static_cast<double>(static_cast<T>(axis.step));
  const double i = static_cast<double>(output);
  const double exact = axis.align_corners ? step * i : step * (i + 0.5) - 0.5;
  return sample_around(static_cast<T>(exact > 0 ? exact : 0), axis.inputs);
}

// An axis as kernels see it: 32-bit indices, and positions in T alone, with the same bits.
//
// Positions never decrease, so the outputs between two neighbouring input pixels, a "cell", are a
// range: cell h holds the outputs with first == h, from outputs_before(h) to outputs_before(h + 1).
// Input pixel h is read by the outputs of the cells h - 1 and h, and by no other.
template <class T>
struct KernelAxis {
  int inputs, outputs;
  T step, inverse_step;  // the inverse only for guesses; 0 for a step of 0
  bool align_corners;

  KernelAxis() = default;
  explicit KernelAxis(const SampleAxis& axis)
      : inputs(static_cast<int>(axis.inputs)),
        outputs(static_cast<int>(axis.outputs)),
        step(static_cast<T>(axis.step)),
        inverse_step(axis.step > 0 ? static_cast<T>(1 / axis.step) : T(0)),
        align_corners(axis.align_corners) {}

  FASTSEG_HOST_DEVICE Sample<T, int> sample(int output) const {
    const T i = static_cast<T>(output);
    const T position = align_corners ? step * i : std::fma(step, i + T(0.5), T(-0.5));
    return sample_around(position > 0 ? position : T(0), inputs);
  }

  FASTSEG_HOST_DEVICE int first(int output) const { return sample(output).first; }

  // How many outputs have first < `input`, for any integer: guessed by the inverse of the position,
  // then moved until it is exact.
  FASTSEG_HOST_DEVICE int outputs_before(int input) const {
    if (input <= 0) return 0;
    if (input >= inputs || !(step > 0)) return outputs;
    const T at = static_cast<T>(input);
    const T guess =
        align_corners ? at * inverse_step : std::fma(at + T(0.5), inverse_step, T(-0.5));
    int count = guess < static_cast<T>(outputs) ? static_cast<int>(guess) : outputs;
    while (count > 0 && first(count - 1) >= input) --count;
    while (count < outputs && first(count) < input) ++count;
    return count;
  }
};

}  // namespace fastseg
