// Runs: every dilation-th position of a target row under a filter three taps wide, stride 1, in one
// sweep. Compiled once per instruction set: see csrc/common/simd.h.
//
//   step j:   opens target j,  adds source j - pad to the open targets,  closes target j - 2
//
//   sources        s0    s1       s2          s3          ...
//   open targets  {t0}  {t1 t0}  {t2 t1 t0}  {t3 t2 t1}  ...
//
// Target t reads sources t - pad, t + 1 - pad and t + 2 - pad.
//
// Each source is loaded once a row and used three times; the nine weights, the three open targets
// and, in the fused backward pass, the nine sums of grad_weight stay in registers for the whole
// run. So a row reads and writes each of its cache lines once, and works on the tensors in place.

#include "csrc/depthwise/depthwise_cpu_tiles.h"

namespace fastseg {
namespace FASTSEG_SIMD {

using depthwise_cpu::Call;
using depthwise_cpu::Run;

template <class A, class Source, class Target, int kRows, int kGroup, bool kInput, bool kWeight>
struct Roller {
  static constexpr int64_t n = kLanes<A>;
  static constexpr int kArray = kRows > 0 ? kRows : 1;

  Vector<A> weight[kGroup][kArray][3], sum[kGroup][kArray][3];
  Vector<A> acc[kGroup][3], x[kGroup][3], init[kGroup];  // of targets j, j - 1, j - 2
  const Source* source[kArray];
  const Source* x_at;
  Target* target;
  Activation activation;
  int64_t target_ahead;
  bool streams;
  int64_t at, source_step, target_step, x_step;
  int64_t targets, live_from, live_to;  // steps [live_from, live_to) have a source

  FASTSEG_INLINE void begin(const RowJob<Source, Target, A>& row, const Tap* taps, int64_t dilation,
                            int64_t c) {
    FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
      if constexpr (kInput) init[g] = load(row.init + c + g * n);
      FASTSEG_UNROLL for (int t = 0; t < 3; ++t) {
        FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
          if constexpr (kInput) {
            weight[g][r][t] = load(row.taps[r].weight + taps[t].weight * row.lanes + c + g * n);
          }
          sum[g][r][t] = Vector<A>{};
        }
      }
    }
    activation = row.activation;
    target_ahead = row.target_ahead;
    streams = row.streams;
    source_step = dilation * row.source_stride;
    target_step = dilation * row.target_stride;
    x_step = dilation * row.x_stride;
  }

  FASTSEG_INLINE void begin_run(const RowJob<Source, Target, A>& row, const Run& run, int64_t c) {
    FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
      FASTSEG_UNROLL for (int t = 0; t < 3; ++t) acc[g][t] = x[g][t] = Vector<A>{};
    }
    FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
      source[r] = row.taps[r].source + run.source * row.source_stride + c;
    }
    target = kInput ? row.target + run.target * row.target_stride + c : nullptr;
    x_at = kWeight ? row.x + run.target * row.x_stride + c : nullptr;
    at = -run.pad * source_step;
    targets = run.targets;
    live_from = run.pad;
    live_to = run.sources + run.pad;
  }

  FASTSEG_INLINE void open(bool exists) {
    FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
      if constexpr (kInput) {
        acc[g][2] = acc[g][1];
        acc[g][1] = acc[g][0];
        acc[g][0] = init[g];
      }
      if constexpr (kWeight) {
        x[g][2] = x[g][1];
        x[g][1] = x[g][0];
        if (exists) x[g][0] = load(x_at + g * n);
      }
    }
    if constexpr (kWeight) x_at += x_step;
  }

  FASTSEG_INLINE void close() {
    at += source_step;
    if constexpr (kInput) {
      Vector<A> closed[kGroup];
      FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) closed[g] = acc[g][2];
      if constexpr (!kWeight) activate_all<A, kGroup>(closed, activation);
      FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
        if (!streams) __builtin_prefetch(target + target_ahead + g * n, 1);
        put<kGroup>(target + g * n, closed[g], streams);
      }
      target += target_step;
    }
  }

  // A step all of whose targets and sources exist.
  FASTSEG_INLINE void inner(int64_t source_ahead, int64_t x_ahead) {
    open(true);
    FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
      FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
        const Vector<A> value = load(source[r] + at + g * n);
        if (r == kRows - 1) __builtin_prefetch(source[r] + at + source_ahead + g * n);
        FASTSEG_UNROLL for (int t = 0; t < 3; ++t) {
          if constexpr (kInput) acc[g][t] += weight[g][r][t] * value;
          if constexpr (kWeight) sum[g][r][t] += x[g][t] * value;
        }
      }
    }
    if constexpr (kWeight) {
      FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) __builtin_prefetch(x_at + x_ahead + g * n);
    }
    close();
  }

  FASTSEG_INLINE void edge(int64_t j) {
    open(j < targets);
    if (j >= live_from && j < live_to) {
      FASTSEG_UNROLL for (int t = 0; t < 3; ++t) {
        if (j - t < 0 || j - t >= targets) continue;
        FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
          FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
            const Vector<A> value = load(source[r] + at + g * n);
            if constexpr (kInput) acc[g][t] += weight[g][r][t] * value;
            if constexpr (kWeight) sum[g][r][t] += x[g][t] * value;
          }
        }
      }
    }
    if (j >= 2) {
      close();
    } else {
      at += source_step;
    }
  }

  FASTSEG_INLINE void add_sums(const RowJob<Source, Target, A>& row, const Tap* taps, int64_t c,
                               int64_t overlap) {
    FASTSEG_UNROLL for (int g = 0; g < kGroup; ++g) {
      FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
        FASTSEG_UNROLL for (int t = 0; t < 3; ++t) {
          A* total = row.taps[r].grad_weight + taps[t].weight * row.lanes + c + g * n;
          if (overlap > 0) sum[g][r][t] = zero_first<A>(sum[g][r][t], overlap);
          store(total, load(total) + sum[g][r][t]);
        }
      }
    }
  }
};

// All runs of a row, for kGroup vectors of channels.
template <class A, class Source, class Target, int kRows, int kGroup, bool kInput, bool kWeight>
FASTSEG_NOINLINE void roll(const Call& call, const RowJob<Source, Target, A>& row, int64_t c,
                           int64_t overlap) {
  const Tap* taps = call.columns.classes.data()[0].taps.data();
  const int64_t source_ahead = kRows > 0 ? row.taps[kRows - 1].ahead : 0, x_ahead = row.x_ahead;
  Roller<A, Source, Target, kRows, kGroup, kInput, kWeight> roller;
  roller.begin(row, taps, call.dilation_w, c);
  for (const Run& run : call.runs) {
    roller.begin_run(row, run, c);
    const int64_t targets = run.targets;
    const int64_t inner_from = run.pad > 2 ? run.pad : 2;
    const int64_t inner_to = min_of(targets, run.sources + run.pad);
    int64_t j = 0;
    for (; j < inner_from && j < targets + 2; ++j) roller.edge(j);
    for (; j < inner_to; ++j) roller.inner(source_ahead, x_ahead);
    for (; j < targets + 2; ++j) roller.edge(j);
  }
  if constexpr (kWeight) roller.add_sums(row, taps, c, overlap);
}

template <class A, class Source, class Target, int kRows, bool kInput, bool kWeight>
inline void roll_rows(const Call& call, const RowJob<Source, Target, A>& row) {
  // Two vectors of channels at a time hide the latency of the sums, where the registers suffice.
  constexpr int kGroup = kWeight || !kManyRegisters ? 1 : 2;
  constexpr int64_t n = kLanes<A>;
  int64_t c = 0;
  if constexpr (kGroup > 1) {
    for (; c + kGroup * n <= row.channels; c += kGroup * n) {
      roll<A, Source, Target, kRows, kGroup, kInput, kWeight>(call, row, c, 0);
    }
  }
  for (; c < row.channels; c += n) {
    const VectorAt<A> at(c, row.channels);
    roll<A, Source, Target, kRows, 1, kInput, kWeight>(call, row, at.channel, at.overlap);
  }
}

template <class A, class Source, class Target, bool kInput, bool kWeight>
inline void roll_row(const Call& call, const RowJob<Source, Target, A>& row) {
  switch (row.tap_count) {
    case 3:
      return roll_rows<A, Source, Target, 3, kInput, kWeight>(call, row);
    case 2:
      return roll_rows<A, Source, Target, 2, kInput, kWeight>(call, row);
    case 1:
      return roll_rows<A, Source, Target, 1, kInput, kWeight>(call, row);
    default:
      return roll_rows<A, Source, Target, 0, kInput, kWeight>(call, row);
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
