// How a depthwise convolution is cut into walks, and the walks dealt to blocks. Plain arithmetic on
// the host, the same on every machine with the same number of multiprocessors.
//
// Undilated coordinates. Output pixel p = a + d*u of row phase a < d reads the input rows
//
//     s*p - pad + d*r  =  (s*a - pad) + d*t      with t = s*u + r
//
// so within one phase a dilated convolution is an undilated one in (u, t): whatever the dilation,
// the row that output u needs next is the one that output u + 1 needs too. Columns likewise, with
// phases b and positions v.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "csrc/common/divider.h"
#include "csrc/depthwise/depthwise.h"

namespace fastseg {
namespace depthwise {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }  // b > 0
constexpr int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// ---- One axis ----

// Rows or columns of one convolution. Walks visit positions [begin, end) of `phases` phases; where
// a phase is shorter than that, they skip the rest.
struct Axis {
  int64_t inputs, outputs, stride, pad, dilation;
  int64_t phases = 0, begin = 0, end = 0;

  constexpr int64_t length() const { return end - begin; }
};

// Forward walks visit output positions.
constexpr Axis forward_axis(int64_t inputs, int64_t outputs, int64_t stride, int64_t pad,
                            int64_t dilation) {
  Axis axis{inputs, outputs, stride, pad, dilation};
  axis.phases = std::min(dilation, outputs);
  axis.begin = 0;
  axis.end = ceil_div(outputs, dilation);
  return axis;
}

// Backward walks visit, at position u, the input positions t = s*u ... s*u + s-1 and the output
// position u - lag, so they cover the input as well as the output. With padding of d*(taps-1)/2 on
// both sides and lag (taps-1)/2 both are the same positions. Either the stride or the dilation is
// 1: else two phases would meet in one input position.
constexpr Axis backward_axis(int64_t inputs, int64_t outputs, int64_t stride, int64_t pad,
                             int64_t dilation, int64_t lag) {
  Axis axis{inputs, outputs, stride, pad, dilation};
  axis.phases = std::min(dilation, std::max(outputs, inputs + pad));
  const int64_t first_input = ceil_div(pad - stride * (axis.phases - 1), dilation);
  const int64_t last_input = floor_div(inputs - 1 + pad, dilation);
  const int64_t last_output = floor_div(outputs - 1, dilation);
  axis.begin = std::min(floor_div(first_input, stride), lag);
  axis.end = std::max(floor_div(last_input, stride), last_output + lag) + 1;
  return axis;
}

// ---- Short phases ----

// The TILE of the kernels for short phases (depthwise_phases.cuh) that takes a problem, 0 if none
// does. With "same" padding of a 3x3 filter output u reads the inputs u - 1, u and u + 1 of its own
// phase and nothing else; a tile holds a phase where those are few, rows as well as columns.
constexpr int phase_tile(const ConvShape& shape) {
  const bool same = shape.R == 3 && shape.S == 3 && shape.stride_h == 1 && shape.stride_w == 1 &&
                    shape.pad_top == shape.dilation_h && shape.pad_left == shape.dilation_w &&
                    shape.P == shape.H && shape.Q == shape.W && shape.C == shape.K;
  const int64_t longest =
      std::max(ceil_div(shape.H, shape.dilation_h), ceil_div(shape.W, shape.dilation_w));
  return !same || longest > 3 ? 0 : longest == 3 ? 3 : 2;
}

// ---- Vectors ----

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether every `vector` neighbouring channels of a tensor can be moved in one access.
inline bool holds_vectors(const void* pointer, const Strides4& strides, int64_t vector,
                          int64_t element_bytes) {
  return strides.c == 1 && strides.n % vector == 0 && strides.h % vector == 0 &&
         strides.w % vector == 0 && is_aligned(pointer, vector * element_bytes);
}

// ---- Walks ----

// Who does what. A block is `groups` x `lanes` threads: lanes take neighbouring channel vectors of
// the block's slab, groups take different walks. A walk is (image, row phase, chunk of rows, column
// phase, tile of columns).
struct Walks {
  int lanes, groups;
  int slabs;    // of lanes channel vectors each
  int workers;  // blocks that share the walks of one slab
  int items;    // walks of one slab
  int rows;     // positions in a walk, at most
  int row_begin, row_end, column_begin;
  bool phases_adjacent;  // neighbouring walks differ in column phase (else in tile)
  Divider chunks, row_phases, column_phases, column_tiles, column_items;

  constexpr int64_t blocks() const { return int64_t{slabs} * workers; }
  constexpr int threads() const { return lanes * groups; }
};

// What a kernel says of itself.
struct WalkCost {
  int max_threads;      // in a block
  int resident_blocks;  // of one multiprocessor
  int columns;          // of a tile
  int halo_rows;        // read beyond those a walk owns
  int least_rows;       // of a walk, unless its phase has fewer
  int walk_overhead;    // index arithmetic and the first loads' latency, in rows
  int block_overhead;   // loading weights, adding up sums, in rows
};

// Everything the kernels count in 32 bits stays below this.
constexpr int64_t kMaxCount = int64_t{1} << 30;

// For what `fits` has looked at.
constexpr int to_int(int64_t count) { return static_cast<int>(count); }

inline bool fits(const Axis& axis, int64_t taps) {
  return axis.inputs + axis.pad < kMaxCount && axis.dilation < kMaxCount / (taps + 4) &&
         axis.outputs < kMaxCount / axis.stride - axis.dilation * (taps + 4);
}

inline bool fits(const ConvShape& shape) { return shape.N < kMaxCount && shape.K < kMaxCount; }

// Splits rows into walks and walks over blocks so that the busiest multiprocessor is done first:
// short walks fill a GPU with little work, long ones read fewer halo rows. False when the counts
// do not fit.
inline bool plan_walks(int64_t images, const Axis& rows, const Axis& columns, int64_t channels,
                       int vector, bool channels_last, int multiprocessors, const WalkCost& cost,
                       Walks* plan) {
  constexpr int kWarp = 32;
  const int64_t vectors = ceil_div(channels, vector);
  int64_t lanes = 1, slabs = vectors;
  if (channels_last) {
    // Full warps of channels; or else full 32-byte sectors, with few threads left over.
    slabs = ceil_div(vectors, kWarp);
    lanes =
        slabs == 1 ? vectors : std::min<int64_t>(ceil_div(ceil_div(vectors, slabs), 4) * 4, kWarp);
    slabs = ceil_div(vectors, lanes);
  }

  const int64_t tiles = ceil_div(columns.length(), cost.columns);
  const int64_t resident = int64_t{multiprocessors} * cost.resident_blocks;
  // Each chunk of rows of a strip is a walk.
  if (images >= kMaxCount || rows.phases >= kMaxCount || columns.phases * tiles >= kMaxCount)
    return false;
  if (images * rows.phases >= kMaxCount / (columns.phases * tiles)) return false;
  const int64_t strips = images * rows.phases * columns.phases * tiles;

  int64_t best = std::numeric_limits<int64_t>::max();
  for (const int64_t longest : {64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1}) {
    if (longest < cost.least_rows) break;
    const int64_t chunks = ceil_div(rows.length(), longest);
    const int64_t length = ceil_div(rows.length(), chunks);
    if (strips >= kMaxCount / chunks) break;
    const int64_t items = strips * chunks;
    // Fewer groups than make a full block only when there are fewer walks.
    const int64_t groups = std::min<int64_t>(cost.max_threads / lanes, items);
    for (const int64_t waves : {1, 2, 4}) {
      const int64_t most = ceil_div(items, groups);
      const int64_t rounds = ceil_div(most, std::clamp<int64_t>(waves * resident / slabs, 1, most));
      const int64_t workers = ceil_div(most, rounds);  // as few as take that many rounds
      const int64_t turns = ceil_div(workers * slabs, resident);
      const int64_t time =
          turns * (rounds * (length + cost.halo_rows + cost.walk_overhead) + cost.block_overhead);
      if (time >= best || workers * slabs >= kMaxCount) continue;
      best = time;
      plan->groups = to_int(groups);
      plan->workers = to_int(workers);
      plan->items = to_int(items);
      plan->rows = to_int(length);
      plan->chunks = Divider(to_int(chunks));
    }
  }
  if (best == std::numeric_limits<int64_t>::max()) return false;

  plan->lanes = to_int(lanes);
  plan->slabs = to_int(slabs);
  plan->row_begin = to_int(rows.begin);
  plan->row_end = to_int(rows.end);
  plan->column_begin = to_int(columns.begin);
  plan->phases_adjacent = !channels_last;
  plan->row_phases = Divider(to_int(rows.phases));
  plan->column_phases = Divider(to_int(columns.phases));
  plan->column_tiles = Divider(to_int(tiles));
  plan->column_items = Divider(to_int(columns.phases * tiles));
  return true;
}

}  // namespace depthwise
}  // namespace fastseg
