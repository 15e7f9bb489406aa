// What a CPU call of the depthwise family decides before any kernel runs: which sources each target
// reads, in which order rows are visited, and how the work is cut into tasks. Free of torch
// headers, compiled once (not per instruction set).
// Directions and axes are those of csrc/common/live_taps.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "csrc/common/conv_shape.h"
#include "csrc/common/live_taps.h"

namespace fastseg {
namespace depthwise_cpu {

// Every dilation-th position of a row with a filter three taps wide: target t of this run is column
// target + dilation * t, source s is column source + dilation * s, and tap i of target t reads
// source t + i - pad.
struct Run {
  int64_t target, targets;
  int64_t source, sources;
  int64_t pad;
};

// The runs of an axis with three taps, `dilation` apart. Its step is 1, or else the dilation is 1:
// then the only run is the row, and tap i of target t reads source step * t + i - pad.
inline std::vector<Run> cut_runs(const Axis& axis, int64_t dilation) {
  std::vector<Run> runs;
  const int64_t first = axis.classes[0].taps[0].source;
  const int64_t phases = std::min(axis.targets, dilation);
  runs.reserve(phases);
  for (int64_t target = 0; target < phases; ++target) {
    const int64_t offset = target + first;
    const int64_t source = (offset % dilation + dilation) % dilation;
    runs.push_back({target, ceil_div(axis.targets - target, dilation), source,
                    std::max<int64_t>(0, ceil_div(axis.sources - source, dilation)),
                    (source - offset) / dilation});
  }
  return runs;
}

// The order of target rows: 0, d, 2d, ..., 1, 1 + d, ...: neighbours in this order share all but
// one of their source rows, so that a large dilation needs no more cache than dilation 1.
struct Walk {
  int64_t rows, stride;  // 1 <= stride <= rows

  int64_t row_at(int64_t position) const {
    const int64_t length = rows / stride, longer = rows % stride;  // that many phases have one more
    const int64_t in_longer = longer * (length + 1);
    if (position < in_longer) {
      return position / (length + 1) + position % (length + 1) * stride;
    }
    position -= in_longer;
    return longer + position / length + position % length * stride;
  }
  int64_t next(int64_t row) const { return row + stride < rows ? row + stride : row % stride + 1; }
};

// A tensor [N, C, H, W]; strides in elements.
struct Image {
  void* data;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// A tensor [K, 1, R, S], or [K] with zero strides for r and s; strides in elements.
struct Filter {
  void* data;
  int64_t stride_k, stride_r, stride_s;
};

// The channels of one task. Direct tensors are read or written in place, and the block has at least
// a vector of channels then; others pass through scratch memory row by row.
struct Block {
  int64_t begin, channels;
  bool direct_source, direct_target, direct_x;

  bool direct() const { return direct_source || direct_target || direct_x; }
};

// One call. Tasks are numbered [N][bands][blocks]; the cut never depends on the number of threads.
struct Call {
  int64_t N, C, multiplier, R, S;
  Axis rows, columns;
  std::vector<Run> runs;  // empty: tiles
  bool pairs;             // two target rows at a time
  bool streams;           // targets are written past the caches
  int64_t dilation_w;
  Walk walk;
  int64_t source_row_stride;  // between the source rows that one target row reads
  int64_t slots;              // packed source rows that are kept
  int64_t bands;
  std::vector<Block> blocks;
  int64_t block_lanes;  // of the widest block, in whole vectors
  int64_t bytes;        // of all large tensors, roughly
  Activation activation;
  Image source, target;
  Filter weight, bias;
  // Backward only.
  Image x;
  bool needs_grad_x, needs_grad_weight, needs_grad_bias;
  void* partial;  // [N][bands][blocks][partial_size()], in the accumulation type
  Filter grad_weight, grad_bias;

  // Whether the tensors are too large for the L2 cache, or for a share of the last-level cache.
  bool exceeds_l2() const { return bytes >= int64_t{8} << 20; }
  bool exceeds_l3() const { return bytes >= int64_t{18} << 20; }
  // Whether targets are better written past the caches. Their lines lie with whichever core had
  // this memory last, and to get them from there can take longer than from memory.
  bool leaves_core() const { return bytes >= int64_t{5} << 20; }
  int64_t block_count() const { return static_cast<int64_t>(blocks.size()); }
  int64_t tasks() const { return N * bands * block_count(); }
  // A task's sums: of `multiplier` filters, then of as many biases.
  int64_t partial_size() const { return multiplier * (R * S + 1) * block_lanes; }
};

// What both directions share. `item`: bytes of an element in memory, `tensors`: as large as the
// input.
inline Call plan(const ConvShape& shape, int64_t item, int64_t tensors, const Axes& axes) {
  Call call{};
  call.rows = axes.rows;
  call.columns = axes.columns;
  call.N = shape.N;
  call.C = shape.C;
  call.multiplier = shape.multiplier();
  call.R = shape.R;
  call.S = shape.S;
  call.dilation_w = shape.dilation_w;
  call.bytes = tensors * shape.N * shape.C * shape.H * shape.W * item;
  return call;
}

// Whether pixels `bytes` apart leave only a few sets of every cache to all of a row.
inline bool aliased(int64_t bytes) { return bytes % 1024 == 0; }

// Runs need several positions in a row for every one at its ends.
inline bool runs_pay(const ConvShape& shape, const Call& call) {
  return shape.S == 3 && shape.R <= 3 && shape.stride_w == 1 &&
         call.columns.targets >= 6 * shape.dilation_w;
}

// Whether a call may go by pairs of rows, given that its tensors are used in place.
inline bool pairs_pay(const ConvShape& shape) {
  const int64_t stride = shape.stride_h;
  const bool dense = shape.dilation_h == 1 && shape.dilation_w == 1;
  return shape.R == 3 && shape.S == 3 && stride == shape.stride_w &&
         (stride == 1 || (stride == 2 && dense));
}

// Whether pixels of so many bytes are better copied into rows of scratch memory: with vectors that
// are parts of cache lines, whose other parts a few sets of the L1 cache do not keep. Long rows
// compete in any case, and wide filters read too much of scratch memory.
inline bool copies_pay(const Call& call, int64_t pixel, bool whole_lines) {
  return !whole_lines && aliased(pixel) && call.columns.targets < 96 && call.S <= 5;
}

inline Call plan_forward(const ConvShape& shape, int64_t item, bool pairs, bool whole_lines) {
  Call call = plan(shape, item, 2, output_axes(shape));
  call.walk = {shape.P,
               std::min(shape.P, shape.dilation_h / std::gcd(shape.dilation_h, shape.stride_h))};
  call.source_row_stride = shape.dilation_h;
  // Tiles where the order of pixels counts for more than the number of loads: for long rows from
  // memory, where all pixels of a row compete for a few sets of the caches, and with vectors that
  // are parts of cache lines, which tiles read one after the other.
  const bool tiles =
      !whole_lines || (shape.dilation_w == 1 &&
                       (call.columns.targets >= 96 ? call.exceeds_l3()
                                                   : call.exceeds_l2() && aliased(shape.C * item)));
  call.pairs = pairs;
  if (pairs || (runs_pay(shape, call) && !tiles)) {
    call.runs = cut_runs(call.columns, shape.dilation_w);
  }
  return call;
}

inline Call plan_backward(const ConvShape& shape, int64_t item) {
  Call call = plan(shape, item, 3, input_axes(shape));
  call.walk = {shape.H, std::min(shape.H, shape.dilation_h)};
  call.source_row_stride = shape.dilation_h / std::gcd(shape.dilation_h, shape.stride_h);
  if (call.multiplier == 1 && runs_pay(shape, call)) {
    call.runs = cut_runs(call.columns, shape.dilation_w);
  }
  return call;
}

// How a call's tensors may be touched: channels-last ones in place.
struct Access {
  bool source, target, x;
};

// Cuts the work into blocks of channels and bands of rows. `vector`: lanes of a vector, `item`:
// bytes of an element in memory.
inline void cut_tasks(int64_t vector, int64_t item, Access access, Call* call) {
  const int64_t width = std::max(call->columns.sources, call->columns.targets);
  const int64_t row_work =
      call->N * call->C * call->multiplier * call->columns.targets * (call->R * call->S + 4);
  // 64 tasks, if they are worth it, feed any usual number of threads.
  const int64_t wanted = std::clamp<int64_t>((row_work * call->walk.rows) >> 18, 1, 64);
  // Neighbouring bands both read all but one of the rows in use.
  const auto max_bands = [&](int64_t rows_in_use) {
    return std::max<int64_t>(1, call->walk.rows / (4 * std::max<int64_t>(1, rows_in_use - 1)));
  };

  // Bytes of a pixel that a task reads: enough for whole pages and prefetchers to pay, and more
  // where the caches' sets are few.
  const bool channels_last = call->source.stride_c == 1;
  const bool few_sets = aliased(call->source.stride_w * item);
  const bool tiles = call->runs.empty();
  int64_t pixel = 128;
  if (call->pairs) {
    pixel = 512;
  } else if (access.source) {
    pixel = few_sets || tiles || call->exceeds_l2() ? 1024 : 256;
  } else if (channels_last) {
    pixel = few_sets ? 512 : 256;
  }
  int64_t lanes = pixel / item;
  const int64_t narrowest = (access.source && tiles ? 256 : 128) / item;
  // The rows in use have to fit the L2 cache, with room for the rows of scratch memory.
  const int64_t row = width * std::max<int64_t>(item, 4);  // bytes for each channel
  const int64_t l2 = int64_t{access.source ? 768 : 512} << 10;
  // What neighbouring sliding tiles of eight targets share has to stay in the L1 cache.
  const int64_t l1 = int64_t{40} << 10;
  int64_t tile = 0;
  if (access.source && tiles && call->dilation_w <= 2) {
    tile = call->R * (7 * call->columns.step + (call->S - 1) * call->dilation_w + 1) * item;
  }
  while (lanes > narrowest &&
         ((call->R + 1) * row * lanes > l2 || tile * lanes > l1 || lanes >= 2 * call->C ||
          3 * call->N * ceil_div(call->C, lanes) * max_bands(call->R) < wanted)) {
    lanes /= 2;
  }
  lanes = std::max(lanes, vector);

  // A contiguous plane's short rows share cache lines, so that planes whose rows in use fit the
  // cache are better walked straight through.
  call->slots = call->R;
  const int64_t span = (call->R - 1) * call->source_row_stride + 1;
  if (!channels_last && (std::min(span, call->rows.sources) + 1) * row * lanes <= l2) {
    call->slots = std::min(span, call->rows.sources);
    call->source_row_stride = 1;
    call->walk.stride = 1;
  }

  const bool direct = call->C >= vector && (access.source || access.target || access.x);
  if (!direct) access = {};
  call->blocks.reserve(ceil_div(call->C, lanes));
  for (int64_t c = 0; c < call->C;) {
    // A remainder narrower than a vector stays with its neighbour.
    const int64_t rest = call->C - c;
    const int64_t channels = direct && rest < lanes + vector ? rest : std::min(lanes, rest);
    call->blocks.push_back({c, channels, access.source, access.target, access.x});
    c += channels;
  }
  for (const Block& block : call->blocks) {
    call->block_lanes = std::max(call->block_lanes, round_up(block.channels, vector));
  }
  const int64_t bands = ceil_div(wanted, call->N * call->block_count());
  call->bands = std::clamp(bands, int64_t{1}, max_bands(call->slots));
}

}  // namespace depthwise_cpu
}  // namespace fastseg
