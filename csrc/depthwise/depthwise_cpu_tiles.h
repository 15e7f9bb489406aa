// Tiles: up to eight neighbouring positions of a target row, any list of taps. Compiled once per
// instruction set: see csrc/common/simd.h.
//
// A segment of a row has the same live taps everywhere, so a tile is a plain double loop, without
// bounds tests:
//
//   for every vector of channels: for every tap: for j in the tile: acc[j] += weight * source[j *
//   step]
//
// The weight is loaded once a tile and tap, the accumulators stay in registers. The fused backward
// pass multiplies the same loaded source, grad_y, by x[j] for grad_weight: both gradients read
// grad_y once. Its partial sums run over one tile before they go to memory.

#include "csrc/depthwise/depthwise_cpu_rows.h"

namespace fastseg {
namespace FASTSEG_SIMD {

// One live filter row: the source row it reads, its weights and their gradient [S][lanes].
template <class Source, class A>
struct RowTap {
  const Source* source;
  int64_t ahead;  // elements to a row that the next target row reads first, to fetch it, or 0
  const A* weight;
  A* grad_weight;
};

// One target row and all that it reads. Strides are elements from pixel to pixel.
template <class Source, class Target, class A>
struct RowJob {
  const RowTap<Source, A>* taps;
  int64_t tap_count;
  int64_t source_stride;
  const A* init;  // [lanes], what every target starts from
  Target* target;
  int64_t target_stride;
  Activation activation;
  int64_t target_ahead;  // elements to the target row that comes next, to fetch it, or 0
  bool streams;          // targets past the caches
  const Source* x;       // the row of x under the target row, for grad_weight
  int64_t x_stride;
  int64_t lanes;     // from filter tap to filter tap
  int64_t channels;  // at least a vector of them
  int64_t x_ahead;   // elements to the row of x to fetch into the cache, or 0
};

// One live tap of a segment, at its position 0.
template <class Source, class A>
struct FlatTap {
  const Source* source;
  int64_t ahead;
  const A* weight;
  A* grad_weight;
};

template <class Source, class Target, class A>
struct TileJob {
  const FlatTap<Source, A>* taps;
  const FlatTap<Source, A>* taps_end;
  int64_t source_step, target_step, x_step;  // elements from position to position
  int64_t source_pixel;                      // elements from column to column
  const A* init;
  Target* target;
  Activation activation;
  int64_t target_ahead;
  bool streams;
  const Source* x;
  int64_t channels;
  int64_t weight_step;  // slide: elements from filter column to filter column
};

// The vectors of a row start at channels 0, n, 2n, ..., but the last one ends with the last
// channel: it overlaps the one before it, and computes again what that did. Sums over x must not
// count the overlap twice.
template <class A>
struct VectorAt {
  int64_t channel, overlap;

  FASTSEG_INLINE VectorAt(int64_t c, int64_t channels)
      : channel(min_of(c, channels - kLanes<A>)), overlap(c - channel) {}
};

// kGroup vectors of channels at once, from channel c.
template <class Source, class Target, class A, int kTile, int kGroup, bool kInput, bool kWeight>
FASTSEG_INLINE void tile(const TileJob<Source, Target, A>& job, int64_t position, int64_t c,
                         int64_t overlap) {
  constexpr int64_t n = kLanes<A>;
  Vector<A> acc[kGroup][kTile], x[kGroup][kTile];
  if constexpr (kInput) {
    FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
      FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) acc[g][j] = load(job.init + c + g * n);
    }
  }
  if constexpr (kWeight) {
    const Source* x_at = job.x + position * job.x_step + c;
    FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
      FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) x[g][j] = load(x_at + g * n);
      x_at += job.x_step;
      FASTSEG_OPAQUE(x_at);
    }
  }
  const int64_t at = position * job.source_step + c;
  for (const FlatTap<Source, A>* tap = job.taps; tap != job.taps_end; ++tap) {
    const Source* source = tap->source + at;
    Vector<A> weight[kGroup], even[kGroup], odd[kGroup];
    FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
      if constexpr (kInput) weight[g] = load(tap->weight + c + g * n);
      even[g] = odd[g] = Vector<A>{};
    }
    FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
      FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
        const Vector<A> value = load(source + g * n);
        if constexpr (kInput) acc[g][j] += weight[g] * value;
        if constexpr (kWeight) {
          // Two chains, for the latency of an addition.
          if (j % 2 == 0) {
            even[g] += x[g][j] * value;
          } else {
            odd[g] += x[g][j] * value;
          }
        }
      }
      source += job.source_step;
      FASTSEG_OPAQUE(source);
    }
    if constexpr (kWeight) {
      A* sum = tap->grad_weight + c;
      FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
        Vector<A> added = even[g] + odd[g];
        if (overlap > 0) added = zero_first<A>(added, overlap);
        store(sum + g * n, load(sum + g * n) + added);
      }
    }
  }
  if constexpr (kInput) {
    activate_all<A, kGroup * kTile>(acc[0], job.activation);
    Target* target = job.target + position * job.target_step + c;
    FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
      FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
        put<kGroup>(target + g * n, acc[g][j], job.streams);
      }
      target += job.target_step;
      FASTSEG_OPAQUE(target);
    }
  }
}

// The same for kTaps neighbouring filter columns, of which the list holds the first of each row: a
// source is loaded once a row and slides through all of them.
template <class Source, class Target, class A, int kTile, int kTaps, int kStep, int kDilation,
          int kGroup>
FASTSEG_INLINE void slide(const TileJob<Source, Target, A>& job, int64_t position, int64_t c) {
  constexpr int64_t n = kLanes<A>;
  constexpr int kReach = (kTile - 1) * kStep + (kTaps - 1) * kDilation + 1;
  Vector<A> acc[kGroup][kTile];
  FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
    FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) acc[g][j] = load(job.init + c + g * n);
  }
  const int64_t at = position * job.source_step + c, pixel = job.source_pixel;
  for (const FlatTap<Source, A>* tap = job.taps; tap != job.taps_end; ++tap) {
    const Source* source = tap->source + at;
    Vector<A> weight[kGroup][kTaps];
    FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
      FASTSEG_UNROLL for (int t = 0; t < kTaps; ++t) {
        weight[g][t] = load(tap->weight + t * job.weight_step + c + g * n);
      }
    }
    FASTSEG_UNROLL for (int i = 0; i < kReach; ++i) {
      FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
        const Vector<A> value = load(source + g * n);
        FASTSEG_UNROLL for (int t = 0; t < kTaps; ++t) {
          const int from = i - t * kDilation;
          if (from >= 0 && from % kStep == 0 && from / kStep < kTile) {
            acc[g][from / kStep] += weight[g][t] * value;
          }
        }
      }
      source += pixel;
      FASTSEG_OPAQUE(source);
    }
    if (tap->ahead != 0) {
      FASTSEG_UNROLL for (int i = 0; i < kTile * kStep; ++i) {
        source -= pixel;
        FASTSEG_OPAQUE(source);
        FASTSEG_UNROLL for (int g = 0; g < kGroup; g += kLine) {
          __builtin_prefetch(source + tap->ahead + g * n);
        }
      }
    }
  }
  activate_all<A, kGroup * kTile>(acc[0], job.activation);
  Target* target = job.target + position * job.target_step + c;
  FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
    if (job.target_ahead != 0) {
      FASTSEG_UNROLL for (int g = 0; g < kGroup; g += kLine)
          __builtin_prefetch(target + job.target_ahead + g * n, 1);
    }
    FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
      put<kGroup>(target + g * n, acc[g][j], job.streams);
    }
    target += job.target_step;
    FASTSEG_OPAQUE(target);
  }
}

// What a loop over tiles calls, and how wide its tiles may be: accumulators, x and temporaries must
// fit the registers, 32 with AVX-512 and 16 before.
constexpr bool kManyRegisters = FASTSEG_SIMD_BYTES == 64;

template <class A, bool kInput, bool kWeight>
struct AnyTaps {
  static constexpr int64_t kNarrowest = 1, kWidest = kWeight && !kManyRegisters ? 4 : 8;

  template <int kTile, class Source, class Target>
  static FASTSEG_INLINE void run(const TileJob<Source, Target, A>& job, int64_t position) {
    constexpr int64_t n = kLanes<A>;
    // Narrow tiles, at the border, take more channels at once to keep the multipliers busy.
    constexpr int kGroup = kTile == 1 ? 4 : kTile == 2 ? 2 : 1;
    int64_t c = 0;
    if constexpr (kGroup > 1) {
      for (; c + kGroup * n <= job.channels; c += kGroup * n) {
        tile<Source, Target, A, kTile, kGroup, kInput, kWeight>(job, position, c, 0);
      }
    }
    for (; c < job.channels; c += n) {
      const VectorAt<A> at(c, job.channels);
      tile<Source, Target, A, kTile, 1, kInput, kWeight>(job, position, at.channel, at.overlap);
    }
  }
};

// With kLines, narrower ones that fill whole cache lines, for targets that go past the caches.
template <class A, int kTaps, int kStep, int kDilation, bool kLines>
struct Sliding {
  static constexpr int64_t kNarrowest = kLines ? 2 : 4;
  static constexpr int64_t kWidest = kLines ? 4 : kManyRegisters || kTaps == 3 ? 8 : 6;

  template <int kTile, class Source, class Target>
  static FASTSEG_INLINE void run(const TileJob<Source, Target, A>& job, int64_t position) {
    constexpr int64_t n = kLanes<A>;
    // With two new sources a target the loads are the limit: whole pairs of cache lines.
    constexpr int kGroup = kLines ? kLine : kManyRegisters && kStep == 2 && kTaps <= 5 ? 2 : 1;
    int64_t c = 0;
    if constexpr (kGroup > 1) {
      for (; c + kGroup * n <= job.channels; c += kGroup * n) {
        slide<Source, Target, A, kTile, kTaps, kStep, kDilation, kGroup>(job, position, c);
      }
    }
    for (; c < job.channels; c += n) {
      const VectorAt<A> at(c, job.channels);
      slide<Source, Target, A, kTile, kTaps, kStep, kDilation, 1>(job, position, at.channel);
    }
  }
};

template <class Form, int kTile, class Job>
FASTSEG_NOINLINE void tiles(const Job& shared, int64_t position, int64_t count) {
  const Job job = shared;
  for (; count > 0; --count, position += kTile) Form::template run<kTile>(job, position);
}

template <class Form, int kTile, class Job>
inline void tiles_of_width(const Job& job, int64_t width, int64_t position, int64_t count) {
  if constexpr (kTile > Form::kNarrowest) {
    if (width < kTile) return tiles_of_width<Form, kTile - 1>(job, width, position, count);
  }
  tiles<Form, kTile>(job, position, count);
}

// Tiles of two widths that differ by one. False if there are too few positions for the form.
template <class Form, class Job>
inline bool cover(const Job& job, int64_t positions) {
  const int64_t count = (positions + Form::kWidest - 1) / Form::kWidest;
  const int64_t width = positions / count, wider = positions % count;
  if (width < Form::kNarrowest) return false;
  constexpr int kWidest = Form::kWidest;
  if (wider > 0) tiles_of_width<Form, kWidest>(job, width + 1, 0, wider);
  tiles_of_width<Form, kWidest>(job, width, wider * (width + 1), count - wider);
  return true;
}

template <class A, int kTaps, bool kLines, class Job>
inline bool cover_sliding(const Job& job, int64_t step, int64_t dilation, int64_t positions) {
  if (step == 1 && dilation == 1) return cover<Sliding<A, kTaps, 1, 1, kLines>>(job, positions);
  if (step == 2 && dilation == 1) return cover<Sliding<A, kTaps, 2, 1, kLines>>(job, positions);
  if (step == 1 && dilation == 2) return cover<Sliding<A, kTaps, 1, 2, kLines>>(job, positions);
  return false;
}

// Covers a segment with sliding tiles, if there are any for such taps.
template <class A, class Job>
inline bool cover_sliding(const Job& job, int64_t taps, int64_t step, int64_t dilation,
                          int64_t positions) {
  if constexpr (kLine == 2) {
    if (taps == 3 && job.streams) return cover_sliding<A, 3, true>(job, step, dilation, positions);
  }
  if (taps == 3) return cover_sliding<A, 3, false>(job, step, dilation, positions);
  if (taps == 5) return cover_sliding<A, 5, false>(job, step, dilation, positions);
  if (taps == 7) return cover_sliding<A, 7, false>(job, step, dilation, positions);
  return false;
}

// The first `count` of the live taps of a segment, for every filter row.
template <class Source, class Target, class A>
inline FlatTap<Source, A>* flatten(const RowJob<Source, Target, A>& row, const Tap* live,
                                   int64_t count, int64_t first_source, FlatTap<Source, A>* flat) {
  for (int64_t r = 0; r < row.tap_count; ++r) {
    const RowTap<Source, A>& tap = row.taps[r];
    for (int64_t t = 0; t < count; ++t) {
      const int64_t weight = live[t].weight * row.lanes;
      const int64_t column = live[t].source + first_source;
      *flat++ = {tap.source + column * row.source_stride, tap.ahead, tap.weight + weight,
                 tap.grad_weight + weight};
    }
  }
  return flat;
}

template <class Source, class Target, class A, bool kInput, bool kWeight>
inline void tile_row(const Axis& columns, const RowJob<Source, Target, A>& row,
                     FlatTap<Source, A>* flat) {
  TileJob<Source, Target, A> job;
  job.taps = flat;
  job.source_pixel = row.source_stride;
  job.source_step = columns.step * row.source_stride;
  job.target_step = columns.period * row.target_stride;
  job.x_step = columns.period * row.x_stride;
  job.init = row.init;
  job.activation = row.activation;
  job.target_ahead = row.target_ahead;
  job.streams = row.streams;
  job.channels = row.channels;
  int64_t index = 0;
  for (const AxisClass& cls : columns.classes) {
    for (const Segment& segment : cls.segments) {
      const Tap* live = cls.taps.data() + segment.first;
      const int64_t live_count = segment.last - segment.first;
      const int64_t positions = segment.end - segment.begin;
      const int64_t first_source = segment.begin * columns.step;
      const int64_t column = index + segment.begin * columns.period;
      job.target = kInput ? row.target + column * row.target_stride : nullptr;
      job.x = kWeight ? row.x + column * row.x_stride : nullptr;
      if constexpr (kInput && !kWeight) {
        if (live_count >= 3) {
          job.weight_step = (live[1].weight - live[0].weight) * row.lanes;
          job.taps_end = flatten(row, live, 1, first_source, flat);
          const int64_t dilation = live[1].source - live[0].source;
          if (cover_sliding<A>(job, live_count, columns.step, dilation, positions)) continue;
        }
      }
      job.taps_end = flatten(row, live, live_count, first_source, flat);
      cover<AnyTaps<A, kInput, kWeight>>(job, positions);
    }
    ++index;
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
