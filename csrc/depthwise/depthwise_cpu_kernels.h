// story
#include "csrc/depthwise/depthwise_cpu_rows.h"

namespace fastseg {
namespace FASTSEG_SIMD {

using depthwise_cpu::Axis;
using depthwise_cpu::AxisClass;
using depthwise_cpu::Block;
using depthwise_cpu::Call;
using depthwise_cpu::Image;
using depthwise_cpu::Segment;
using depthwise_cpu::Tap;

// One live filter row: the source row it reads, its weights and their gradient [S][lanes].
template <class A>
struct RowTap {
  const A* source;
  const A* weight;
  A* grad_weight;
};

// One target row and all that it reads. Strides are elements from pixel to pixel.
template <class A>
struct RowJob {
  const RowTap<A>* taps;
  int64_t tap_count;
  int64_t source_stride;
  const A* init;  // [lanes]
  A* target;
  int64_t target_stride;
  const A* x;
  int64_t x_stride;
  int64_t lanes;
};

// One segment of a target row: its positions have the same live taps. Strides are elements from
// position to position; pointers are those of position 0.
template <class A>
struct Strip {
  const RowTap<A>* taps;
  const RowTap<A>* taps_end;
  int64_t source_step, target_step, x_step;
  const A* init;
  A* target;
  const A* x;
  int64_t lanes;
  int64_t source_offset, first_weight, weight_offset;
  const Tap *columns, *columns_end;  // in elements
};

// kColumns: the number of live filter columns when they are neighbours, or 0: read from the list.
template <class A, int kTile, int kColumns, bool kInput, bool kWeight>
FASTSEG_NOINLINE void tiles(const Strip<A>& shared, int64_t position, int64_t count) {
  constexpr int64_t n = kLanes<A>;
  const Strip<A> strip = shared;
  const int64_t step = strip.source_step;
  for (; count > 0; --count, position += kTile) {
    for (int64_t c = 0; c < strip.lanes; c += n) {
      Vector<A> acc[kTile], x[kTile];
      const A* x_at = strip.x + position * strip.x_step + c;
      FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
        if constexpr (kInput) acc[j] = load(strip.init + c);
        if constexpr (kWeight) x[j] = load(x_at);
        x_at += strip.x_step;
        FASTSEG_OPAQUE(x_at);
      }
      const int64_t at = position * step + c;
      for (const RowTap<A>* tap = strip.taps; tap != strip.taps_end; ++tap) {
        if constexpr (kColumns > 0) {
          const A* source = tap->source + at + strip.source_offset;
          const A* weight_row = tap->weight + c + strip.first_weight;
          const int64_t weight_step = strip.weight_offset;
          Vector<A> weight[kColumns], sum[kColumns];
          FASTSEG_UNROLL for (int t = 0; t < kColumns; ++t) {
            if constexpr (kInput) weight[t] = load(weight_row + t * weight_step);
            if constexpr (kWeight) sum[t] = Vector<A>{};
          }
          FASTSEG_UNROLL for (int i = 0; i < kTile + kColumns - 1; ++i) {
            Vector<A> value = load(source);
            FASTSEG_KEEP(value);
            source += step;
            FASTSEG_OPAQUE(source);
            FASTSEG_UNROLL for (int t = 0; t < kColumns; ++t) {
              if (i - t < 0 || i - t >= kTile) continue;
              if constexpr (kInput) acc[i - t] += weight[t] * value;
              if constexpr (kWeight) sum[t] += x[i - t] * value;
            }
          }
          if constexpr (kWeight) {
            A* total = tap->grad_weight + c + strip.first_weight;
            FASTSEG_UNROLL for (int t = 0; t < kColumns; ++t) {
              store(total + t * weight_step, load(total + t * weight_step) + sum[t]);
            }
          }
        } else {
          for (const Tap* column = strip.columns; column != strip.columns_end; ++column) {
            const A* source = tap->source + at + column->source;
            Vector<A> weight, even{}, odd{};
            if constexpr (kInput) weight = load(tap->weight + column->weight + c);
            FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
              const Vector<A> value = load(source);
              source += step;
              FASTSEG_OPAQUE(source);
              if constexpr (kInput) acc[j] += weight * value;
              if constexpr (kWeight) (j % 2 == 0 ? even : odd) += x[j] * value;
            }
            if constexpr (kWeight) {
              A* total = tap->grad_weight + column->weight + c;
              store(total, load(total) + (even + odd));
            }
          }
        }
      }
      if constexpr (kInput) {
        A* target = strip.target + position * strip.target_step + c;
        FASTSEG_UNROLL for (int j = 0; j < kTile; ++j) {
          store(target, acc[j]);
          target += strip.target_step;
          FASTSEG_OPAQUE(target);
        }
      }
    }
  }
}

template <class A, int kColumns, bool kInput, bool kWeight>
inline void tiles_of_width(const Strip<A>& strip, int64_t width, int64_t position, int64_t count) {
  switch (width) {
    case 8:
      return tiles<A, 8, kColumns, kInput, kWeight>(strip, position, count);
    case 7:
      return tiles<A, 7, kColumns, kInput, kWeight>(strip, position, count);
    case 6:
      return tiles<A, 6, kColumns, kInput, kWeight>(strip, position, count);
    case 5:
      return tiles<A, 5, kColumns, kInput, kWeight>(strip, position, count);
    case 4:
      return tiles<A, 4, kColumns, kInput, kWeight>(strip, position, count);
    case 3:
      return tiles<A, 3, kColumns, kInput, kWeight>(strip, position, count);
    case 2:
      return tiles<A, 2, kColumns, kInput, kWeight>(strip, position, count);
    default:
      return tiles<A, 1, kColumns, kInput, kWeight>(strip, position, count);
  }
}

template <class A, bool kInput, bool kWeight>
inline void compute_row(const Axis& columns, const RowJob<A>& row, Tap* scaled) {
  // Accumulators, x and temporaries must fit the registers: 32 with AVX-512, 16 before.
  constexpr int64_t widest = kWeight && FASTSEG_SIMD_BYTES != 64 ? 4 : 8;
  Strip<A> strip;
  strip.taps = row.taps;
  strip.taps_end = row.taps + row.tap_count;
  strip.source_step = columns.step * row.source_stride;
  strip.target_step = columns.period * row.target_stride;
  strip.x_step = columns.period * row.x_stride;
  strip.init = row.init;
  strip.lanes = row.lanes;
  strip.columns = scaled;
  int64_t index = 0;
  for (const AxisClass& cls : columns.classes) {
    for (const Segment& segment : cls.segments) {
      const int64_t live = segment.last - segment.first;
      const Tap* taps = cls.taps.data() + segment.first;
      bool neighbours = columns.step == 1;
      for (int64_t t = 0; t < live; ++t) {
        scaled[t].source = (taps[t].source + segment.begin * columns.step) * row.source_stride;
        scaled[t].weight = taps[t].weight * row.lanes;
      }
      strip.columns_end = scaled + live;
      const int64_t column = index + segment.begin * columns.period;
      strip.target = kInput ? row.target + column * row.target_stride : nullptr;
      strip.x = kWeight ? row.x + column * row.x_stride : nullptr;
      // Tiles of two widths that differ by one.
      const int64_t positions = segment.end - segment.begin;
      const int64_t count = (positions + widest - 1) / widest;
      const int64_t width = positions / count, wider = positions % count;
      if (live == 3 && neighbours && taps[1].source - taps[0].source == 1) {
        strip.source_offset = scaled[0].source;
        strip.first_weight = scaled[0].weight;
        strip.weight_offset = scaled[1].weight - scaled[0].weight;
        if (wider > 0) tiles_of_width<A, 3, kInput, kWeight>(strip, width + 1, 0, wider);
        tiles_of_width<A, 3, kInput, kWeight>(strip, width, wider * (width + 1), count - wider);
        continue;
      }
      if (wider > 0) tiles_of_width<A, 0, kInput, kWeight>(strip, width + 1, 0, wider);
      tiles_of_width<A, 0, kInput, kWeight>(strip, width, wider * (width + 1), count - wider);
    }
    ++index;
  }
}

// ---- tasks

// Consecutive 64-byte aligned arrays in one buffer; without a buffer it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* array = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return array;
  }
};

template <class A>
struct Scratch {
  A *sources, *x, *target, *weight, *init, *totals;
  int64_t* held;
  RowTap<A>* row_taps;
  Tap* columns;
  int64_t bytes;

  Scratch(const Call& call, char* base) {
    Arena arena{base};
    const int64_t m = call.multiplier, taps = m * call.R * call.S, lanes = call.block_lanes;
    sources = arena.take<A>(m * call.R * call.columns.sources * lanes);
    x = arena.take<A>(call.columns.targets * lanes);
    target = arena.take<A>(call.columns.targets * lanes);
    weight = arena.take<A>(taps * lanes);
    init = arena.take<A>(m * lanes);
    totals = arena.take<A>(taps * lanes);
    held = arena.take<int64_t>(m * call.R);
    row_taps = arena.take<RowTap<A>>(m * call.R);
    columns = arena.take<Tap>(call.S);
    bytes = arena.used;
  }
};

template <class S>
struct Task {
  using A = typename Accumulator<S>::type;

  const Call& call;
  const Scratch<A>& scratch;
  const Block& block;
  int64_t image, band, begin, end;  // rows [begin, end) of the walk
  int64_t lanes, taps;              // taps: elements of a packed filter

  Task(const Call& call_, const Scratch<A>& scratch_, int64_t index)
      : call(call_),
        scratch(scratch_),
        block(call.blocks.data()[index % call.block_count()]),
        image(index / call.block_count() / call.bands),
        band(index / call.block_count() % call.bands),
        begin(call.walk.rows * band / call.bands),
        end(call.walk.rows * (band + 1) / call.bands),
        lanes((block.channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>),
        taps(call.R * call.S * lanes) {
    for (int64_t i = 0; i < call.multiplier * call.R; ++i) scratch.held[i] = -1;
  }

  template <class T>
  T* plane(const Image& tensor, int64_t channel) const {
    return static_cast<T*>(tensor.data) + image * tensor.stride_n + channel * tensor.stride_c;
  }

  void pack_weights() const {
    for (int64_t u = 0; u < call.multiplier; ++u) {
      pack_filter<S>(call.weight, block.begin, block.channels, call.multiplier, u, call.R, call.S,
                     scratch.weight + u * taps, lanes);
      pack_filter<S>(call.bias, block.begin, block.channels, call.multiplier, u, 1, 1,
                     scratch.init + u * lanes, lanes);
    }
  }

  // Sources of output channels begin * step + u, begin * step + u + step, ...
  SourceRows<S, A> sources(int64_t u, int64_t step) const {
    SourceRows<S, A> rows;
    rows.image = plane<const S>(call.source, block.begin * step + u);
    rows.stride_c = call.source.stride_c * step;
    rows.stride_h = call.source.stride_h;
    rows.stride_w = call.source.stride_w;
    rows.channels = block.channels;
    rows.lanes = lanes;
    rows.pixels = call.columns.sources;
    rows.direct = block.direct_source;
    rows.held = scratch.held + u * call.R;
    rows.slot_count = call.R;
    rows.row_stride = call.source_row_stride;
    rows.slots = scratch.sources + u * call.R * rows.pixels * lanes;
    return rows;
  }

  // Appends the live filter rows of target row `at`.
  void add_row_taps(int64_t at, SourceRows<S, A> rows, int64_t u, RowJob<A>* row) const {
    row->taps = scratch.row_taps;
    const AxisClass& cls = call.rows.classes.data()[at % call.rows.period];
    const int64_t position = at / call.rows.period;
    for (const Tap& tap : cls.taps) {
      const int64_t source = position * call.rows.step + tap.source;
      if (source < 0 || source >= call.rows.sources) continue;
      const int64_t offset = u * taps + tap.weight * call.S * lanes;
      scratch.row_taps[row->tap_count++] = {rows.row(source), scratch.weight + offset, scratch.totals + offset};
    }
  }

  template <bool kInput, bool kWeight>
  void compute(RowJob<A> row, S* tensor_row, int64_t stride_c, int64_t stride_w) const {
    row.lanes = lanes;
    if constexpr (std::is_same_v<S, A>) {
      if (block.direct_target || !kInput) {
        row.target = tensor_row;
        row.target_stride = stride_w;
        return compute_row<A, kInput, kWeight>(call.columns, row, scratch.columns);
      }
    }
    row.target = scratch.target;
    row.target_stride = lanes;
    compute_row<A, kInput, kWeight>(call.columns, row, scratch.columns);
    if constexpr (kInput) {
      unpack_row(scratch.target, lanes, block.channels, call.columns.targets, call.activation,
                 tensor_row, stride_c, stride_w);
    }
  }

  void forward() const {
    pack_weights();
    const int64_t m = call.multiplier;
    const SourceRows<S, A> rows = sources(0, 1);
    int64_t at = call.walk.row_at(begin);
    for (int64_t i = begin; i < end; ++i, at = call.walk.next(at)) {
      for (int64_t u = 0; u < m; ++u) {
        RowJob<A> row{};
        row.source_stride = rows.pixel_stride();
        row.init = scratch.init + u * lanes;
        add_row_taps(at, rows, u, &row);
        compute<true, false>(row, plane<S>(call.target, block.begin * m + u) + at * call.target.stride_h,
                call.target.stride_c * m, call.target.stride_w);
      }
    }
  }

  bool set_direct(const S* x, RowJob<A>* row) const {
    if constexpr (std::is_same_v<S, A>) {
      if (block.direct_x) {
        row->x = x;
        row->x_stride = call.x.stride_w;
        return true;
      }
    }
    return false;
  }

  template <bool kInput, bool kWeight>
  void backward() const {
    pack_weights();
    const int64_t m = call.multiplier;
    A* partial = static_cast<A*>(call.partial) + ((image * call.bands + band) * call.block_count() + (&block - call.blocks.data())) * call.partial_size();
    if constexpr (kWeight) {
      for (int64_t i = 0; i < m * taps; ++i) partial[i] = scratch.totals[i] = 0;
    }
    int64_t at = call.walk.row_at(begin);
    for (int64_t i = begin; i < end; ++i, at = call.walk.next(at)) {
      RowJob<A> row{};
      row.init = scratch.init;
      for (int64_t u = 0; u < m; ++u) {
        const SourceRows<S, A> rows = sources(u, m);
        row.source_stride = rows.pixel_stride();
        add_row_taps(at, rows, u, &row);
      }
      if constexpr (kWeight) {
        const S* x = plane<const S>(call.x, block.begin) + at * call.x.stride_h;
        if (!set_direct(x, &row)) {
          pack_row(x, call.x.stride_c, call.x.stride_w, block.channels, call.columns.targets, scratch.x, lanes);
          row.x = scratch.x;
          row.x_stride = lanes;
        }
      }
      S* grad_x = kInput ? plane<S>(call.target, block.begin) + at * call.target.stride_h : nullptr;
      compute<kInput, kWeight>(row, grad_x, call.target.stride_c, call.target.stride_w);
      if (kWeight && ((i - begin) % 8 == 7 || i + 1 == end)) {
        // Short chains of additions: a few rows in `totals`, then all of them in `partial`.
        for (int64_t j = 0; j < m * taps; j += kLanes<A>) {
          store(partial + j, load(partial + j) + load(scratch.totals + j));
          store(scratch.totals + j, Vector<A>{});
        }
      }
    }
  }

  void bias() const {
    // grad_bias: this band's share of grad_y.
    const int64_t m = call.multiplier;
    A* partial = static_cast<A*>(call.partial) + ((image * call.bands + band) * call.block_count() + (&block - call.blocks.data())) * call.partial_size() + m * taps;
    for (int64_t u = 0; u < m; ++u) {
      SourceRows<S, A> rows = sources(u, m);
      for (int64_t c = 0; c < lanes; c += kLanes<A>) store(partial + u * lanes + c, Vector<A>{});
      for (int64_t p = call.rows.sources * band / call.bands; p < call.rows.sources * (band + 1) / call.bands; ++p) {
        const A* row = rows.row(p);
        const int64_t stride = rows.pixel_stride();
        for (int64_t c = 0; c < lanes; c += kLanes<A>) {
          Vector<A> sum{};
          for (int64_t w = 0; w < rows.pixels; ++w) sum += load(row + w * stride + c);
          store(partial + u * lanes + c, load(partial + u * lanes + c) + sum);
        }
      }
    }
  }
};

template <class S>
inline int64_t scratch_bytes(const Call& call) {
  return Scratch<typename Accumulator<S>::type>(call, nullptr).bytes;
}

template <class S>
inline void forward(const Call& call, int64_t first, int64_t last, char* buffer) {
  using A = typename Accumulator<S>::type;
  const Scratch<A> scratch(call, buffer);
  for (int64_t index = first; index < last; ++index) {
    Task<S>(call, scratch, index).forward();
  }
}

template <class Task>
inline void backward_task(const Task& task) {
  const Call& call = task.call;
  if (call.needs_grad_x && call.needs_grad_weight) {
    task.template backward<true, true>();
  } else if (call.needs_grad_x) {
    task.template backward<true, false>();
  } else if (call.needs_grad_weight) {
    task.template backward<false, true>();
  }
  if (call.needs_grad_bias) task.bias();
}

template <class S>
inline void backward(const Call& call, int64_t first, int64_t last, char* buffer) {
  using A = typename Accumulator<S>::type;
  const Scratch<A> scratch(call, buffer);
  for (int64_t index = first; index < last; ++index) {
    backward_task(Task<S>(call, scratch, index));
  }
}

// The second stage of grad_weight and grad_bias for blocks [first, last): the tasks' sums in their
// fixed order, with the rounding error of every addition carried along (Kahan).
template <class S>
inline void reduce(const Call& call, int64_t first, int64_t last, char* buffer) {
  using A = typename Accumulator<S>::type;
  A* total = reinterpret_cast<A*>(buffer);
  const int64_t stride = call.block_count() * call.partial_size(), m = call.multiplier;
  for (int64_t index = first; index < last; ++index) {
    const Block& block = call.blocks.data()[index];
    const int64_t lanes = (block.channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    const int64_t taps = call.R * call.S * lanes;
    const int64_t begin = call.needs_grad_weight ? 0 : m * taps;
    const int64_t end = m * taps + (call.needs_grad_bias ? m * lanes : 0);
    const A* partial = static_cast<const A*>(call.partial) + index * call.partial_size();
    for (int64_t i = begin; i < end; i += kLanes<A>) {
      Vector<A> sum{}, error{};
      for (int64_t part = 0; part < call.N * call.bands; ++part) {
        const Vector<A> term = load(partial + part * stride + i) - error;
        const Vector<A> next = sum + term;
        error = (next - sum) - term;
        error = error - error == A(0) ? error : Vector<A>{};  // infinity and NaN stay what they are
        sum = next;
      }
      store(total + i, sum);
    }
    for (int64_t u = 0; u < m; ++u) {
      if (call.needs_grad_weight) unpack_filter<S>(total + u * taps, lanes, block.begin, block.channels, m, u, call.R, call.S, call.grad_weight);
      if (call.needs_grad_bias) unpack_filter<S>(total + m * taps + u * lanes, lanes, block.begin, block.channels, m, u, 1, 1, call.grad_bias);
    }
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
