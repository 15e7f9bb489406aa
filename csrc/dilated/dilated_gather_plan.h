// How forward and grad_input are cut into rectangles, and how those are laid out as the parameters
// of a kernel. Plain arithmetic on the host.
//
// A product sums over the live taps of one branch (outputs side by side) or of several (a sum of
// branches, and grad_input, to which every branch adds). Several branches cut each axis wherever a
// tap of any of them goes in or out, so that on a rectangle all of their live taps are the same:
//
//   rates 6 and 12      0    6    12   21   27   33      an axis of 33 has 5 spans, the plane 25
//   taps of the one     | 12 | 012           | 01 |      rectangles in place of 9: some more pixels
//   taps of the other   | 12      | 012 | 01      |      to round up to whole tiles.
//
// The alternative, tiles of any pixels that go from branch to branch, would have to multiply where
// a pixel's tap is dead but its neighbour's is live; with an infinite weight that is not nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/common/divider.h"
#include "csrc/dilated/dilated_plan.h"
#include "csrc/dilated/rectangles.h"

namespace fastseg {
namespace dilated {

// ---- As the kernel receives them ----

// The live taps of one branch along one axis, equally spaced as they are: tap t < taps reads source
// + source_spacing * t, seen from the first target of a span, through weight + weight_spacing * t.
struct TapRun {
  int taps, source, source_spacing, weight, weight_spacing;
};

// Targets index + period * j for j below `count`; the runs of its branches begin at `run`.
struct SpanParams {
  int index, run;
  Divider count;
};

struct BranchParams {
  const void* weight;
  int64_t weight_line;  // from column to column (TURNED: from source channel to source channel)
  int64_t weight_row, weight_column;  // from tap to tap
  int source, channels;               // its channels of the source: the first, and how many
  int target, columns;                // and of the target
};

// Limits of one launch, so that its parameters fit into the 4 KB that there are, and no memory has
// to be allocated or copied for them: six branches of 3x3 side by side, the sum of four. What does
// not fit takes several launches.
constexpr int kMaxSpans = 18;
constexpr int kMaxRuns = 36;
constexpr int kMaxRectangles = 81;
constexpr int kMaxBranches = static_cast<int>(kMaxSummedBranches);

struct Rectangles {
  struct Entry {
    int first_block;
    int first_tile;  // of pixels, among those of its branch
    uint8_t rows, columns;
    uint8_t branch, branches;  // that it sums over; they have one target
  };

  SpanParams rows[kMaxSpans], columns[kMaxSpans];
  TapRun row_runs[kMaxRuns], column_runs[kMaxRuns];
  BranchParams branches[kMaxBranches];
  Entry entries[kMaxRectangles];  // deepest first, so that no long tile starts last
  int count;
  int blocks;
};

// ---- As the host cuts them ----

// A Span that several branches share, with the live taps of each.
struct SharedSpan {
  int64_t index, count;
  std::vector<TapRun> runs;
};

// From `begin` of the span's targets on.
inline TapRun run_of(const Span& span, int64_t begin) {
  TapRun run{};
  run.taps = to_int(static_cast<int64_t>(span.taps.size()));
  if (run.taps == 0) return run;
  run.source = to_int(span.taps[0].source + begin * span.step);
  run.weight = to_int(span.taps[0].weight);
  if (run.taps == 1) return run;
  run.source_spacing = to_int(span.taps[1].source - span.taps[0].source);
  run.weight_spacing = to_int(span.taps[1].weight - span.taps[0].weight);
  return run;
}

// Cuts an axis, of which every branch has the same targets, where a tap of any branch goes in or
// out.
inline std::vector<SharedSpan> shared_spans(const std::vector<Axis>& axes) {
  struct Cursor {
    std::vector<Span> spans;
    size_t number;
    int64_t begin;  // in the span, of the targets that are left

    const Span& span() const { return spans[number]; }
    int64_t left() const { return span().count - begin; }
  };
  std::vector<Cursor> cursors;
  for (const Axis& axis : axes) cursors.push_back({spans_of(axis), 0, 0});

  std::vector<SharedSpan> shared;
  const Cursor& first = cursors[0];
  while (first.number < first.spans.size()) {
    SharedSpan span{first.span().index + first.begin * first.span().period, first.left(), {}};
    for (const Cursor& cursor : cursors) span.count = std::min(span.count, cursor.left());
    for (Cursor& cursor : cursors) {
      span.runs.push_back(run_of(cursor.span(), cursor.begin));
      cursor.begin += span.count;
      if (cursor.left() == 0) ++cursor.number, cursor.begin = 0;
    }
    shared.push_back(std::move(span));
  }
  return shared;
}

// Branches that are summed, or one alone: a target, and how its plane is cut.
struct TargetPlane {
  std::vector<BranchParams> branches;
  std::vector<SharedSpan> rows, columns;

  int64_t channels() const { return branches[0].columns; }
};

inline TargetPlane target_plane(const std::vector<BranchParams>& branches,
                                const std::vector<Axes>& axes) {
  if (branches.size() > kMaxSummedBranches) {
    throw std::runtime_error("fastseg: expected at most " + std::to_string(kMaxSummedBranches) +
                             " dense convolutions of one image in a sum or with a common gradient, "
                             "but got " +
                             std::to_string(branches.size()));
  }
  std::vector<Axis> rows, columns;
  for (const Axes& both : axes) rows.push_back(both.rows), columns.push_back(both.columns);
  return {branches, shared_spans(rows), shared_spans(columns)};
}

struct PlaneRectangle {
  const TargetPlane* plane;
  const SharedSpan *rows, *columns;
  int64_t taps;   // of all branches
  int64_t depth;  // taps times channels

  int64_t pixels(int64_t images) const { return images * rows->count * columns->count; }
};

inline std::vector<PlaneRectangle> rectangles_of(const std::vector<TargetPlane>& planes) {
  std::vector<PlaneRectangle> rectangles;
  for (const TargetPlane& plane : planes) {
    for (const SharedSpan& rows : plane.rows) {
      for (const SharedSpan& columns : plane.columns) {
        PlaneRectangle rectangle{&plane, &rows, &columns, 0, 0};
        int64_t padded = 0;  // the depth in whole chunks, or more
        for (size_t i = 0; i < plane.branches.size(); ++i) {
          const int64_t taps = int64_t{rows.runs[i].taps} * columns.runs[i].taps;
          rectangle.taps += taps;
          rectangle.depth += taps * plane.branches[i].channels;
          padded += taps * (plane.branches[i].channels + kChunkBytes);
        }
        to_int(padded);
        rectangles.push_back(rectangle);
      }
    }
  }
  std::stable_sort(
      rectangles.begin(), rectangles.end(),
      [](const PlaneRectangle& a, const PlaneRectangle& b) { return a.depth > b.depth; });
  return rectangles;
}

// Collects the rectangles of one launch.
class LaunchTable {
 public:
  LaunchTable(int64_t images, int tile_rows, int tile_columns)
      : images_(images), tile_rows_(tile_rows), tile_columns_(tile_columns) {}

  // False, and nothing has changed, when it has no room for the rectangle.
  bool add(const PlaneRectangle& rectangle, int64_t first_tile) {
    const TargetPlane& plane = *rectangle.plane;
    const int branches = static_cast<int>(plane.branches.size());
    const int branch = find(planes_, &plane), row = find(rows_, rectangle.rows);
    const int column = find(columns_, rectangle.columns);
    if (table_.count == kMaxRectangles || (branch < 0 && branches_ + branches > kMaxBranches) ||
        (row < 0 && !has_room(rows_, row_runs_, branches)) ||
        (column < 0 && !has_room(columns_, column_runs_, branches))) {
      return false;
    }
    if (branch < 0) {
      planes_.push_back({&plane, branches_});
      std::copy(plane.branches.begin(), plane.branches.end(), table_.branches + branches_);
      branches_ += branches;
    }
    if (row < 0) add_span(*rectangle.rows, table_.rows, table_.row_runs, rows_, row_runs_);
    if (column < 0) {
      add_span(*rectangle.columns, table_.columns, table_.column_runs, columns_, column_runs_);
    }
    table_.entries[table_.count++] = {table_.blocks,
                                      to_int(first_tile),
                                      static_cast<uint8_t>(find(rows_, rectangle.rows)),
                                      static_cast<uint8_t>(find(columns_, rectangle.columns)),
                                      static_cast<uint8_t>(find(planes_, &plane)),
                                      static_cast<uint8_t>(branches)};
    table_.blocks = to_int(table_.blocks + ceil_div(rectangle.pixels(images_), tile_rows_) *
                                               ceil_div(plane.channels(), tile_columns_));
    return true;
  }

  // What was added since the last time.
  Rectangles take() {
    const Rectangles taken = table_;
    *this = LaunchTable(images_, tile_rows_, tile_columns_);
    return taken;
  }

 private:
  template <typename Key>
  struct Place {
    const Key* key;
    int place;
  };

  template <typename Key>
  static int find(const std::vector<Place<Key>>& places, const Key* key) {
    for (const Place<Key>& place : places) {
      if (place.key == key) return place.place;
    }
    return -1;
  }

  static bool has_room(const std::vector<Place<SharedSpan>>& spans, int runs, int more) {
    return spans.size() < kMaxSpans && runs + more <= kMaxRuns;
  }

  static void add_span(const SharedSpan& span, SpanParams* spans, TapRun* all_runs,
                       std::vector<Place<SharedSpan>>& places, int& runs) {
    const int place = static_cast<int>(places.size());
    places.push_back({&span, place});
    spans[place] = {to_int(span.index), runs, Divider(to_int(span.count))};
    std::copy(span.runs.begin(), span.runs.end(), all_runs + runs);
    runs += static_cast<int>(span.runs.size());
  }

  int64_t images_;
  int tile_rows_, tile_columns_;
  Rectangles table_{};
  std::vector<Place<TargetPlane>> planes_;
  std::vector<Place<SharedSpan>> rows_, columns_;
  int branches_ = 0, row_runs_ = 0, column_runs_ = 0;
};

}  // namespace dilated
}  // namespace fastseg
