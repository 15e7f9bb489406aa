// Dense convolution on the CPU, compiled once per instruction set: see csrc/common/simd.h.
//
//     y[n, k, p, q] = act(bias[k] + scale[k] * sum over live taps (r, s) and c of
//                         weight[k, c, r, s] * x[n, c, p * stride - pad + r * dilation, ...])
//
// and the same for grad_input, where targets are the inputs, sources grad_y, and the filter maps k
// to c. A thread has a part of the targets and of their channels. Their sums are built up in steps:
//
//     step (a tap, or a few, and a block of up to 512 channels)
//                               weight -> panels [columns / 32][depth][32]          <= 512 KB, L2
//       targets the taps reach, 14 at a time
//                               the sources they look at, [14][depth]                <= 28 KB, L1
//         panels                sums [14][32] += sources * panel                      see product.h
//
// A step visits only those targets whose tap lands inside the image, so padding is never loaded
// and costs nothing: at ASPP's rates most of the filter does. Sources are multiplied where they
// lie if their channels are adjacent, and else copied: any layout and dtype will do. Sums wait in
// the target itself, or in scratch memory where that has another dtype or layout; the last step
// finishes them (scale, bias, activation) in registers if it can, and else a pass at the end does.
//
// grad_weight is a product whose depth is outputs: see WeightTask. A filter with few output
// channels goes another way: see ShiftCall. So does, in float, a 3x3 filter of many: see
// winograd_cpu_plan.h.

#include "csrc/common/product.h"  // and with it simd.h
#include "csrc/dilated/dilated_cpu_plan.h"

namespace fastseg {
namespace FASTSEG_SIMD {

using dilated_cpu::Call;
using dilated_cpu::Part;
using dilated_cpu::Step;

// Pixels [begin, end) of x [C][pixels], planes `plane` elements apart -> y [pixels][C].
template <class S>
void to_channels_last(const void* planes, int64_t plane, int64_t begin, int64_t end, int64_t C,
                      void* pixels) {
  using T = typename Accumulator<S>::type;
  const S* x = static_cast<const S*>(planes);
  S* y = static_cast<S*>(pixels);
  constexpr int64_t n = kLanes<T>;
  for (int64_t c = 0; c < C; c += n) {
    const int64_t deep = C - c;
    for (int64_t i = begin; i < end; i += n) {
      Vector<T> rows[n];
      FASTSEG_UNROLL for (int64_t j = 0; j < n; ++j) {
        rows[j] = Vector<T>{};
        if (j < deep) rows[j] = load_columns(x + (c + j) * plane + i, end - i);
      }
      transpose<T>(rows);
      FASTSEG_UNROLL for (int64_t j = 0; j < n; ++j) {
        if (i + j < end) store_columns(y + (i + j) * C + c, rows[j], deep);
      }
    }
  }
}

// Where the sums of output `q` of row `row` (counted over [N, P]) wait: in the output itself, or in
// scratch memory [outputs from `begin` on][block_columns].
template <class T>
FASTSEG_INLINE T* sums_of(const Call& call, T* sums, int64_t begin, int64_t row, int64_t q) {
  if (!call.direct) return sums + (row * call.Q + q - begin) * call.block_columns;
  return sums + row / call.P * call.target.n + row % call.P * call.target.h + q * call.target.w;
}

// Asks for the first `depth` elements of the `count` rows that fill_tile() will be called for next.
template <class S>
inline void prefetch_rows(const S* a, int64_t row_stride, int64_t count, int64_t depth) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < count; ++i, a += row_stride) {
    for (int64_t c = 0; c < depth; c += kLine) __builtin_prefetch(a + c);
  }
}

// Where the sources of one block lie, from the pixel that is read at target (n, 0, 0) on.
FASTSEG_INLINE int64_t offset_of(const Call& call, const dilated_cpu::TapBlock& block) {
  return block.source_row * call.source.h + block.source_column * call.source.w +
         block.channel * call.source.c;
}

// Whether the blocks of a step are one piece of memory: one tap's channels, or those of taps that
// look at neighbouring pixels.
inline bool is_one_piece(const Call& call, const Step& step) {
  for (int64_t i = step.first; i + 1 < step.last; ++i) {
    const int64_t next = offset_of(call, call.blocks[i]) + call.blocks[i].depth;
    if (offset_of(call, call.blocks[i + 1]) != next) return false;
  }
  return call.source.c == 1 && step.first < step.last;
}

// The weight [K][C] of one block, from target channel k on: forward maps C to K, grad_input K to C.
template <class S>
FASTSEG_INLINE const S* weight_of(const Call& call, const dilated_cpu::TapBlock& block, int64_t k) {
  const int64_t row = call.turned ? block.channel : k, column = call.turned ? k : block.channel;
  return static_cast<const S*>(call.weight.data) + row * call.weight.k + column +
         block.r * call.weight.r + block.s * call.weight.s;
}

// Asks for the weight of the next step bit by bit, while this one is computed: in memory it is as
// many short pieces as there are columns, which nobody else would foresee.
template <class S>
struct WeightAhead {
  static constexpr int64_t kLine = 64 / sizeof(S);
  const S* weight = nullptr;
  int64_t stride, lines;      // from piece to piece; of a piece
  int64_t next = 0, end = 0;  // lines
  int64_t at_once;

  WeightAhead(const Call& call, const Step* step, int64_t k, int64_t columns, int64_t products) {
    if (step == nullptr || step->last - step->first != 1) return;
    const dilated_cpu::TapBlock& block = call.blocks[step->first];
    const int64_t pieces = call.turned ? block.depth : columns;
    weight = weight_of<S>(call, block, k);
    stride = call.weight.k;
    lines = ((call.turned ? columns : block.depth) + kLine - 1) / kLine;
    end = pieces * lines;
    at_once = end / (products + 1) + 1;
  }

  FASTSEG_INLINE void ask() {
    for (int64_t i = 0; i < at_once && next < end; ++i, ++next) {
      __builtin_prefetch(weight + next / lines * stride + next % lines * kLine, 0, 2);
    }
  }
};

// One step over the targets [begin, end) and `columns` columns.
template <class S, class T>
inline void run_step(const Call& call, const Step& step, int64_t begin, int64_t end, T* sums,
                     const T* panels, int64_t columns, const Finish<T>* finish, T* tile,
                     WeightAhead<S> ahead_weight) {
  constexpr int64_t kFewRows = 4;  // with fewer, multiply-adds wait for each other
  const int64_t pixel_step = call.step_w * call.source.w;
  const bool in_place = std::is_same_v<S, T> && is_one_piece(call, step) && !aliased<S>(pixel_step);
  T* targets[kTileRows];
  int rows = 0;
  for (int64_t row = begin / call.Q; row * call.Q < end; ++row) {
    const int64_t n = row / call.P, p = row % call.P;
    if (p < step.rows.begin || p >= step.rows.end) continue;
    int64_t q = begin - row * call.Q, last = end - row * call.Q;
    if (q < step.columns.begin) q = step.columns.begin;
    if (last > step.columns.end) last = step.columns.end;
    if (q >= last) continue;
    const S* source = static_cast<const S*>(call.source.data) + n * call.source.n +
                      p * call.step_h * call.source.h;
    T* target = sums_of(call, sums, begin, row, 0);
    const int64_t target_step = call.direct ? call.target.w : call.block_columns;

    if constexpr (std::is_same_v<S, T>) {
      // Tiles of equal height: three of 11 rows rather than two of 14 and one of 5.
      const int64_t tiles = (last - q + kTileRows - 1) / kTileRows;
      const S* from = in_place ? source + offset_of(call, call.blocks[step.first]) : source;
      for (int64_t i = in_place ? tiles : 0; i > 0 && last - q >= kFewRows * i; --i) {
        const int64_t count = (last - q + i - 1) / i;
        T* own_targets[kTileRows];
        for (int64_t j = 0; j < count; ++j) own_targets[j] = target + (q + j) * target_step;
        prefetch_rows(from + (q + count) * pixel_step, pixel_step, i > 1 ? count : 0, step.depth);
        multiply_tile(from + q * pixel_step, pixel_step, static_cast<int>(count), panels,
                      step.depth, own_targets, columns, step.starts, finish);
        ahead_weight.ask();
        q += count;
      }
    }
    while (q < last) {
      const int64_t count = last - q < kTileRows - rows ? last - q : kTileRows - rows;
      const int64_t ahead = last - q - count < kTileRows ? last - q - count : kTileRows;
      T* place = tile + rows * kTilePitch<T>;
      for (int64_t i = step.first; i < step.last; ++i) {
        const dilated_cpu::TapBlock& block = call.blocks[i];
        const S* from = source + q * pixel_step + offset_of(call, block);
        fill_tile(from, pixel_step, call.source.c, count, block.depth, place);
        if (call.source.c == 1) {
          prefetch_rows(from + count * pixel_step, pixel_step, ahead, block.depth);
        }
        place += block.depth;
      }
      for (int64_t i = 0; i < count; ++i) targets[rows + i] = target + (q + i) * target_step;
      q += count;
      rows += static_cast<int>(count);
      if (rows == kTileRows) {
        multiply_tile(tile, kTilePitch<T>, rows, panels, step.depth, targets, columns, step.starts,
                      finish);
        ahead_weight.ask();
        rows = 0;
      }
    }
  }
  if (rows > 0) {
    multiply_tile(tile, kTilePitch<T>, rows, panels, step.depth, targets, columns, step.starts,
                  finish);
  }
}

// The weight of one step and of the target channels [k, k + columns), as panels.
template <class S, class T>
inline void pack_weight(const Call& call, const Step& step, int64_t k, int64_t columns, T* panels) {
  const int64_t column_stride = call.turned ? 1 : call.weight.k;
  const int64_t depth_stride = call.turned ? call.weight.k : 1;
  int64_t place = 0;
  for (int64_t i = step.first; i < step.last; ++i) {
    const dilated_cpu::TapBlock& block = call.blocks[i];
    pack_panels(weight_of<S>(call, block, k), column_stride, depth_stride, columns, block.depth,
                panels, place, step.depth);
    place += block.depth;
  }
}

// Bytes of scratch memory that run_part() wants.
template <class S>
int64_t scratch_bytes(const Call& call) {
  using T = typename Accumulator<S>::type;
  const int64_t panels = packed_size<T>(call.block_columns, call.depth);
  const int64_t sums = call.direct ? 0 : call.block_pixels * call.block_columns;
  return (panels + sums + kTileRows * kTilePitch<T>)*static_cast<int64_t>(sizeof(T));
}

template <class S>
void run_part(const Call& call, const Part& part, char* scratch) {
  using T = typename Accumulator<S>::type;
  T* tile = reinterpret_cast<T*>(scratch);
  T* panels = tile + kTileRows * kTilePitch<T>;
  T* block = panels + packed_size<T>(call.block_columns, call.depth);

  for (int64_t k = part.first; k < part.last; k += call.block_columns) {
    const int64_t columns = part.last - k < call.block_columns ? part.last - k : call.block_columns;
    const Finish<T> finish = {
        call.scale == nullptr ? nullptr : static_cast<const T*>(call.scale) + k,
        call.bias == nullptr ? nullptr : static_cast<const T*>(call.bias) + k, call.activation};
    S* y = static_cast<S*>(call.target.data) + k * call.target.c;
    for (int64_t begin = part.begin; begin < part.end; begin += call.block_pixels) {
      const int64_t end =
          part.end - begin < call.block_pixels ? part.end : begin + call.block_pixels;
      T* sums = block;
      if constexpr (std::is_same_v<S, T>) {
        if (call.direct) sums = y;
      }
      if (call.clears) {
        for (int64_t o = begin; o < end; ++o) {
          clear_row(sums_of(call, sums, begin, o / call.Q, o % call.Q), columns);
        }
      }
      for (int64_t i = 0; i < call.step_count; ++i) {
        const Step& step = call.steps[i];
        pack_weight<S>(call, step, k, columns, panels);
        const Step* next = i + 1 < call.step_count ? &step + 1 : nullptr;
        run_step<S, T>(call, step, begin, end, sums, panels, columns,
                       !call.finishes_last && step.finishes ? &finish : nullptr, tile,
                       WeightAhead<S>(call, next, k, columns, (end - begin) / kTileRows));
      }
      if (!call.finishes_last) continue;
      for (int64_t row = begin / call.Q; row * call.Q < end; ++row) {
        int64_t q = begin - row * call.Q, last = end - row * call.Q;
        if (q < 0) q = 0;
        if (last > call.Q) last = call.Q;
        S* to = y + row / call.P * call.target.n + row % call.P * call.target.h + q * call.target.w;
        finish_pixels(sums_of(call, sums, begin, row, q),
                      call.direct ? call.target.w : call.block_columns, last - q, columns, finish,
                      to, call.target.c, call.target.w);
      }
    }
  }
}

// ---- Few output channels ----

// Rows [begin, end) of the targets, counted over [N, P]. `scratch` holds Q * K sums.
template <class T>
void run_shift(const dilated_cpu::ShiftCall& call, int64_t begin, int64_t end, char* scratch) {
  T* sums = reinterpret_cast<T*>(scratch);
  const Finish<T> finish = {static_cast<const T*>(call.scale), static_cast<const T*>(call.bias),
                            call.activation};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / call.P, p = row % call.P;
    clear_row(sums, call.Q * call.K);
    for (int64_t i = 0; i < call.tap_count; ++i) {
      const dilated_cpu::LiveTap& tap = call.taps[i];
      if (p < tap.rows.begin || p >= tap.rows.end) continue;
      const T* z = static_cast<const T*>(call.z) + n * call.z_n +
                   (p * call.step_h + tap.source_row) * call.z_h + tap.source_column * call.z_w +
                   (tap.r * call.S + tap.s) * call.K;
      for (int64_t q = tap.columns.begin; q < tap.columns.end; ++q) {
        const T* from = z + q * call.step_w * call.z_w;
        T* to = sums + q * call.K;
        for (int64_t k = 0; k < call.K; k += kLanes<T>) {
          const int64_t count = call.K - k;
          store_columns(to + k, load_columns(to + k, count) + load_columns(from + k, count), count);
        }
      }
    }
    T* y = static_cast<T*>(call.target.data) + n * call.target.n + p * call.target.h;
    finish_pixels(sums, call.K, call.Q, call.K, finish, y, call.target.c, call.target.w);
  }
}

// ---- grad_weight ----

// Outputs that a product takes in: their panels have to fit the second-level cache, which is a
// smaller one where vectors are shorter.
template <class T>
constexpr int64_t kWeightDepth = FASTSEG_SIMD_BYTES == 64 ? kMaxDepth<T> : kMaxDepth<T> / 2;
// Channels of grad_y that are copied at a time: a tile, or several that make up whole vectors.
constexpr int64_t kFilledRows = FASTSEG_SIMD_BYTES == 64 ? kTileRows : 4 * kTileRows;

// Bytes of scratch memory that run_weight_task() wants.
template <class T>
constexpr int64_t kWeightScratchBytes =
    (kFilledRows * kTilePitch<T> +
     kWeightDepth<T> * (dilated_cpu::kWeightBlock + kPanelColumns<T>)) *
    static_cast<int64_t>(sizeof(T));

// A run of neighbouring outputs of one row that a product takes in.
struct OutputRun {
  int64_t x, grad_y;  // offsets of its first pixel
  int64_t count;
};

// Asks for the first kFilledRows channels of pixels [begin, end) of some runs, into the
// second-level cache.
template <class S>
inline void prefetch_runs(const S* grad_y, int64_t pixel, const OutputRun* runs, int64_t run_count,
                          int64_t begin, int64_t end) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < run_count && end > 0; ++i) {
    const S* from = grad_y + runs[i].grad_y;
    for (int64_t j = begin < 0 ? 0 : begin; j < runs[i].count && j < end; ++j) {
      for (int64_t c = 0; c < kFilledRows; c += kLine)
        __builtin_prefetch(from + j * pixel + c, 0, 2);
    }
    begin -= runs[i].count;
    end -= runs[i].count;
  }
}

template <class S>
void run_weight_task(const dilated_cpu::WeightCall& call, const dilated_cpu::WeightTask& task,
                     char* scratch) {
  using T = typename Accumulator<S>::type;
  const dilated_cpu::LiveTap& tap = call.taps[task.tap];
  const S* x = static_cast<const S*>(call.x.data) + task.c * call.x.c + tap.source_row * call.x.h +
               tap.source_column * call.x.w;
  const S* grad_y = static_cast<const S*>(call.grad_y.data) + task.k * call.grad_y.c;
  T* sums = static_cast<T*>(call.sums.data) + task.split * call.sums_split + tap.r * call.sums.r +
            tap.s * call.sums.s + task.k * call.sums.k + task.c;
  T* tile = reinterpret_cast<T*>(scratch);
  T* panels = tile + kFilledRows * kTilePitch<T>;
  const int64_t live_rows = tap.rows.end - tap.rows.begin;
  const int64_t width = tap.columns.end - tap.columns.begin;
  const int64_t outputs = (task.end - task.begin) * width;

  // No sum of a few outputs is one long chain of additions, whose rounding would show.
  constexpr int64_t kShortest = 32;
  const int64_t quarter = (outputs + 3) / 4 < kShortest ? kShortest : (outputs + 3) / 4;
  const int64_t deepest = quarter < kWeightDepth<T> ? quarter : kWeightDepth<T>;

  // A tap with few live rows leaves some of the splits empty.
  for (int64_t k = 0; k < task.k_count && outputs == 0; ++k) {
    clear_row(sums + k * call.sums.k, task.c_count);
  }
  for (int64_t begin = 0; begin < outputs; begin += deepest) {
    const int64_t depth = outputs - begin < deepest ? outputs - begin : deepest;
    OutputRun runs[kWeightDepth<T>];
    int64_t run_count = 0;
    for (int64_t o = begin; o < begin + depth;) {
      const int64_t row = task.begin + o / width, column = o % width;
      const int64_t n = row / live_rows, p = tap.rows.begin + row % live_rows;
      const int64_t q = tap.columns.begin + column;
      const int64_t left = begin + depth - o;
      const int64_t count = width - column < left ? width - column : left;
      runs[run_count++] = {n * call.x.n + p * call.step_h * call.x.h + q * call.step_w * call.x.w,
                           n * call.grad_y.n + p * call.grad_y.h + q * call.grad_y.w, count};
      o += count;
    }
    for (int64_t i = 0, place = 0; i < run_count; place += runs[i++].count) {
      pack_panels(x + runs[i].x, call.x.c, call.step_w * call.x.w, task.c_count, runs[i].count,
                  panels, place, depth);
    }
    for (int64_t k = 0; k < task.k_count; k += kFilledRows) {
      const int64_t filled = task.k_count - k < kFilledRows ? task.k_count - k : kFilledRows;
      for (int64_t i = 0, place = 0; i < run_count; place += runs[i++].count) {
        fill_tile(grad_y + runs[i].grad_y + k * call.grad_y.c, call.grad_y.c, call.grad_y.w, filled,
                  runs[i].count, tile + place);
      }
      for (int64_t first = 0; first < filled; first += kTileRows) {
        const int64_t rows = filled - first < kTileRows ? filled - first : kTileRows;
        if (kFilledRows > kTileRows && call.grad_y.c == 1 && k + kFilledRows < task.k_count) {
          prefetch_runs(grad_y + k + kFilledRows, call.grad_y.w, runs, run_count,
                        depth * first / filled, depth * (first + rows) / filled);
        }
        T* targets[kTileRows];
        for (int64_t i = 0; i < rows; ++i) targets[i] = sums + (k + first + i) * call.sums.k;
        multiply_tile<T>(tile + first * kTilePitch<T>, kTilePitch<T>, static_cast<int>(rows),
                         panels, depth, targets, task.c_count, begin == 0,
                         static_cast<const Finish<T>*>(nullptr));
      }
    }
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
