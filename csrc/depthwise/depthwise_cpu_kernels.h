// Depthwise convolution on the CPU. Compiled once per instruction set, see csrc/common/simd.h; free
// of torch headers and of standard library calls for the reason given there.
//
//   y[n, k, p, q]        = act(bias[k] + sum over r, s of weight[k, r, s] * x[n, k / m, h, w])
//   grad_x[n, c, h, w]   = sum over k of c, r, s of weight[k, r, s] * grad_y[n, k, p, q]
//   grad_weight[k, r, s] = sum over n, p, q of x[n, k / m, h, w] * grad_y[n, k, p, q]
//
// with h = p * stride_h - pad_top + r * dilation_h, w likewise, taps outside the image left out.
//
// The first two are one computation, target = sum of weight * source, under two index maps
// (depthwise_cpu_plan.h); the third rides on the second: while grad_y is in a register for grad_x
// it is multiplied by x as well.
//
// A task is an image, a block of channels and a band of rows. It visits the rows of its band in the
// order h, h + d, h + 2d, ..., so that the few source rows in use stay in the L1 or L2 cache for
// any dilation d. The unit of work is one target row (RowJob) from at most R source rows:
//
//   [W][lanes] source rows  --->  depthwise_cpu_runs.h   three filter columns, stride 1, long rows
//    in place or packed     --->  depthwise_cpu_tiles.h  everything else
//
// but where there are 32 registers, forward takes 3x3 filters on tensors in place by two target
// rows at once: depthwise_cpu_pairs.h. Forward by runs is for vectors of whole cache lines.
//
// Channels are the vector axis. Channels-last tensors are read and written in place where that is
// the faster way, all other layouts pass through packed rows (depthwise_cpu_rows.h). A channel
// multiplier m is m filters over one x: in forward one after the other, in backward summed as if
// they were m * R filter rows.
//
// Traffic: each tensor once per call, apart from R - 1 rows where two bands meet. The limit is
// memory for large tensors, and the two multiply-adds a cycle for those in cache.

#include "csrc/depthwise/depthwise_cpu_pairs.h"

namespace fastseg {
namespace FASTSEG_SIMD {

using depthwise_cpu::Block;
using depthwise_cpu::Image;

template <class A, class Source, class Target, bool kInput, bool kWeight>
inline void compute_row(const Call& call, const RowJob<Source, Target, A>& row, void* flat) {
  // The plan never asks for the sums of 16-bit tensors in tiles: those pass through scratch memory.
  if constexpr (sizeof(Source) == sizeof(A) || !kWeight) {
    if (call.runs.empty()) {
      return tile_row<Source, Target, A, kInput, kWeight>(call.columns, row,
                                                          static_cast<FlatTap<Source, A>*>(flat));
    }
  }
  roll_row<A, Source, Target, kInput, kWeight>(call, row);
}

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
  void* row_taps;
  void* flat;
  int64_t bytes;

  Scratch(const Call& call, char* base) {
    Arena arena{base};
    const int64_t m = call.multiplier, taps = m * call.R * call.S, lanes = call.block_lanes;
    sources = arena.take<A>(m * call.slots * call.columns.sources * lanes);
    x = arena.take<A>(call.columns.targets * lanes);
    target = arena.take<A>(call.columns.targets * lanes);
    weight = arena.take<A>(taps * lanes);
    init = arena.take<A>(m * lanes);
    totals = arena.take<A>(taps * lanes);
    held = arena.take<int64_t>(m * call.slots);
    row_taps = arena.take<RowTap<A, A>>(m * call.R);
    flat = arena.take<FlatTap<A, A>>(taps);
    bytes = arena.used;
  }
};

// Source and Target are the storage type S where the kernels work on the tensors in place, the
// accumulation type A where rows pass through scratch memory. (For float and double they are one.)
template <class S, class Source, class Target>
struct Task {
  using A = typename Accumulator<S>::type;

  const Call& call;
  const Scratch<A>& scratch;
  const Block& block;
  int64_t image, band;
  depthwise_cpu::Walk walk;
  int64_t begin, end;  // positions of the walk
  int64_t first_row;   // target row at which the walk begins
  Image target;
  int64_t target_row, target_channel;  // those that `target` begins with
  int64_t lanes, taps;                 // of the block; of one packed filter, in elements
  A* partial;

  Task(const Call& call_, const Scratch<A>& scratch_, int64_t index)
      : call(call_),
        scratch(scratch_),
        block(call.blocks.data()[index % call.block_count()]),
        image(index / call.block_count() / call.bands),
        band(index / call.block_count() % call.bands),
        walk(call.walk),
        begin(walk.rows * band / call.bands),
        end(walk.rows * (band + 1) / call.bands),
        first_row(0),
        target(call.target),
        target_row(0),
        target_channel(0),
        lanes((block.channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>),
        taps(call.R * call.S * lanes),
        partial(call.partial == nullptr
                    ? nullptr
                    : static_cast<A*>(call.partial) + index * call.partial_size()) {
    forget_rows();
  }

  // Rows [begin, end) of one image and block, into a tensor that begins with one of them.
  Task(const Call& call_, const Scratch<A>& scratch_, const Block& block_, int64_t image_,
       int64_t begin_, int64_t end_, const Image& target_, int64_t target_channel_)
      : call(call_),
        scratch(scratch_),
        block(block_),
        image(image_),
        band(0),
        walk{end_ - begin_, min_of(end_ - begin_, call_.walk.stride)},
        begin(0),
        end(end_ - begin_),
        first_row(begin_),
        target(target_),
        target_row(begin_),
        target_channel(target_channel_),
        lanes((block.channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>),
        taps(call.R * call.S * lanes),
        partial(nullptr) {
    forget_rows();
  }

  void forget_rows() const {
    for (int64_t i = 0; i < call.multiplier * call.slots; ++i) scratch.held[i] = -1;
  }

  template <class T>
  T* plane(const Image& tensor, int64_t channel) const {
    return static_cast<T*>(tensor.data) + image * tensor.stride_n + channel * tensor.stride_c;
  }

  // Elements to the row `rows` on, if it is worth fetching into the L1 cache: pixels are further
  // apart than the hardware looks ahead, and planes are too many streams for it.
  int64_t ahead(const Image& tensor, int64_t rows, bool in_place) const {
    // Pixels whole pages apart all fall into one set of the L1 cache, which has no room to look
    // ahead. Copied ones are not needed there for long.
    const bool one_set = in_place && tensor.stride_w * static_cast<int64_t>(sizeof(S)) % 4096 == 0;
    const bool far = one_set ? call.exceeds_l3() : call.exceeds_l2();
    return far || tensor.stride_w == 1 ? rows * tensor.stride_h : 0;
  }

  void pack_weights() const {
    const int64_t m = call.multiplier;
    for (int64_t u = 0; u < m; ++u) {
      pack_filter<S>(call.weight, block.begin, block.channels, m, u, call.R, call.S,
                     scratch.weight + u * taps, lanes);
      pack_filter<S>(call.bias, block.begin, block.channels, m, u, 1, 1, scratch.init + u * lanes,
                     lanes);
    }
  }

  // The sources of channels first, first + step, ...; `slot_set` of the multiplier's sets of slots.
  SourceRows<S, Source> sources(int64_t first, int64_t step, int64_t slot_set) const {
    SourceRows<S, Source> rows;
    rows.image = plane<const S>(call.source, first);
    rows.stride_c = call.source.stride_c * step;
    rows.stride_h = call.source.stride_h;
    rows.stride_w = call.source.stride_w;
    rows.channels = block.channels;
    rows.lanes = lanes;
    rows.pixels = call.columns.sources;
    rows.direct = block.direct_source;
    rows.slots = scratch.sources + slot_set * call.slots * rows.pixels * lanes;
    rows.held = scratch.held + slot_set * call.slots;
    rows.slot_count = call.slots;
    rows.row_stride = call.source_row_stride;
    rows.ahead = ahead(call.source, call.source_row_stride, block.direct_source);
    return rows;
  }

  // Appends the filter rows that target row `at` sees, with the u-th filter of every channel.
  void add_row_taps(int64_t at, const SourceRows<S, Source>& rows, int64_t u,
                    RowJob<Source, Target, A>* row) const {
    auto* live = static_cast<RowTap<Source, A>*>(scratch.row_taps);
    row->taps = live;
    row->source_stride = rows.pixel_stride();
    const AxisClass& cls = call.rows.classes.data()[at % call.rows.period];
    const int64_t position = at / call.rows.period;
    // Sources from here to there are new to the next target row, if that has the same taps.
    const int64_t positions = walk.stride / call.rows.period;
    const int64_t moved =
        positions * call.rows.period == walk.stride ? positions * call.rows.step : 0;
    for (const Tap& tap : cls.taps) {
      const int64_t source = position * call.rows.step + tap.source;
      if (source < 0 || source >= call.rows.sources) continue;
      const int64_t offset = u * taps + tap.weight * call.S * lanes;
      const bool next_is_new = rows.direct && tap.source + moved > cls.taps.end()[-1].source;
      live[row->tap_count++] = {rows.row(source), next_is_new ? ahead(call.source, moved, true) : 0,
                                scratch.weight + offset, scratch.totals + offset};
    }
  }

  // Computes one target row and leaves it in the tensor.
  template <bool kInput, bool kWeight>
  void compute(RowJob<Source, Target, A> row, S* tensor_row, int64_t stride_c,
               int64_t stride_w) const {
    row.lanes = lanes;
    row.channels = block.direct() ? block.channels : lanes;
    if constexpr (std::is_same_v<S, Target>) {
      if (block.direct_target || !kInput) {
        row.target = tensor_row;
        row.target_stride = stride_w;
        row.activation = call.activation;
        row.streams = kInput && call.streams;
        row.target_ahead = row.streams ? 0 : ahead(target, walk.stride, true);
        return compute_row<A, Source, Target, kInput, kWeight>(call, row, scratch.flat);
      }
    }
    if constexpr (std::is_same_v<A, Target>) {
      row.target = scratch.target;
      row.target_stride = lanes;
      row.activation = Activation::kNone;  // unpack_row's
      compute_row<A, Source, Target, kInput, kWeight>(call, row, scratch.flat);
      if constexpr (kInput) {
        unpack_row(scratch.target, lanes, block.channels, call.columns.targets, call.activation,
                   tensor_row, stride_c, stride_w, ahead(target, walk.stride, false));
      }
    }
  }

  // Two target rows at a time where the walk has two of one phase left.
  template <int kStep>
  void forward_pairs() const {
    pack_weights();
    PairJob<S, A> job;
    job.source_stride = call.source.stride_w;
    const bool few_sets = depthwise_cpu::aliased(call.source.stride_w * sizeof(S));
    job.fetches = few_sets ? call.exceeds_l3() : call.exceeds_l2();
    job.target_row = walk.stride * target.stride_h;
    job.target_stride = target.stride_w;
    job.streams = call.streams;
    job.weight = scratch.weight;
    job.init = scratch.init;
    job.lanes = lanes;
    job.channels = block.channels;
    job.dilation = call.dilation_w;
    job.activation = call.activation;
    const S* source = plane<const S>(call.source, block.begin);
    S* channels = plane<S>(target, block.begin - target_channel);
    const int64_t first = call.rows.classes.data()[0].taps.data()[0].source;
    int64_t step = walk.row_at(begin);
    for (int64_t i = begin; i < end; ++i, step = walk.next(step)) {
      const int64_t at = first_row + step;
      for (int64_t r = 0; r < kStep + 3; ++r) {
        const int64_t row = at * kStep + first + r * call.source_row_stride;
        const bool exists = row >= 0 && row < call.rows.sources;
        job.sources[r] = exists ? source + row * call.source.stride_h : nullptr;
      }
      job.target = channels + (at - target_row) * target.stride_h;
      if (i + 1 < end && step + walk.stride < walk.rows) {
        pair_rows<kStep, 2>(call, job);
        step += walk.stride;
        ++i;
      } else {
        pair_rows<kStep, 1>(call, job);
      }
    }
  }

  void forward() const {
    if constexpr (kManyRegisters && std::is_same_v<S, Source> && std::is_same_v<S, Target>) {
      if (call.pairs) return call.rows.step == 1 ? forward_pairs<1>() : forward_pairs<2>();
    }
    pack_weights();
    const int64_t m = call.multiplier;
    const SourceRows<S, Source> rows = sources(block.begin, 1, 0);
    int64_t step = walk.row_at(begin);
    for (int64_t i = begin; i < end; ++i, step = walk.next(step)) {
      const int64_t at = first_row + step;
      for (int64_t u = 0; u < m; ++u) {
        RowJob<Source, Target, A> row{};
        row.init = scratch.init + u * lanes;
        add_row_taps(at, rows, u, &row);
        S* y = plane<S>(target, block.begin * m + u - target_channel) +
               (at - target_row) * target.stride_h;
        compute<true, false>(row, y, target.stride_c * m, target.stride_w);
      }
    }
  }

  // The row of x at target row `at`.
  void set_x(int64_t at, RowJob<Source, Target, A>* row) const {
    const S* x = plane<const S>(call.x, block.begin) + at * call.x.stride_h;
    const int64_t next = ahead(call.x, walk.stride, block.direct_x);
    if constexpr (std::is_same_v<S, Source>) {
      if (block.direct_x) {
        row->x = x;
        row->x_stride = call.x.stride_w;
        row->x_ahead = next;
        return;
      }
    }
    if constexpr (std::is_same_v<A, Source>) {
      pack_row(x, call.x.stride_c, call.x.stride_w, block.channels, call.columns.targets, scratch.x,
               lanes, next);
      row->x = scratch.x;
      row->x_stride = lanes;
    }
  }

  template <bool kInput, bool kWeight>
  void backward() const {
    pack_weights();
    const int64_t m = call.multiplier;
    if constexpr (kWeight) {
      for (int64_t i = 0; i < m * taps; ++i) partial[i] = scratch.totals[i] = 0;
    }
    int64_t at = walk.row_at(begin);
    for (int64_t i = begin; i < end; ++i, at = walk.next(at)) {
      RowJob<Source, Target, A> row{};
      row.init = scratch.init;
      for (int64_t u = 0; u < m; ++u) {
        const SourceRows<S, Source> rows = sources(block.begin * m + u, m, u);
        add_row_taps(at, rows, u, &row);
      }
      if constexpr (kWeight) set_x(at, &row);
      S* grad_x = nullptr;
      if constexpr (kInput) grad_x = plane<S>(call.target, block.begin) + at * call.target.stride_h;
      compute<kInput, kWeight>(row, grad_x, call.target.stride_c, call.target.stride_w);
      if (kWeight && ((i - begin) % 4 == 3 || i + 1 == end)) {
        // Short chains of additions: a few rows in `totals`, then all of them in `partial`.
        for (int64_t j = 0; j < m * taps; j += kLanes<A>) {
          store(partial + j, load(partial + j) + load(scratch.totals + j));
          store(scratch.totals + j, Vector<A>{});
        }
      }
    }
  }

  // This band's share of the rows of grad_y, summed for grad_bias.
  void backward_bias() const {
    const int64_t m = call.multiplier;
    const int64_t last = call.rows.sources * (band + 1) / call.bands;
    const int64_t channels = block.direct() ? block.channels : lanes;
    for (int64_t u = 0; u < m; ++u) {
      A* total = partial + m * taps + u * lanes;
      for (int64_t c = 0; c < lanes; ++c) total[c] = 0;
      const SourceRows<S, Source> rows = sources(block.begin * m + u, m, u);
      const int64_t stride = rows.pixel_stride();
      for (int64_t p = call.rows.sources * band / call.bands; p < last; ++p) {
        const Source* row = rows.row(p);
        for (int64_t c = 0; c < channels; c += kLanes<A>) {
          const VectorAt<A> at(c, channels);
          Vector<A> sum{};
          for (int64_t q = 0; q < rows.pixels; ++q) sum += load(row + q * stride + at.channel);
          A* sums = total + at.channel;
          store(sums, load(sums) + zero_first<A>(sum, at.overlap));
        }
      }
    }
  }

  void backward_needed() const {
    if (call.needs_grad_x && call.needs_grad_weight) {
      backward<true, true>();
    } else if (call.needs_grad_x) {
      backward<true, false>();
    } else if (call.needs_grad_weight) {
      backward<false, true>();
    }
    if (call.needs_grad_bias) backward_bias();
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
    const Block& block = call.blocks.data()[index % call.block_count()];
    if (block.direct_source) {
      Task<S, S, S>(call, scratch, index).forward();
    } else {
      Task<S, A, A>(call, scratch, index).forward();
    }
  }
  if (call.streams) end_streams();
}

template <class S>
inline void backward(const Call& call, int64_t first, int64_t last, char* buffer) {
  using A = typename Accumulator<S>::type;
  const Scratch<A> scratch(call, buffer);
  for (int64_t index = first; index < last; ++index) {
    const Block& block = call.blocks.data()[index % call.block_count()];
    if (block.direct_source) {
      Task<S, S, S>(call, scratch, index).backward_needed();
    } else {
      Task<S, A, A>(call, scratch, index).backward_needed();
    }
  }
  if (call.streams) end_streams();
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
      if (call.needs_grad_weight) {
        unpack_filter<S>(total + u * taps, lanes, block.begin, block.channels, m, u, call.R, call.S,
                         call.grad_weight);
      }
      if (call.needs_grad_bias) {
        unpack_filter<S>(total + m * taps + u * lanes, lanes, block.begin, block.channels, m, u, 1,
                         1, call.grad_bias);
      }
    }
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
