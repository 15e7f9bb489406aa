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

using depthwise_cpu::Axis;
using depthwise_cpu::AxisClass;
using depthwise_cpu::Segment;
using depthwise_cpu::Tap;

// One live filter row: the source row it reads, its weights and their gradient [S][lanes].
template <class Source, class A>
struct RowTap {
  const Source* source;
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
  const Source* x;  // the row of x under the target row, for grad_weight
  int64_t x_stride;
  int64_t lanes;
  int64_t source_ahead, x_ahead;  // elements to the row that the next target row reads first, or 0
};

// One live tap of a segment, at its position 0.
template <class A>
struct FlatTap {
  const A* source;
  const A* weight;
  A* grad_weight;
};

template <class A>
struct TileJob {
  const FlatTap<A>* taps;
  const FlatTap<A>* taps_end;
  int64_t source_step, target_step, x_step;  // elements from position to position
  const A* init;
  A* target;
  const A* x;
  int64_t lanes;
  int64_t weight_step;  // slide: elements from filter column to filter column
  int64_t ahead;        // slide: elements to the source row to fetch into the cache, or 0
};

// kGroup vectors of channels at once, from channel c.
template <class A, int kTile, int kGroup, bool kInput, bool kWeight>
FASTSEG_INLINE void tile(const TileJob<A>& job, int64_t position, int64_t c) {
  constexpr int64_t n = kLanes<A>;
  Vector<A> acc[kGroup][kTile], x[kGroup][kTile];
  if constexpr (kInput) {
    FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
      FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) acc[g][j] = load(job.init + c + g * n);
    }
  }
  if constexpr (kWeight) {
    const A* x_at = job.x + position * job.x_step + c;
    FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
      FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) x[g][j] = load(x_at + g * n);
      x_at += job.x_step;
      FASTSEG_OPAQUE(x_at);
    }
  }
  const int64_t at = position * job.source_step + c;
  for (const FlatTap<A>* tap = job.taps; tap != job.taps_end; ++tap) {
    const A* source = tap->source + at;
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
        store(sum + g * n, load(sum + g * n) + (even[g] + odd[g]));
      }
    }
  }
  if constexpr (kInput) {
    A* target = job.target + position * job.target_step + c;
    FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
      FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) store(target + g * n, acc[g][j]);
      target += job.target_step;
      FASTSEG_OPAQUE(target);
    }
  }
}

// The same for three neighbouring filter columns, of which the list holds the first of each row: a
// source is loaded once a row and slides through the three.
template <class A, int kTile>
FASTSEG_INLINE void slide(const TileJob<A>& job, int64_t position, int64_t c) {
  Vector<A> acc[kTile];
  FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) acc[j] = load(job.init + c);
  const int64_t at = position * job.source_step + c;
  const A* source = job.init;
  for (const FlatTap<A>* tap = job.taps; tap != job.taps_end; ++tap) {
    source = tap->source + at;
    Vector<A> weight[3];
    FASTSEG_UNROLL for (int t = 0; t < 3; ++t) weight[t] =
        load(tap->weight + t * job.weight_step + c);
    FASTSEG_UNROLL for (int i = 0; i < kTile + 2; ++i) {
      const Vector<A> value = load(source);
      source += job.source_step;
      FASTSEG_OPAQUE(source);
      FASTSEG_UNROLL for (int t = 0; t < 3; ++t) {
        if (i - t >= 0 && i - t < kTile) acc[i - t] += weight[t] * value;
      }
    }
  }
  if (job.ahead != 0) {
    FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
      source -= job.source_step;
      FASTSEG_OPAQUE(source);
      __builtin_prefetch(source + job.ahead);
    }
  }
  A* target = job.target + position * job.target_step + c;
  FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
    store(target, acc[j]);
    target += job.target_step;
    FASTSEG_OPAQUE(target);
  }
}

template <class A, int kTile, bool kSlide, bool kInput, bool kWeight>
FASTSEG_NOINLINE void tiles(const TileJob<A>& shared, int64_t position, int64_t count) {
  constexpr int64_t n = kLanes<A>;
  // Narrow tiles, at the border, take more channels at once to keep the multipliers busy.
  constexpr int kGroup = kSlide ? 1 : kTile == 1 ? 4 : kTile == 2 ? 2 : 1;
  const TileJob<A> job = shared;
  for (; count > 0; --count, position += kTile) {
    int64_t c = 0;
    for (; c + kGroup * n <= job.lanes; c += kGroup * n) {
      if constexpr (kSlide) {
        slide<A, kTile>(job, position, c);
      } else {
        tile<A, kTile, kGroup, kInput, kWeight>(job, position, c);
      }
    }
    if constexpr (kGroup > 1) {
      for (; c < job.lanes; c += n) tile<A, kTile, 1, kInput, kWeight>(job, position, c);
    }
  }
}

template <class A, bool kSlide, bool kInput, bool kWeight>
inline void tiles_of_width(const TileJob<A>& job, int64_t width, int64_t position, int64_t count) {
  switch (width) {
    case 8:
      return tiles<A, 8, kSlide, kInput, kWeight>(job, position, count);
    case 7:
      return tiles<A, 7, kSlide, kInput, kWeight>(job, position, count);
    case 6:
      return tiles<A, 6, kSlide, kInput, kWeight>(job, position, count);
    case 5:
      return tiles<A, 5, kSlide, kInput, kWeight>(job, position, count);
    case 4:
      return tiles<A, 4, kSlide, kInput, kWeight>(job, position, count);
    case 3:
      return tiles<A, 3, kSlide, kInput, kWeight>(job, position, count);
    case 2:
      return tiles<A, 2, kSlide, kInput, kWeight>(job, position, count);
    default:
      return tiles<A, 1, kSlide, kInput, kWeight>(job, position, count);
  }
}

// Tiles of two widths that differ by one.
template <class A, bool kSlide, bool kInput, bool kWeight>
inline void cover(const TileJob<A>& job, int64_t positions) {
  // Accumulators, x and temporaries must fit the registers: 32 with AVX-512, 16 before.
  constexpr int64_t widest = kWeight && FASTSEG_SIMD_BYTES != 64 ? 4 : 8;
  const int64_t count = (positions + widest - 1) / widest;
  const int64_t width = positions / count, wider = positions % count;
  if (wider > 0) tiles_of_width<A, kSlide, kInput, kWeight>(job, width + 1, 0, wider);
  tiles_of_width<A, kSlide, kInput, kWeight>(job, width, wider * (width + 1), count - wider);
}

template <class A, bool kInput, bool kWeight>
inline void tile_row(const Axis& columns, const RowJob<A, A, A>& row, FlatTap<A>* flat) {
  TileJob<A> job;
  job.taps = flat;
  job.source_step = columns.step * row.source_stride;
  job.target_step = columns.period * row.target_stride;
  job.x_step = columns.period * row.x_stride;
  job.init = row.init;
  job.lanes = row.lanes;
  job.weight_step = 0;
  job.ahead = row.source_ahead;
  int64_t index = 0;
  for (const AxisClass& cls : columns.classes) {
    for (const Segment& segment : cls.segments) {
      const Tap* live = cls.taps.data() + segment.first;
      const int64_t live_count = segment.last - segment.first;
      const bool slides = kInput && !kWeight && columns.step == 1 && live_count == 3 &&
                          live[1].source - live[0].source == 1;
      if (slides) job.weight_step = (live[1].weight - live[0].weight) * row.lanes;
      FlatTap<A>* end = flat;
      for (int64_t r = 0; r < row.tap_count; ++r) {
        const RowTap<A, A>& tap = row.taps[r];
        for (int64_t t = 0; t < (slides ? 1 : live_count); ++t) {
          const int64_t weight = live[t].weight * row.lanes;
          const int64_t column = live[t].source + segment.begin * columns.step;
          *end++ = {tap.source + column * row.source_stride, tap.weight + weight,
                    kWeight ? tap.grad_weight + weight : nullptr};
        }
      }
      job.taps_end = end;
      const int64_t column = index + segment.begin * columns.period;
      job.target = kInput ? row.target + column * row.target_stride : nullptr;
      job.x = kWeight ? row.x + column * row.x_stride : nullptr;
      const int64_t positions = segment.end - segment.begin;
      if constexpr (kInput && !kWeight) {
        if (slides) {
          cover<A, true, kInput, kWeight>(job, positions);
          continue;
        }
      }
      cover<A, false, kInput, kWeight>(job, positions);
    }
    ++index;
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
