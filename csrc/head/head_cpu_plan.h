// What a CPU call of the head family decides before any kernel runs: which pixels every output
// reads and by what weights, as tables in the order in which kernels take them. Free of torch
// headers, compiled once (not per instruction set).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "csrc/head/sampling.h"

namespace fastseg {
namespace head_cpu {

// What vectors of T are shuffled by.
template <class T>
using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// The tables of one call; they live as long as this.
class Tables {
 public:
  template <class T>
  T* take(int64_t count) {
    const int64_t words = (count * static_cast<int64_t>(sizeof(T)) + 7) / 8;
    blocks_.emplace_back(new int64_t[words]);
    return reinterpret_cast<T*>(blocks_.back().get());
  }

 private:
  std::vector<std::unique_ptr<int64_t[]>> blocks_;
};

template <class T>
const Sample<T>* samples_of(const SampleAxis& axis, Tables* tables) {
  Sample<T>* samples = tables->take<Sample<T>>(axis.outputs);
  for (int64_t i = 0; i < axis.outputs; ++i) samples[i] = sample_at<T>(axis, i);
  return samples;
}

// How a row of outputs is put together a vector at a time: lane l of vector v lies share[v][l] of
// the way from row[base[v] + first[v][l]] to row[base[v] + second[v][l]]. Lanes past the last
// output repeat it.
template <class T>
struct Spread {
  int64_t inputs, outputs, vectors;
  int64_t sources;  // 1 or 2: that many vectors from row[base[v]] on hold all of it; 0: more would
  const int64_t* base;    // [vectors]
  const Index<T>* first;  // [vectors][lanes]
  const Index<T>* second;
  const T* share;
};

// `inner` elements of a row belong to one pixel.
template <class T>
Spread<T> spread_of(const SampleAxis& axis, const Sample<T>* samples, int64_t inner, int64_t lanes,
                    Tables* tables) {
  Spread<T> spread;
  spread.inputs = axis.inputs * inner;
  spread.outputs = axis.outputs * inner;
  spread.vectors = (spread.outputs + lanes - 1) / lanes;
  int64_t* base = tables->take<int64_t>(spread.vectors);
  Index<T>* first = tables->take<Index<T>>(spread.vectors * lanes);
  Index<T>* second = tables->take<Index<T>>(spread.vectors * lanes);
  T* share = tables->take<T>(spread.vectors * lanes);
  std::vector<int64_t> lowest(spread.vectors);
  int64_t widest = 1;
  const auto sample_of = [&](int64_t i) -> Sample<T> {
    const int64_t output = std::min(i, spread.outputs - 1);
    if (inner == 1) return samples[output];
    const Sample<T>& s = samples[output / inner];
    return {s.first * inner + output % inner, s.second * inner + output % inner, s.share};
  };
  for (int64_t v = 0; v < spread.vectors; ++v) {
    int64_t low = spread.inputs, high = 0;
    for (int64_t i = v * lanes; i < (v + 1) * lanes; ++i) {
      const Sample<T> s = sample_of(i);
      low = std::min(low, s.first), high = std::max(high, s.second);
    }
    lowest[v] = low;
    widest = std::max(widest, high - low + 1);
  }
  spread.sources = widest <= lanes ? 1 : widest <= 2 * lanes ? 2 : 0;
  for (int64_t v = 0; v < spread.vectors; ++v) {
    // So low that whole vectors can be read, if the row has as many elements.
    base[v] = std::min(lowest[v], std::max<int64_t>(0, spread.inputs - spread.sources * lanes));
    for (int64_t i = v * lanes; i < (v + 1) * lanes; ++i) {
      const Sample<T> s = sample_of(i);
      first[i] = static_cast<Index<T>>(s.first - base[v]);
      second[i] = static_cast<Index<T>>(s.second - base[v]);
      share[i] = s.share;
    }
  }
  spread.base = base, spread.first = first, spread.second = second, spread.share = share;
  return spread;
}

// The transpose of the samples of an axis: input i goes by weight[offset[i] + k] into output
// begin[i] + k, for k < count[i]. Outputs that read it by a weight of zero are among them, so that
// what is not finite arrives where PyTorch lets it arrive.
template <class T>
struct Taps {
  const int64_t *begin, *count, *offset;  // [inputs]
  const T* weight;
  int64_t most;  // the largest count
};

template <class T>
Taps<T> taps_of(const SampleAxis& axis, const Sample<T>* samples, Tables* tables) {
  int64_t* begin = tables->take<int64_t>(axis.inputs);
  int64_t* count = tables->take<int64_t>(axis.inputs);
  int64_t* offset = tables->take<int64_t>(axis.inputs);
  T* weight = tables->take<T>(2 * axis.outputs);
  std::fill_n(begin, axis.inputs, 0);
  std::fill_n(count, axis.inputs, 0);
  const auto reads = [&](int64_t input, int64_t output) {
    if (count[input] == 0) begin[input] = output;
    count[input] = output + 1 - begin[input];  // positions never decrease
  };
  for (int64_t i = 0; i < axis.outputs; ++i) {
    reads(samples[i].first, i);
    reads(samples[i].second, i);
  }
  int64_t used = 0;
  for (int64_t i = 0; i < axis.inputs; ++i) {
    offset[i] = used;
    for (int64_t k = 0; k < count[i]; ++k) {
      const Sample<T>& s = samples[begin[i] + k];
      weight[used + k] = (s.first == i ? 1 - s.share : 0) + (s.second == i ? s.share : 0);
    }
    used += count[i];
  }
  return {begin, count, offset, weight, *std::max_element(count, count + axis.inputs)};
}

// Neighbouring output rows between the same two input rows.
struct Strip {
  int64_t above, below;  // input rows
  int64_t begin, rows;   // output rows
};

// The strips of an image from top to bottom, cut at `most` rows: never by the number of threads.
template <class T>
std::vector<Strip> strips_of(const SampleAxis& axis, const Sample<T>* samples, int64_t most) {
  std::vector<Strip> strips;
  for (int64_t p = 0; p < axis.outputs; ++p) {
    const Sample<T>& s = samples[p];
    if (strips.empty() || strips.back().above != s.first || strips.back().rows == most) {
      strips.push_back({s.first, s.second, p, 0});
    }
    ++strips.back().rows;
  }
  return strips;
}

// A resize or its gradient on contiguous tensors: `images` of [height][width][channels], which are
// N images with C channels in channels-last memory, and N * C with one channel else.
template <class T>
struct Resize {
  int64_t images, channels, h, w, P, Q;  // [h, w] is the low-resolution side, [P, Q] the other
  const void* source;
  void* target;
  const Sample<T>*rows, *columns;  // [P], [Q]
  Spread<T> spread;                // forward with few channels
  Taps<T> row_taps, column_taps;   // backward
  int64_t block, blocks;           // forward: columns, backward: channels of a task; how many
  bool direct;                     // forward: resized input rows are not kept
  bool streams;                    // targets are written past the caches
};

// Logits [N, C, h, w] with any strides (in elements), seen at [P, Q].
template <class T>
struct Logits {
  const void* data;
  int64_t N, C, h, w, P, Q;
  int64_t stride_n, stride_c, stride_h, stride_w;
  const Sample<T>* rows;  // [P]
  Spread<T> spread;
  const Strip* strips;  // of one image
  int64_t strip_count;
};

template <class T>
struct Argmax {
  Logits<T> logits;
  void* labels;  // [N, P, Q] int64_t, or uint8_t
  bool bytes;
};

template <class T>
struct Loss {
  Logits<T> logits;
  const int64_t* target;  // [N, P, Q]
  const T* weight;        // [C]
  int64_t ignore_index;
  T certain;             // the share of the target that goes to its own class, times its weight
  T spread;              // the share that goes to each class, times that class's weight
  T spread_total;        // spread * the sum of weights
  const T* grad_losses;  // [N, P, Q], or null: ones
  T* losses;             // [N, P, Q], or null
  double *row_losses, *row_weights;  // [N, P] sums
  int64_t* row_offenders;            // [N, P] the first column whose target is no class, or -1
  // Gradient only: [N, C, h, w].
  T* gradient;
  bool channels_last;
  Taps<T> column_taps;
  const int64_t*
      first_strip;  // [h + 1]: strips [first_strip[i], first_strip[i + 1]) lie below row i
};

}  // namespace head_cpu
}  // namespace fastseg
