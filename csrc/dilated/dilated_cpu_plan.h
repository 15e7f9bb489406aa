// What a dense convolution on the CPU consists of: which taps are live where, in which steps the
// sums are built up, and which part of the targets each thread computes. Plain arithmetic on the
// host, free of torch headers; dilated_cpu_kernels.h does the work.
//
// Forward and grad_input are the same: targets are sums over sources, y over x or grad_x over
// grad_y. Only the map of the taps differs, and with a stride grad_input falls into residue classes
// of pixels, each a computation of its own (see csrc/common/live_taps.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "csrc/common/conv_shape.h"
#include "csrc/common/live_taps.h"

namespace fastseg {
namespace dilated_cpu {

// A filter tap: live at the targets rows x columns, where target (p, q) reads the source pixel
// (p * step_h + source_row, q * step_w + source_column). One rectangle a tap is enough here,
// because sums wait in memory between taps.
struct LiveTap {
  LiveRange rows, columns;
  int64_t source_row, source_column;
  int64_t r, s;
};

// Any strides, in elements. Kernels are fastest where the channels of a pixel are neighbours.
struct Image {
  void* data;
  int64_t n, c, h, w;
};

// The weight, channels_last: [K][R][S][C] with any distance between its rows.
struct Filter {
  void* data;
  int64_t k, r, s;
};

// Channels [channel, channel + depth) of one tap.
struct TapBlock {
  int64_t source_row, source_column;
  int64_t r, s;
  int64_t channel, depth;
};

// A product that is added to the sums of a rectangle of targets: `depth` deep, made of the blocks
// [first, last).
struct Step {
  LiveRange rows, columns;
  int64_t first, last;
  int64_t depth;
  bool starts;    // nothing was added to these sums before: they need no zeros
  bool finishes;  // nothing will be: they are finished while they are in registers
};

struct Steps {
  std::vector<TapBlock> blocks;
  std::vector<Step> steps;
  bool start_all, finish_all;  // every target by some step
};

// Targets [begin, end), counted over [N, P, Q], times the target channels [first, last).
struct Part {
  int64_t begin, end;
  int64_t first, last;
};

// One class of targets.
struct Call {
  int64_t P, Q;            // rows and columns of an image of targets
  int64_t step_h, step_w;  // sources from one target to the next
  Image source, target;    // `target` at the first pixel of the class
  Filter weight;
  bool turned;        // grad_input: the filter maps K to C
  const void* scale;  // [target channels] in the accumulator's type, or nullptr
  const void* bias;   // likewise
  Activation activation;
  bool direct;                 // sums are built up in the target itself
  bool clears, finishes_last;  // what no step does
  const TapBlock* blocks;
  const Step* steps;
  int64_t step_count, depth;            // the greatest of the steps
  int64_t block_pixels, block_columns;  // of a part, at a time

  // Whether anything is done to a sum once its last product is in.
  bool finishes() const {
    return scale != nullptr || bias != nullptr || activation != Activation::kNone;
  }
};

// ---- Classes of targets ----

struct TargetClass {
  int64_t row, column;                // of the first target
  int64_t row_period, column_period;  // targets of the tensor from one to the next
  int64_t P, Q;
  int64_t step_h, step_w;
  AxisClass rows, columns;    // which taps are live where
  std::vector<LiveTap> taps;  // every live pair of theirs
};

inline std::vector<TargetClass> target_classes(const Axes& axes) {
  std::vector<TargetClass> found;
  for (size_t row = 0; row < axes.rows.classes.size(); ++row) {
    for (size_t column = 0; column < axes.columns.classes.size(); ++column) {
      TargetClass cls{};
      cls.rows = axes.rows.classes[row], cls.columns = axes.columns.classes[column];
      cls.row = static_cast<int64_t>(row), cls.column = static_cast<int64_t>(column);
      cls.row_period = axes.rows.period, cls.column_period = axes.columns.period;
      cls.P = ceil_div(axes.rows.targets - cls.row, cls.row_period);
      cls.Q = ceil_div(axes.columns.targets - cls.column, cls.column_period);
      cls.step_h = axes.rows.step, cls.step_w = axes.columns.step;
      for (const Tap& r : cls.rows.taps) {
        const LiveRange live_rows = live_range(axes.rows, r, cls.P);
        for (const Tap& s : cls.columns.taps) {
          const LiveRange live_columns = live_range(axes.columns, s, cls.Q);
          if (live_rows.begin < live_rows.end && live_columns.begin < live_columns.end) {
            cls.taps.push_back({live_rows, live_columns, r.source, s.source, r.weight, s.weight});
          }
        }
      }
      found.push_back(cls);
    }
  }
  return found;
}

// Whether target (p, q) reads source (p, q) and nothing else, as in a 1x1 convolution.
inline bool is_identity(const TargetClass& cls) {
  const LiveTap& tap = cls.taps.front();
  return cls.taps.size() == 1 && cls.step_h == 1 && cls.step_w == 1 && tap.source_row == 0 &&
         tap.source_column == 0 && tap.rows.begin == 0 && tap.rows.end == cls.P &&
         tap.columns.begin == 0 && tap.columns.end == cls.Q;
}

// The same targets as one long row.
inline TargetClass flattened(const TargetClass& cls, int64_t images) {
  TargetClass flat = cls;
  flat.P = 1, flat.Q = images * cls.P * cls.Q;
  flat.taps.front().rows = {0, 1}, flat.taps.front().columns = {0, flat.Q};
  flat.rows.segments = {{0, 1, 0, 1}}, flat.columns.segments = {{0, flat.Q, 0, 1}};
  return flat;
}

// ---- Steps ----

// One tap and one block of channels at a time, wherever the tap is live. The taps of a block of
// channels follow each other, because they read the same sources; but the first step, and the last,
// are such that reach every target, if there are.
inline Steps steps_by_tap(const TargetClass& cls, int64_t channels, int64_t max_depth) {
  Steps found{};
  // Equal depths: 2 blocks of 304 channels rather than one of 512 and one of 96.
  const int64_t depth = ceil_div(channels, ceil_div(channels, max_depth));
  for (int64_t channel = 0; channel < channels; channel += depth) {
    const int64_t deep = std::min(depth, channels - channel);
    for (const LiveTap& tap : cls.taps) {
      const int64_t index = static_cast<int64_t>(found.blocks.size());
      found.blocks.push_back({tap.source_row, tap.source_column, tap.r, tap.s, channel, deep});
      found.steps.push_back({tap.rows, tap.columns, index, index + 1, deep, false, false});
    }
  }
  std::vector<Step>& steps = found.steps;
  const auto everywhere = [&](const Step& step) {
    return step.rows.begin == 0 && step.rows.end == cls.P && step.columns.begin == 0 &&
           step.columns.end == cls.Q;
  };
  const auto first = std::find_if(steps.begin(), steps.end(), everywhere);
  found.start_all = first != steps.end();
  if (!found.start_all) return found;
  std::rotate(steps.begin(), first, first + 1);
  steps.front().starts = true;
  const auto last = std::find_if(steps.rbegin(), steps.rend(), everywhere);
  found.finish_all = steps.size() == 1 || last + 1 != steps.rend();
  if (found.finish_all) {
    std::rotate(last.base() - 1, last.base(), steps.end());
    steps.back().finishes = true;
  }
  return found;
}

// A few taps at a time, with all their channels: for each rectangle of targets in which the same
// taps are live. Products of few channels get deep enough to be worth their sums' way to memory;
// the weight is packed once for every rectangle, which few channels make cheap. More taps at a time
// would make single sums so long that rounding shows.
constexpr int64_t kTapsAtATime = 3;

inline Steps steps_by_rectangle(const TargetClass& cls, int64_t channels, int64_t max_depth) {
  Steps found{};
  found.start_all = found.finish_all = true;
  const int64_t at_once = std::min(kTapsAtATime, max_depth / channels);
  for (const Segment& rows : cls.rows.segments) {
    for (const Segment& columns : cls.columns.segments) {
      const int64_t width = columns.last - columns.first;
      const int64_t taps = (rows.last - rows.first) * width;
      const int64_t steps = std::max<int64_t>(1, ceil_div(taps, at_once));
      for (int64_t i = 0; i < steps; ++i) {
        const int64_t first = static_cast<int64_t>(found.blocks.size());
        for (int64_t t = taps * i / steps; t < taps * (i + 1) / steps; ++t) {
          const Tap& r = cls.rows.taps[rows.first + t / width];
          const Tap& s = cls.columns.taps[columns.first + t % width];
          found.blocks.push_back({r.source, s.source, r.weight, s.weight, 0, channels});
        }
        const int64_t last = static_cast<int64_t>(found.blocks.size());
        found.steps.push_back({{rows.begin, rows.end},
                               {columns.begin, columns.end},
                               first,
                               last,
                               (last - first) * channels,
                               i == 0,
                               i + 1 == steps});
      }
    }
  }
  return found;
}

// The order in which every sum is built up, whatever the threads.
inline Steps cut_steps(const TargetClass& cls, int64_t channels, int64_t max_depth) {
  constexpr int64_t kFewChannels = 128;
  const bool groups = channels <= std::min(kFewChannels, max_depth / 2) && cls.taps.size() != 1;
  return groups ? steps_by_rectangle(cls, channels, max_depth)
                : steps_by_tap(cls, channels, max_depth);
}

// ---- Parts ----

// How much there is to do at the targets of a class: it grows with the number of live taps, and
// near the border few are alive.
class Work {
 public:
  explicit Work(const TargetClass& cls)
      : rows_(cls.rows.segments), columns_(cls.columns.segments), width_(cls.Q), height_(cls.P) {
    for (const Segment& segment : columns_) row_ += (segment.end - segment.begin) * at(segment);
    for (const Segment& segment : rows_) image_ += (segment.end - segment.begin) * at(segment);
    image_ *= row_;
  }

  int64_t image() const { return image_; }

  // The number of targets, in order, that contain `share` of the work.
  int64_t targets_with(int64_t share) const {
    int64_t rest = share % image_, live_row = 0, unused = 0;
    const int64_t row = pass(rows_, row_, &rest, &live_row);
    const int64_t column = row < height_ ? pass(columns_, live_row, &rest, &unused) : 0;
    return (share / image_ * height_ + row) * width_ + column;
  }

 private:
  // In sixteenths of a tap, and one for what is done to a target without taps too.
  static int64_t at(const Segment& segment) { return 16 * (segment.last - segment.first) + 1; }

  // The positions along an axis, each worth at() times `unit`, that `rest` suffices for, taken off
  // it; and at() of the next one.
  static int64_t pass(const std::vector<Segment>& segments, int64_t unit, int64_t* rest,
                      int64_t* next) {
    for (const Segment& segment : segments) {
      const int64_t each = at(segment) * unit;
      const int64_t count = std::min(segment.end - segment.begin, *rest / each);
      *rest -= count * each, *next = at(segment);
      if (segment.begin + count < segment.end) return segment.begin + count;
    }
    return segments.back().end;
  }

  const std::vector<Segment>&rows_, &columns_;
  int64_t width_, height_;
  int64_t row_ = 0, image_ = 0;
};

// Parts of equal work for `threads` threads: by targets as long as each gets a few tiles of rows,
// beyond that by target channels too. A deep filter is large, and every thread packs what it needs
// of it: there the channels are cut first, as long as a thread keeps enough of them.
inline std::vector<Part> cut_parts(const TargetClass& cls, int64_t images, int64_t channels,
                                   int64_t columns, int64_t threads, int64_t tile_rows,
                                   int64_t panel_columns) {
  constexpr int64_t kPanels = 4;
  const int64_t targets = images * cls.P * cls.Q;
  const int64_t panels = ceil_div(columns, panel_columns);
  int64_t slices = 1;
  if (static_cast<int64_t>(cls.taps.size()) * columns > targets && channels * columns > 1 << 16) {
    while (threads % (2 * slices) == 0 && panels >= 2 * slices * kPanels) slices *= 2;
  }
  const int64_t stripes = std::clamp<int64_t>(targets / (4 * tile_rows), 1, threads / slices);
  slices = std::max(slices, std::clamp<int64_t>(threads / stripes, 1, panels));
  const Work work(cls);
  std::vector<Part> parts;
  int64_t begin = 0;
  for (int64_t stripe = 1; stripe <= stripes; ++stripe) {
    const int64_t share = images * work.image() / stripes * stripe;
    const int64_t end =
        stripe == stripes ? targets : std::clamp(work.targets_with(share), begin, targets);
    for (int64_t slice = 0; slice < slices && begin < end; ++slice) {
      parts.push_back({begin, end, panels * slice / slices * panel_columns,
                       std::min(columns, panels * (slice + 1) / slices * panel_columns)});
    }
    begin = end;
  }
  return parts;
}

// ---- Few output channels ----

// With few output channels a panel of the weight is narrow, and most of a step goes into bringing
// inputs to it. Then every input pixel is multiplied with all taps at once, as a 1x1 convolution to
// taps * K channels, and each output adds up what its live taps left at the pixels they look at:
//
// (The taps of several branches that are added up are as good as those of one filter.)
//
//     z[n, h, w, (r, s), k] = sum over c of weight[k, c, r, s] * x[n, c, h, w]
//     y[n, k, p, q] = sum over live taps (r, s) of z[n, p * stride + .., q * stride + .., (r, s),
//     k]
struct ShiftCall {
  int64_t P, Q, K, S;
  int64_t step_h, step_w;
  const void* z;  // [N, H, W, R * S * K]
  int64_t z_n, z_h, z_w;
  Image target;
  const void* scale;  // [K] in the accumulator's type, or nullptr
  const void* bias;   // likewise
  Activation activation;
  const LiveTap* taps;
  int64_t tap_count;
};

// Where that pays: one panel at most, channels enough, most products alive, and no stride, which
// would leave products unused.
inline bool shift_pays(const ConvShape& shape, const TargetClass& cls, int64_t panel_columns) {
  if (shape.K > panel_columns || shape.C < 256 || cls.taps.size() < 2) return false;
  int64_t live = 0;
  for (const LiveTap& tap : cls.taps) {
    live += (tap.rows.end - tap.rows.begin) * (tap.columns.end - tap.columns.begin);
  }
  return 3 * live >= shape.H * shape.W * shape.R * shape.S;
}

// ---- grad_weight ----

// grad_weight[k, r, s, c] is the sum over the outputs where tap (r, s) is live of grad_y[k] * x[c]:
// a matrix product whose depth is outputs. A task is one tap, a block of k, a block of c, and one
// of `splits` shares of the live rows; nobody else writes its sums. Splits are added up in order.
struct WeightTask {
  int64_t tap, split;
  int64_t k, k_count, c, c_count;
  int64_t begin, end;  // rows, counted over [N, live rows of the tap]
};

struct WeightCall {
  int64_t step_h, step_w;
  Image x, grad_y;
  Filter sums;         // [K][R][S][C] in the accumulator's type; 0 where no task comes
  int64_t sums_split;  // elements from one split's to the next
  const LiveTap* taps;
};

constexpr int64_t kWeightBlock = 256;
// Tasks to have at least: as many as most machines have threads, so that all are busy, and a
// number that does not depend on them, so that neither does the result.
constexpr int64_t kWeightTasks = 16;

inline int64_t weight_splits(const std::vector<LiveTap>& taps, int64_t N, int64_t K, int64_t C) {
  const int64_t blocks =
      static_cast<int64_t>(taps.size()) * ceil_div(K, kWeightBlock) * ceil_div(C, kWeightBlock);
  int64_t rows = 0;
  for (const LiveTap& tap : taps) rows = std::max(rows, N * (tap.rows.end - tap.rows.begin));
  return blocks == 0 ? 1
                     : std::clamp<int64_t>(ceil_div(kWeightTasks, blocks), 1,
                                           std::max<int64_t>(1, rows / 4));
}

inline std::vector<WeightTask> cut_weight_tasks(const std::vector<LiveTap>& taps, int64_t N,
                                                int64_t K, int64_t C, int64_t splits) {
  std::vector<WeightTask> tasks;
  for (size_t tap = 0; tap < taps.size(); ++tap) {
    const int64_t rows = N * (taps[tap].rows.end - taps[tap].rows.begin);
    for (int64_t k = 0; k < K; k += kWeightBlock) {
      for (int64_t c = 0; c < C; c += kWeightBlock) {
        for (int64_t split = 0; split < splits; ++split) {
          tasks.push_back({static_cast<int64_t>(tap), split, k, std::min(kWeightBlock, K - k), c,
                           std::min(kWeightBlock, C - c), rows * split / splits,
                           rows * (split + 1) / splits});
        }
      }
    }
  }
  return tasks;
}

}  // namespace dilated_cpu
}  // namespace fastseg
