// Tiles: up to eight neighbouring positions of a target row, any list of taps. Compiled once per
// instruction set: see csrc/common/simd.h.
//
// A segment of a row has the same live taps everywhere, so a tile is a plain double loop, without
// bounds tests:
//
//   for every vector of channels: for every tap: for j in the tile: acc[j] += weight * source[j * step]
//
// The weight is loaded once a tile and tap, the accumulators stay in registers. The fused backward
// pass multiplies the same loaded source, grad_y, by x[j] for grad_weight: both gradients read grad_y
// once. Its partial sums run over one tile before they go to memory.

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

template <class A, int kTile, bool kInput, bool kWeight>
FASTSEG_NOINLINE void tiles(const TileJob<A>& shared, int64_t position, int64_t count) {
  constexpr int64_t n = kLanes<A>;
  // Narrow tiles, at the border, take more channels at once to keep the multipliers busy.
  constexpr int kGroup = kTile == 1 ? 4 : kTile == 2 ? 2 : 1;
  const TileJob<A> job = shared;
  for (; count > 0; --count, position += kTile) {
    int64_t c = 0;
    for (; c + kGroup * n <= job.lanes; c += kGroup * n) {
      tile<A, kTile, kGroup, kInput, kWeight>(job, position, c);
    }
    if constexpr (kGroup > 1) {
      for (; c < job.lanes; c += n) tile<A, kTile, 1, kInput, kWeight>(job, position, c);
    }
  }
}

template <class A, bool kInput, bool kWeight>
inline void tiles_of_width(const TileJob<A>& job, int64_t width, int64_t position, int64_t count) {
  switch (width) {
    case 8:
      return tiles<A, 8, kInput, kWeight>(job, position, count);
    case 7:
      return tiles<A, 7, kInput, kWeight>(job, position, count);
    case 6:
      return tiles<A, 6, kInput, kWeight>(job, position, count);
    case 5:
      return tiles<A, 5, kInput, kWeight>(job, position, count);
    case 4:
      return tiles<A, 4, kInput, kWeight>(job, position, count);
    case 3:
      return tiles<A, 3, kInput, kWeight>(job, position, count);
    case 2:
      return tiles<A, 2, kInput, kWeight>(job, position, count);
    default:
      return tiles<A, 1, kInput, kWeight>(job, position, count);
  }
}

template <class A, bool kInput, bool kWeight>
inline void tile_row(const Axis& columns, const RowJob<A, A, A>& row, FlatTap<A>* flat) {
  // Accumulators, x and temporaries must fit the registers: 32 with AVX-512, 16 before.
  constexpr int64_t widest = kWeight && FASTSEG_SIMD_BYTES != 64 ? 4 : 8;
  TileJob<A> job;
  job.taps = flat;
  job.source_step = columns.step * row.source_stride;
  job.target_step = columns.period * row.target_stride;
  job.x_step = columns.period * row.x_stride;
  job.init = row.init;
  job.lanes = row.lanes;
  int64_t index = 0;
  for (const AxisClass& cls : columns.classes) {
    for (const Segment& segment : cls.segments) {
      FlatTap<A>* end = flat;
      for (int64_t r = 0; r < row.tap_count; ++r) {
        const RowTap<A, A>& tap = row.taps[r];
        for (int64_t t = segment.first; t < segment.last; ++t) {
          const int64_t weight = cls.taps.data()[t].weight * row.lanes;
          const int64_t column = cls.taps.data()[t].source + segment.begin * columns.step;
          *end++ = {tap.source + column * row.source_stride, tap.weight + weight,
                    kWeight ? tap.grad_weight + weight : nullptr};
        }
      }
      job.taps_end = end;
      const int64_t column = index + segment.begin * columns.period;
      job.target = kInput ? row.target + column * row.target_stride : nullptr;
      job.x = kWeight ? row.x + column * row.x_stride : nullptr;
      // Tiles of two widths that differ by one.
      const int64_t positions = segment.end - segment.begin;
      const int64_t count = (positions + widest - 1) / widest;
      const int64_t width = positions / count, wider = positions % count;
      if (wider > 0) tiles_of_width<A, kInput, kWeight>(job, width + 1, 0, wider);
      tiles_of_width<A, kInput, kWeight>(job, width, wider * (width + 1), count - wider);
    }
    ++index;
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
