// How a dense convolution is cut into tiles, and how large those are. Plain arithmetic on the host,
// the same on every machine with the same number of multiprocessors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/common/divider.h"
#include "csrc/common/live_taps.h"
#include "csrc/dilated/dilated.h"
#include "csrc/dilated/rectangles.h"

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

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether the channels of a tensor, which lie side by side, can be moved in chunks of 16 bytes.
inline bool holds_chunks(const void* pointer, const Strides4& strides, int64_t channels,
                         DataType dtype) {
  const int64_t vector = 16 / size_of(dtype);
  return channels % vector == 0 && strides.n % vector == 0 && strides.h % vector == 0 &&
         strides.w % vector == 0 && is_aligned(pointer, 16);
}

// ---- Rectangles, as kernels receive them ----

// One axis of a rectangle: a Span whose taps, equally spaced as they are, need no list. Target
// index + period * j reads source + step * j + source_spacing * t through tap weight +
// weight_spacing * t, for t < taps.
struct SpanParams {
  int index, period, step;
  int taps, source, source_spacing, weight, weight_spacing;
  Divider count;
};

inline SpanParams span_params(const Span& span) {
  SpanParams params{};
  params.index = to_int(span.index), params.period = to_int(span.period);
  params.step = to_int(span.step);
  params.taps = to_int(static_cast<int64_t>(span.taps.size()));
  params.count = Divider(to_int(span.count));
  if (params.taps == 0) return params;
  params.source = to_int(span.taps[0].source), params.weight = to_int(span.taps[0].weight);
  if (params.taps == 1) return params;
  params.source_spacing = to_int(span.taps[1].source - span.taps[0].source);
  params.weight_spacing = to_int(span.taps[1].weight - span.taps[0].weight);
  return params;
}

// What one launch covers: every pair of its spans. A convolution with more spans (a 3x3 filter has
// 3 along an axis, 6 with stride 2 in grad_input) takes several launches, so that the table fits
// into a kernel's parameters, and no memory has to be allocated or copied for it.
constexpr int kMaxSpans = 12;

struct Rectangles {
  struct Entry {
    int first_tile;  // of pixels
    uint8_t rows, columns;
  };

  SpanParams rows[kMaxSpans], columns[kMaxSpans];
  Entry entries[kMaxSpans * kMaxSpans];  // deepest first, so that no long tile starts last
  int count;
  int tiles;
};

// The rectangles of `row_spans` x `column_spans`, in tiles of `tile_rows` pixels.
inline Rectangles rectangles_of(const Span* row_spans, int64_t row_count, const Span* column_spans,
                                int64_t column_count, int64_t images, int tile_rows) {
  Rectangles table{};
  for (int64_t i = 0; i < row_count; ++i) table.rows[i] = span_params(row_spans[i]);
  for (int64_t i = 0; i < column_count; ++i) table.columns[i] = span_params(column_spans[i]);
  for (int64_t i = 0; i < row_count; ++i) {
    for (int64_t j = 0; j < column_count; ++j) {
      table.entries[table.count++] = {0, static_cast<uint8_t>(i), static_cast<uint8_t>(j)};
    }
  }
  const auto taps = [&](const Rectangles::Entry& entry) {
    return int64_t{table.rows[entry.rows].taps} * table.columns[entry.columns].taps;
  };
  std::stable_sort(
      table.entries, table.entries + table.count,
      [&](const Rectangles::Entry& a, const Rectangles::Entry& b) { return taps(a) > taps(b); });
  int64_t tiles = 0;
  for (int i = 0; i < table.count; ++i) {
    Rectangles::Entry& entry = table.entries[i];
    entry.first_tile = to_int(tiles);
    tiles += ceil_div(images * row_spans[entry.rows].count * column_spans[entry.columns].count,
                      tile_rows);
  }
  table.tiles = to_int(tiles);
  return table;
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
