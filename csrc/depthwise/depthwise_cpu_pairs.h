// Pairs: the forward pass of a 3x3 filter, two target rows at a time, on tensors in place. Compiled
// once per instruction set, but used with 32 registers only: see csrc/common/simd.h.
//
//   source rows     h - d,  h,  h + d,  h + 2d                 of targets h and h + d, dilation d
//   source columns  s0  s1  s2  s3  s4  s5  s6  s7             every d-th of the image: a run
//   target columns      t0  t1  t2  t3  t4  t5                 of a full tile
//
// Neighbours in the walk share two of their three source rows, and neighbours in a run two of their
// three columns. So a tile of 2 x 6 targets loads 4 x 8 sources, 2.7 a target where one row needs
// 4, while the weights and targets stay in registers. With stride 2 it is 5 x 13 sources, 5.4 a
// target instead of 6.5. What that saves are reads of the L2 cache: with many channels the pixels
// of a row share a few sets of the L1 cache, and nothing stays there until the next row or the next
// tile wants it. Wider tiles would drive out their own sources.
//
// Sources outside the image are left out one by one, so that the ends of a run, and the short runs
// of a large dilation, are tiles like all others.

#include "csrc/depthwise/depthwise_cpu_runs.h"

namespace fastseg {
namespace FASTSEG_SIMD {

constexpr int kPairTile = 6;

// One or two target rows and all that they read. Strides are in elements.
template <class Storage, class A>
struct PairJob {
  const Storage* sources[5];  // [W][C] each, null outside the image; kStep + 3 of them, or 3
  int64_t source_stride;      // from pixel to pixel
  bool fetches;               // the next tile's sources into the cache
  Storage* target;            // [Q][C]
  int64_t target_row, target_stride;  // from row to row, from pixel to pixel
  bool streams;                       // targets past the caches
  const A* weight;                    // [3][3][lanes]
  const A* init;                      // [lanes]
  int64_t lanes, channels;            // at least a vector of channels
  int64_t dilation;                   // between the columns of a run
  Activation activation;
};

// kRows x kTile targets for one vector of channels, from the offsets of the tile's first columns
// on. Of its source columns [first, last) exist, and all of them if kWhole. The next tile is
// `ahead` elements away.
template <int kStep, int kRows, int kTile, bool kWhole, class Storage, class A>
FASTSEG_INLINE void pair_tile(const PairJob<Storage, A>& job, int64_t source_at, int64_t target_at,
                              int64_t first, int64_t last, int64_t ahead, int64_t c) {
  constexpr int kReach = (kTile - 1) * kStep + 3;
  Vector<A> acc[kRows][kTile], weight[3][3];
  const Vector<A> init = load(job.init + c);
  FASTSEG_UNROLL for (int h = 0; h < kRows; ++h) {
    FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) acc[h][j] = init;
  }
  FASTSEG_UNROLL for (int r = 0; r < 3; ++r) {
    FASTSEG_UNROLL for (int s = 0; s < 3; ++s) {
      weight[r][s] = load(job.weight + (r * 3 + s) * job.lanes + c);
    }
  }
  FASTSEG_UNROLL for (int i = 0; i < (kRows - 1) * kStep + 3; ++i) {
    if (job.sources[i] == nullptr) continue;
    const Storage* source = job.sources[i] + source_at + c;
    FASTSEG_UNROLL for (int k = 0; k < kReach; ++k) {
      if (kWhole || (k >= first && k < last)) {
        const Vector<A> value = load(source);
        // What the tile before and the rows before have not read.
        if (i >= 3 - kStep && k >= 3 - kStep) __builtin_prefetch(source + ahead);
        FASTSEG_UNROLL for (int h = 0; h < kRows; ++h) {
          const int r = i - h * kStep;
          if (r < 0 || r > 2) continue;
          FASTSEG_UNROLL for (int s = 0; s < 3; ++s) {
            const int j = (k - s) / kStep;
            if (k >= s && (k - s) % kStep == 0 && j < kTile) acc[h][j] += weight[r][s] * value;
          }
        }
      }
      source += job.dilation * job.source_stride;
      FASTSEG_OPAQUE(source);
    }
  }
  activate_all<A, kRows * kTile>(acc[0], job.activation);
  FASTSEG_UNROLL for (int h = 0; h < kRows; ++h) {
    Storage* target = job.target + h * job.target_row + target_at + c;
    FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
      put<1>(target, acc[h][j], job.streams);
      target += job.dilation * job.target_stride;
      FASTSEG_OPAQUE(target);
    }
  }
}

// `count` tiles of a run, from its target `position` on.
template <int kStep, int kRows, int kTile, class Storage, class A>
FASTSEG_NOINLINE void pair_tiles(const PairJob<Storage, A>& shared, const Run& run,
                                 int64_t position, int64_t count) {
  constexpr int64_t n = kLanes<A>;
  const PairJob<Storage, A> job = shared;
  const int64_t ahead = job.fetches ? kTile * kStep * job.dilation * job.source_stride : 0;
  for (; count > 0; --count, position += kTile) {
    const int64_t first = run.pad - position * kStep, last = first + run.sources;
    const int64_t source_at = (run.source - first * job.dilation) * job.source_stride;
    const int64_t target_at = (run.target + position * job.dilation) * job.target_stride;
    if (first <= 0 && last >= (kTile - 1) * kStep + 3) {
      for (int64_t c = 0; c < job.channels; c += n) {
        const int64_t channel = VectorAt<A>(c, job.channels).channel;
        pair_tile<kStep, kRows, kTile, true>(job, source_at, target_at, first, last, ahead,
                                             channel);
      }
    } else {
      for (int64_t c = 0; c < job.channels; c += n) {
        const int64_t channel = VectorAt<A>(c, job.channels).channel;
        pair_tile<kStep, kRows, kTile, false>(job, source_at, target_at, first, last, ahead,
                                              channel);
      }
    }
  }
}

template <int kStep, int kRows, int kTile, class Storage, class A>
inline void pair_tiles_of_width(const PairJob<Storage, A>& job, const Run& run, int64_t width,
                                int64_t position, int64_t count) {
  if constexpr (kTile > 1) {
    if (width < kTile) {
      return pair_tiles_of_width<kStep, kRows, kTile - 1>(job, run, width, position, count);
    }
  }
  pair_tiles<kStep, kRows, kTile>(job, run, position, count);
}

// All runs of one or two target rows, each in tiles of two widths that differ by one.
template <int kStep, int kRows, class Storage, class A>
inline void pair_rows(const Call& call, const PairJob<Storage, A>& job) {
  for (const Run& run : call.runs) {
    const int64_t count = (run.targets + kPairTile - 1) / kPairTile;
    const int64_t width = run.targets / count, wider = run.targets % count;
    if (wider > 0) pair_tiles_of_width<kStep, kRows, kPairTile>(job, run, width + 1, 0, wider);
    pair_tiles_of_width<kStep, kRows, kPairTile>(job, run, width, wider * (width + 1),
                                                 count - wider);
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
