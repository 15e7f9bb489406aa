// Depthwise convolution: what forward and backward share.
//
//   y[n, k, p, q] = activation(bias[k] + sum over (r, s) of x[n, k / m, h, w] * weight[k, r, s])
//                   with h = p * stride - pad + r * dilation, w = q * stride - pad + s * dilation
//
// Nine products to 4 bytes (3x3, half precision) are too few for tensor cores to matter: memory is
// what limits, and each element should cross it once.
//
// The walk. A thread owns VEC neighbouring channels of a tile of kColumns columns and goes down the
// rows of one dilation phase: p, p + d, p + 2d, ... (depthwise_plan.h has the arithmetic). Each row
// is loaded once, and what the next rows will need of it stays in registers:
//
//        columns of one phase
//      v-1   v   v+1  v+2
//     [ x ][ x ][ x ][ x ]  row t-1    A row that arrives goes into the sums of three output rows
//     [ x ][ x ][ x ][ x ]  row t      (3x3) and finishes one of them, which is stored. No barrier,
//     [ x ][ x ][ x ][ x ]  row t+1    no shared memory; and dilation costs nothing, since every
//           ^^^^^^^^^ the tile         access is a full line of channels wherever the row is.
//
// Channels-last: the 32 lanes of a warp take neighbouring channel vectors of the same tile, so that
// they read full 128-byte lines and meet the borders together; the groups of a block take
// neighbouring tiles, so that halo columns come from L1. Channels-first: one lane, single elements,
// and neighbouring groups take neighbouring columns of one plane. It is the same kernel: only
// strides and the numbering of the walks differ. A block keeps the weights of its channels in
// registers for all its walks.
//
// What limits it. An H200 moves about 19 bytes a clock and multiprocessor, so the 16 bytes of a
// vector of 4 halves, read and written, last as long as 107 instruction slots. A 3x3 forward walk
// takes 62 of them, 36 to multiply and add; a backward walk (24 bytes, 161 slots) about 145, 72 to
// multiply and add. Loads in flight: 37 KB a multiprocessor in forward (12 warps, two rows ahead),
// 20 KB in backward (8 warps, one row ahead in two tensors). That is why halves go 4 to a thread
// and not 8: with weights and sums of 8 channels, half as many warps would fit into the registers.
//
// Padding is skipped, never multiplied: a weight that looks at padding may be infinite. Tiles whose
// columns all lie inside take a loop without tests of columns; rows are tested once each.
//
// Where dilations leave a phase three rows and columns at most, walks would do little but begin and
// end: depthwise_phases.cuh.
//
// Offsets are 64 bits wide, computed once a walk and then added up; 32 bits would save nothing, as
// an address is a 64-bit sum either way. What counts rows, columns and walks is 32 bits wide. The
// host sends what does not fit to the generic kernels.
#pragma once

#include "csrc/common/index.cuh"
#include "csrc/common/launch.cuh"
#include "csrc/common/vector.cuh"
#include "csrc/depthwise/depthwise_plan.h"

namespace fastseg {
namespace depthwise {

// ---- Constants ----

// What both directions derive from the template arguments: a TAPS x TAPS filter, one stride.
template <typename T, int VEC, int TAPS, int STRIDE>
struct WalkTraits {
  using Acc = Accumulator<T>;

  static constexpr int kMaxThreads = 128;
  static constexpr int kMaxLanes = 32;
  static constexpr int kTaps = TAPS * TAPS;
  // How many output rows (and columns) one input row (column) can reach: input t = STRIDE*u + e is
  // seen by the outputs u - i, i < kReach, through the taps e + STRIDE*i.
  static constexpr int kReach = (TAPS + STRIDE - 1) / STRIDE;

  static constexpr int kWeightRegisters = kTaps * VEC * static_cast<int>(sizeof(Acc)) / 4;
  static constexpr int kWeightBytes = kWeightRegisters * 4 * kMaxLanes;

  static_assert(TAPS % 2 == 1 && (STRIDE == 1 || STRIDE == 2));
  static_assert(kWeightBytes <= static_cast<int>(kDefaultSharedBytes));
};

// ---- Threads ----

// What a thread has: walks of `worker` that fall to its group, VEC channels of the block's slab.
struct Role {
  int group, lane, worker;
  int first_channel, channel;  // of the slab, of the thread
};

template <int VEC>
__device__ __forceinline__ Role role_of_thread(const Walks& walks) {
  Role role;
  role.group = thread_id_x() / walks.lanes, role.lane = thread_id_x() - role.group * walks.lanes;
  const int block = static_cast<int>(block_id_x());
  role.worker = block / walks.slabs;
  role.first_channel = (block - role.worker * walks.slabs) * walks.lanes * VEC;
  role.channel = role.first_channel + role.lane * VEC;
  return role;
}

// ---- Walks ----

// One walk, in undilated coordinates.
struct Walk {
  int image;
  int row_phase, row_first, row_last;  // [first, last)
  int column_phase, column_first;
};

// The walk with number `item`: tiles of columns fastest, then chunks of rows, phases, images.
__device__ __forceinline__ Walk locate_walk(const Walks& walks, int columns_per_tile, int item) {
  Walk walk;
  int rest = walks.column_items.quotient(item);
  const int column_item = item - rest * walks.column_items.divisor;
  if (walks.phases_adjacent) {
    walk.column_first = walks.column_phases.quotient(column_item);
    walk.column_phase = column_item - walk.column_first * walks.column_phases.divisor;
  } else {
    walk.column_phase = walks.column_tiles.quotient(column_item);
    walk.column_first = column_item - walk.column_phase * walks.column_tiles.divisor;
  }
  walk.column_first = walks.column_begin + walk.column_first * columns_per_tile;

  const int strip = walks.chunks.quotient(rest);
  const int chunk = rest - strip * walks.chunks.divisor;
  walk.image = walks.row_phases.quotient(strip);
  walk.row_phase = strip - walk.image * walks.row_phases.divisor;
  walk.row_first = walks.row_begin + chunk * walks.rows;
  walk.row_last = min(walk.row_first + walks.rows, walks.row_end);
  return walk;
}

// 0 <= i < end, for an end that is not negative.
__device__ __forceinline__ bool inside(int i, int end) {
  return static_cast<unsigned>(i) < static_cast<unsigned>(end);
}

// One row of a walk, as it lies in memory.
template <typename T, int VEC, int COLUMNS>
struct Row {
  Pack<T, VEC> columns[COLUMNS];
};

// ---- Weights ----

// weight [K, 1, TAPS, TAPS], the slab from `first_channel` on -> weights[r][s][v] of the thread's
// channels; zero from channel K on. Through shared memory, because the weights of neighbouring
// threads lie a whole filter apart. Every thread of the block has to call this.
template <typename T, int VEC, int TAPS>
__device__ __forceinline__ void load_weights(const T* weight, const FilterStrides& strides,
                                             int first_channel, int K, int lane, int lanes,
                                             Accumulator<T>* shared,
                                             Accumulator<T> (&weights)[TAPS][TAPS][VEC]) {
  using Acc = Accumulator<T>;
  constexpr int kTaps = TAPS * TAPS;
  const int width = lanes * VEC;
  // shared [kTaps, width]
  for (int i = thread_id_x(); i < width * kTaps; i += block_size_x()) {
    const int channel = i / kTaps, tap = i % kTaps;
    const int k = first_channel + channel;
    Acc value = Acc(0);
    if (k < K) {
      value = widen(weight[k * strides.k + tap / TAPS * strides.r + tap % TAPS * strides.s]);
    }
    shared[tap * width + channel] = value;
  }
  __syncthreads();
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      weights[tap / TAPS][tap % TAPS][v] = shared[tap * width + lane * VEC + v];
    }
  }
  __syncthreads();  // `shared` is free again
}

}  // namespace depthwise
}  // namespace fastseg
