// How large the tiles of a dense convolution are. Plain arithmetic on the host,
// the same on every machine with the same number of multiprocessors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/common/live_taps.h"
#include "csrc/dilated/dilated.h"

namespace fastseg {
namespace dilated {

inline int to_int(int64_t count) {
  if (count <= -kMaxCount || count >= kMaxCount) {
    throw std::runtime_error("fastseg: expected sizes below " + std::to_string(kMaxCount) +
                             " in a dense convolution, but got " + std::to_string(count));
  }
  return static_cast<int>(count);
}

// ---- Alignment ----

constexpr int kChunkBytes = 16;  // that are copied at once

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether so many channels are whole chunks.
inline bool holds_chunks(int64_t channels, DataType dtype) {
  return channels * size_of(dtype) % kChunkBytes == 0;
}

// Whether the channels of a tensor, which lie side by side, can be moved in chunks.
inline bool holds_chunks(const void* pointer, const Strides4& strides, int64_t channels,
                         DataType dtype) {
  const int64_t vector = kChunkBytes / size_of(dtype);
  return holds_chunks(channels, dtype) && strides.n % vector == 0 && strides.h % vector == 0 &&
         strides.w % vector == 0 && is_aligned(pointer, kChunkBytes);
}

// ---- Tiles ----

// What a tile costs, so that tiles can be compared. Estimates from the bytes that a product needs
// (a tile of 128 x 256 halves gets 43 products out of a byte of cache, one of 32 x 32 gets 8), to
// be replaced by a table of winners once a GPU has timed them.
struct TileCost {
  int rows, columns;
  double busy;   // products it gets done, of those a multiprocessor full of the best tiles does
  double alone;  // the same when it has the multiprocessor to itself
  int shared_bytes = 0;
};

constexpr TileCost kTileCosts[] = {
    {128, 256, 1.00, 0.90}, {128, 128, 0.85, 0.60}, {128, 64, 0.65, 0.45},
    {128, 32, 0.40, 0.30},  {64, 64, 0.50, 0.35},   {32, 32, 0.25, 0.12},
};
// What starting and finishing a tile costs, in steps of depth.
constexpr int64_t kTileOverhead = 64;

template <typename Traits>
TileCost cost_of() {
  for (TileCost cost : kTileCosts) {
    cost.shared_bytes = Traits::kSharedBytes;
    if (cost.rows == Traits::kRows && cost.columns == Traits::kColumns) return cost;
  }
  throw std::logic_error("fastseg: a tile without a cost");
}

// So many tiles, and how deep each of them is.
struct Work {
  int64_t tiles, depth;
};

// When the last tile is done: the busiest multiprocessor has at least its share of all tiles, and
// at least the deepest one.
inline double time_of(const std::vector<Work>& works, const TileCost& cost, int multiprocessors) {
  double sum = 0, longest = 0;
  for (const Work& work : works) {
    const double one = static_cast<double>(work.depth + kTileOverhead) * cost.rows * cost.columns;
    sum += one * static_cast<double>(work.tiles) / cost.busy;
    if (work.tiles > 0) longest = std::max(longest, one / cost.alone);
  }
  return std::max(sum / multiprocessors, longest);
}

// The first of the fastest of those that the device has the shared memory for; or the one that is
// forced.
template <typename Time>
int choose_tile(const std::vector<TileCost>& costs, const DilatedProblem& problem, Time time) {
  const DilatedChoice& forced = problem.forced;
  int best = -1;
  double best_time = std::numeric_limits<double>::infinity();
  std::string names;
  for (size_t i = 0; i < costs.size(); ++i) {
    if (costs[i].shared_bytes > problem.shared_bytes) continue;
    if (costs[i].rows == forced.tile_rows && costs[i].columns == forced.tile_columns) {
      return static_cast<int>(i);
    }
    names += " " + std::to_string(costs[i].rows) + "x" + std::to_string(costs[i].columns);
    const double now = time(costs[i]);
    if (best < 0 || now < best_time) best = static_cast<int>(i), best_time = now;
  }
  if (forced.tile_rows != 0) {
    throw std::runtime_error("fastseg: expected FASTSEG_FORCE_TILE to be one of" + names +
                             " for this dense convolution, but got " +
                             std::to_string(forced.tile_rows) + "x" +
                             std::to_string(forced.tile_columns));
  }
  if (best < 0) {
    throw std::runtime_error("fastseg: expected a device with more shared memory than " +
                             std::to_string(problem.shared_bytes) + " bytes a block");
  }
  return best;
}

}  // namespace dilated
}  // namespace fastseg
