// Sums in a fixed order, so that a gradient comes out the same, bit for bit, in every run: no
// atomics. Stage one adds up within a block, stage two adds the blocks' partial sums.
#pragma once

#include <cstdint>

#include "csrc/common/launch.cuh"

namespace fastseg {

// Adds `values` over the groups of a block; group 0 ends up with the sums. A block is
// groups x lanes threads, and lanes never mix:
//
//   group 0  * * *      the upper half of the groups hands its values down through shared memory,
//   group 1  * * *      and the lower half adds them to its registers; then the same for the lower
//   group 2  * * *      half alone, until one group is left. With an odd number the middle group
//   group 3  * * *      waits for the next round.
//
// `shared` holds block_sum_elements(...) values and is free again on return. Every thread of the
// block has to call this.
template <typename Acc, int COUNT>
__device__ __forceinline__ void block_sum(Acc (&values)[COUNT], Acc* shared, int group, int groups,
                                          int lane, int lanes) {
  for (int active = groups; active > 1;) {
    const int kept = (active + 1) / 2;
    const int slots = kept * lanes;
    if (group >= kept && group < active) {
      Acc* slot = shared + (group - kept) * lanes + lane;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) slot[i * slots] = values[i];
    }
    __syncthreads();
    if (group < active - kept) {
      const Acc* slot = shared + group * lanes + lane;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) values[i] += slot[i * slots];
    }
    __syncthreads();
    active = kept;
  }
}

constexpr int block_sum_elements(int count, int groups, int lanes) {
  return count * ((groups + 1) / 2) * lanes;
}

// The sums of kReduceColumns neighbouring columns of a matrix by a block of kReduceRows x
// kReduceColumns threads: each thread adds every kReduceRows-th row of its column, then the block
// adds up its rows. `column` points at row 0 of the thread's own column. Threads with block_row 0
// return the sum; every thread of the block has to call this.
constexpr int kReduceColumns = 32;  // one 128-byte line of floats
constexpr int kReduceRows = 16;     // that many loads are in flight at least

template <typename Acc>
__device__ __forceinline__ Acc column_sum(const Acc* column, int64_t rows, int64_t row_length,
                                          int block_row, int block_column, Acc* shared) {
  Acc sum[1] = {Acc(0)};
#pragma unroll 4
  for (int64_t row = block_row; row < rows; row += kReduceRows) sum[0] += column[row * row_length];
  block_sum(sum, shared, block_row, kReduceRows, block_column, kReduceColumns);
  return sum[0];
}

constexpr int kColumnSumElements = block_sum_elements(1, kReduceRows, kReduceColumns);

}  // namespace fastseg
