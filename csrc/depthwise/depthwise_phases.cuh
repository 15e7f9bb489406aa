// Short phases, for which walks are too much: what forward and backward share. At large dilations a
// phase (depthwise_plan.h), the positions a dilation apart, has only one to three rows and columns.
// With "same" padding of a 3x3 filter nothing else reaches it, nor does it reach anything else:
//
//     . . . . . . . . .       One phase (x) of an image of 7 x 9 pixels at dilation 4. Output
//     . x . . . x . . .       (u, v) reads the inputs (u + r - 1, v + s - 1) of the same phase, as
//     . . . . . . . . .       far as there are any.
//     . . . . . . . . .
//     . . . . . . . . .       So a thread loads a whole phase of VEC channels at once, TILE x TILE
//     . x . . . x . . .       positions at most, and all that is left to do has constant indices:
//     . . . . . . . . .       no halo, no rolling sums, no tests but how many rows and columns the
//                             phase has (one more in the first phases of an image).
//
// Each element crosses memory once, in packs of 8 bytes a thread (16 of floats in forward). An
// output of halves takes 11 instructions, and 20 in backward, of which 4 to 5 and 8 to 11 multiply
// and add; by the reckoning of depthwise.cuh memory leaves time for 27 and 40. Loads in flight: 24
// to 55 KB a multiprocessor, all of a tile at once.
//
// Blocks, lanes, groups, and how work is dealt to them are those of depthwise.cuh, with one tile
// for a walk: neighbouring groups take neighbouring columns of pixels.
//
// Padding is never even looked at: a tile of ROWS x COLUMNS positions has code of its own, which
// multiplies what is there.
#pragma once

#include <type_traits>

#include "csrc/depthwise/depthwise.cuh"

namespace fastseg {
namespace depthwise {

// Whether there are kernels for short phases: of 3x3 filters, and not in double.
template <typename T>
constexpr bool has_phases(int taps, int stride) {
  return taps == 3 && stride == 1 && sizeof(T) <= 4;
}

template <typename T, int VEC, int TILE>
struct PhaseTraits : WalkTraits<T, VEC, 3, 1> {
  // Blocks a multiprocessor holds: 80 to 168 registers a thread.
  static constexpr int kForwardBlocks = TILE == 2 ? 6 : 5;
  static constexpr int kBackwardBlocks = (TILE == 2 ? 4 : 3) + (VEC < 4);

  static_assert(TILE == 2 || TILE == 3);

  // A tile is a walk over the rows of a phase, be they few as they may.
  static constexpr WalkCost cost(int resident_blocks, int block_overhead) {
    return {WalkTraits<T, VEC, 3, 1>::kMaxThreads,
            resident_blocks,
            /*columns=*/TILE,
            /*halo_rows=*/0,
            /*least_rows=*/TILE,
            /*walk_overhead=*/2,
            block_overhead};
  }
};

// ---- Phases ----

struct Phase {
  int image, row, column;  // of the first position
  int rows, columns;       // how many positions it has
};

// How many of first, first + step, ... are below `end`: the first one is, and `MOST` at most.
template <int MOST>
__device__ __forceinline__ int count_below(int end, int first, int step) {
  int count = 1;
#pragma unroll
  for (int i = 1; i < MOST; ++i) count += first + i * step < end;
  return count;
}

// The phase with number `item`: columns fastest, then rows, then images.
template <int TILE, typename Params>
__device__ __forceinline__ Phase locate_phase(const Params& params, int item) {
  const Walks& walks = params.walks;
  Phase phase;
  const int strip = walks.column_phases.quotient(item);
  phase.column = item - strip * walks.column_phases.divisor;
  phase.image = walks.row_phases.quotient(strip);
  phase.row = strip - phase.image * walks.row_phases.divisor;
  phase.rows = count_below<TILE>(params.H, phase.row, params.dilation_h);
  phase.columns = count_below<TILE>(params.W, phase.column, params.dilation_w);
  return phase;
}

// From a tensor's first element to the first position of a phase.
__device__ __forceinline__ int64_t offset_of(const Phase& phase, const Strides4& strides) {
  // A product with a number that has no sign takes half the instructions.
  const auto times = [](int i, int64_t stride) {
    return int64_t{static_cast<uint32_t>(i)} * stride;
  };
  return times(phase.image, strides.n) + times(phase.row, strides.h) +
         times(phase.column, strides.w);
}

template <typename T, int VEC, int ROWS, int COLUMNS>
struct Tile {
  Pack<T, VEC> at[ROWS * COLUMNS];
};

// The tile whose first position is at `source`. The steps are a dilation, in elements.
template <typename T, int VEC, int ROWS, int COLUMNS>
__device__ __forceinline__ Tile<T, VEC, ROWS, COLUMNS> load_tile(const T* source, int64_t row_step,
                                                                 int64_t column_step) {
  Tile<T, VEC, ROWS, COLUMNS> tile;
#pragma unroll
  for (int i = 0; i < ROWS * COLUMNS; ++i) {
    tile.at[i] = load_pack<T, VEC>(source + i / COLUMNS * row_step + i % COLUMNS * column_step);
  }
  return tile;
}

// As store_pack, but in one access for sure: of some that have constant indices nvcc makes two.
template <typename T, int VEC>
__device__ __forceinline__ void store_whole(T* target, const Pack<T, VEC>& pack) {
  using Word = std::conditional_t<Pack<T, VEC>::kBytes == 16, uint4, uint2>;
  static_assert(sizeof(Word) == sizeof(pack));
  Word word;
  memcpy(&word, &pack, sizeof(word));
  __stcg(reinterpret_cast<Word*>(target), word);
}

// function(n) with the n in [1, MOST] that `count` is, as a constant.
template <int MOST, typename Function>
__device__ __forceinline__ void with_constant(int count, const Function& function) {
  if constexpr (MOST > 1) {
    if (count < MOST) return with_constant<MOST - 1>(count, function);
  }
  function(std::integral_constant<int, MOST>());
}

// function(rows, columns) with the phase's as constants.
template <int TILE, typename Function>
__device__ __forceinline__ void with_counts(const Phase& phase, const Function& function) {
  with_constant<TILE>(phase.rows, [&](auto rows) {
    with_constant<TILE>(phase.columns, [&](auto columns) { function(rows, columns); });
  });
}

// The tap through which output position u reads input position t; a tap if in [0, 3).
constexpr int tap_between(int t, int u) { return t - u + 1; }
constexpr bool is_tap(int tap) { return tap >= 0 && tap < 3; }

}  // namespace depthwise
}  // namespace fastseg
