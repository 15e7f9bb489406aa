// The loss of upsampled logits and its gradient, without upsampled logits. Compiled once per
// instruction set, see csrc/common/simd.h; free of torch headers and of standard library calls for
// the reason given there.
//
//   loss   = sum over c of wanted[c] * (log sum exp(s - max s) - (s[c] - max s))
//   grad_s = softmax(s) * (sum of wanted) - wanted,    wanted: weights, smoothing, ignored pixels
//
// for each pixel of the output with its scores s[c]. Tiles are those of head_cpu_argmax.h, with
// pixels as the vector axis:
//
//      kRows at once, three passes over C:  largest;  e = exp(s - largest), sum;  gradient
//
//      sums of row h    [columns / lanes][C][lanes]  +=  sum over rows of (1 - t) * grad_s
//      sums of row h+1  [columns / lanes][C][lanes]  +=  sum over rows of t * grad_s
//
// When both strips that touch an input row are done, its sums [C][columns] are added up along the
// row by the column weights and stored as its gradient. A task is a run of gradient rows. It
// computes the strip above its first row as its neighbour does, and throws the upper half away: so
// rows have one owner, sums one order, and threads nothing to share. Scratch memory of a thread:
// two packed rows, two rows of sums, and tiles; it stays in the second-level cache for 150 classes.
// Traffic is logits, targets and gradient once; the time goes into exp and multiply-adds.

#include "csrc/head/head_cpu_argmax.h"

namespace fastseg {
namespace FASTSEG_SIMD {

using head_cpu::Loss;

// exp of what is not positive, or NaN.
template <class T>
FASTSEG_INLINE Vector<T> exp_below_zero(Vector<T> x) {
#if FASTSEG_SIMD_BYTES == 64
  if constexpr (sizeof(T) == 4) {  // as exp of csrc/common/simd.h
    const Vector<T> clamped = larger<T>(broadcast(-104.0f), x);
    const Vector<T> n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
    const Vector<T> r = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
    Vector<T> p = broadcast(1.0f / 720.0f);
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return bit_cast<Vector<T>>(
        _mm512_maskz_scalef_ps(0xffff, bit_cast<__m512>(p), bit_cast<__m512>(n)));
  }
#endif
  return exp(x);
}

// log of what is at least 1, or NaN, to about one unit in the last place: x = 2^n * (1 + f) with
// 1 + f between the square roots of 1/2 and 2. (The polynomial of Cephes' logf.)
FASTSEG_INLINE Vector<float> log_above_one(Vector<float> x) {
  const Vector<int32_t> bits = bit_cast<Vector<int32_t>>(x);
  const Vector<int32_t> exponent = (bits - 0x3f3504f3) >> 23;
  const Vector<float> f = bit_cast<Vector<float>>(bits - (exponent << 23)) - 1.0f;
  const Vector<float> n = __builtin_convertvector(exponent, Vector<float>), square = f * f;
  Vector<float> p = broadcast(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vector<float> tail = (p * f * square - n * 2.12194440e-4f) - 0.5f * square;
  const Vector<float> result = (f + tail) + n * 0.693359375f;
  return x != x ? x : result;
}

FASTSEG_INLINE Vector<double> log_above_one(Vector<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

// What a task of the loss keeps; rows of pixels have room for whole vectors.
template <class A>
struct LossScratch {
  Window<A> window;
  Index<A>* own;   // [kRows][columns] the target, or -1: ignored
  A* chosen;       // [kRows][columns] the weight of the own class
  A* raised;       // [kRows][C][lanes] exp(s - largest)
  double* totals;  // [kRows][lanes] losses
  A* sums[2];      // [columns / lanes][C][lanes] the gradient of input rows, before it is added up
  A* columns;      // [columns][lanes]
  int64_t bytes;

  LossScratch(const Loss<A>& call, char* base) {
    const Logits<A>& logits = call.logits;
    const int64_t padded = logits.spread.vectors * kLanes<A>;
    const int64_t full = call.gradient == nullptr ? 0 : padded;
    Shelf<A> shelf{base};
    window = shelf.window(logits);
    own = reinterpret_cast<Index<A>*>(shelf.take(kTileRowsOfHead * padded));
    chosen = shelf.take(kTileRowsOfHead * padded);
    totals = reinterpret_cast<double*>(shelf.take(kTileRowsOfHead * kLanes<A> * 8 / sizeof(A)));
    raised = shelf.take(full == 0 ? 0 : kTileRowsOfHead * logits.C * kLanes<A>);
    for (A*& row : sums) row = shelf.take(full * logits.C);
    columns = shelf.take(full * kLanes<A>);
    bytes = shelf.used;
  }
};

template <class A>
int64_t loss_scratch_bytes(const Loss<A>& call) {
  return LossScratch<A>(call, nullptr).bytes;
}

// Targets and weights of output row p as scratch row r. `records`: what they add up to is wanted.
template <class A>
FASTSEG_NOINLINE void read_targets(const Loss<A>& call, int64_t image, int64_t p, int64_t r,
                                   bool records, const LossScratch<A>& scratch) {
  const Logits<A>& logits = call.logits;
  const int64_t Q = logits.Q, C = logits.C, padded = logits.spread.vectors * kLanes<A>;
  const int64_t row = image * logits.P + p;
  const int64_t* target = call.target + row * Q;
  Index<A>* own = scratch.own + r * padded;
  A* chosen = scratch.chosen + r * padded;
  int64_t offender = -1;
  double weights = 0;
  for (int64_t q = 0; q < Q; ++q) {
    const int64_t y = target[q];
    const bool kept = y != call.ignore_index, exists = y >= 0 && y < C;
    if (kept && !exists && offender < 0) offender = q;
    const A weight = kept && exists ? call.weight[y] : A(0);
    own[q] = static_cast<Index<A>>(kept && exists ? y : -1);
    chosen[q] = call.certain * weight;
    weights += weight;
  }
  for (int64_t q = Q; q < padded; ++q) own[q] = -1, chosen[q] = 0;
  if (records) {
    call.row_weights[row] = weights;
    call.row_offenders[row] = offender;
  }
}

template <class A>
struct LossTile {
  int64_t row, v;  // of the first output row, counted through all images; the vector of columns
  bool records;    // the loss is wanted, not only the gradient
  const Sample<A>* rows;
  A *above, *below;  // [C][lanes] sums of the gradients of the input rows
};

// kSmooths: each class has its share of the target.
template <class A, int kRows, bool kGradient, bool kSmooths>
FASTSEG_NOINLINE void loss_tile(const Loss<A>& call, const LossScratch<A>& scratch,
                                const LossTile<A>& tile) {
  constexpr int64_t n = kLanes<A>;
  const Logits<A>& logits = call.logits;
  const int64_t C = logits.C, Q = logits.Q, padded = logits.spread.vectors * n;
  const A *above = scratch.window.above, *below = scratch.window.below;
  Vector<A> share[kRows], largest[kRows], sum[kRows], spread[kRows];
  FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
    share[r] = broadcast(tile.rows[r].share);
    largest[r] = mix<Vector<A>>(load(above), load(below), A(1) - share[r], share[r]);
    sum[r] = spread[r] = Vector<A>{};
  }
  for (int64_t c = 1; c < C; ++c) {
    const Vector<A> a = load(above + c * n), b = load(below + c * n);
    FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
      largest[r] = larger<A>(mix(a, b, A(1) - share[r], share[r]), largest[r]);
    }
  }
  A* raised = scratch.raised;
  for (int64_t c = 0; c < C; ++c) {
    const Vector<A> a = load(above + c * n), b = load(below + c * n);
    FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vector<A> d = mix(a, b, A(1) - share[r], share[r]) - largest[r];
      const Vector<A> e = exp_below_zero<A>(d);
      sum[r] += e;
      if (kSmooths && call.weight[c] != 0) spread[r] += d * call.weight[c];
      if (kGradient) store(raised + (r * C + c) * n, e);
    }
  }

  const int64_t live = Q - tile.v * n < n ? Q - tile.v * n : n;
  Vector<A> to_above[kRows], to_below[kRows], spread_above{}, spread_below{};
  FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
    const Index<A>* own = scratch.own + r * padded + tile.v * n;
    const Vector<A> chosen = load(scratch.chosen + r * padded + tile.v * n);
    const Vector<A> kept = load_index<A>(own) < 0 ? Vector<A>{} : broadcast(A(1));
    const Vector<A> total = kSmooths ? chosen + kept * call.spread_total : chosen;
    const int64_t pixel = (tile.row + r) * Q + tile.v * n;
    if (tile.records) {
      A a[n], b[n];
      for (int64_t i = 0; i < n; ++i) {
        const int64_t y = own[i] < 0 ? 0 : own[i];
        a[i] = above[y * n + i], b[i] = below[y * n + i];
      }
      Vector<A> d = mix<Vector<A>>(load(a), load(b), A(1) - share[r], share[r]) - largest[r];
      d = d > A(0) ? Vector<A>{} : d;
      const Vector<A> log_sum = log_above_one(sum[r]);
      Vector<A> loss = chosen == A(0) ? Vector<A>{} : chosen * (log_sum - d);
      if (kSmooths && call.spread_total != 0) {
        loss += kept == A(0) ? Vector<A>{} : log_sum * call.spread_total - spread[r] * call.spread;
      }
      for (int64_t i = 0; i < n; ++i) scratch.totals[r * n + i] += loss[i];
      if (call.losses != nullptr) {
        live == n ? store(call.losses + pixel, loss) : store_first(call.losses + pixel, loss, live);
      }
    }
    if constexpr (kGradient) {
      Vector<A> scale = broadcast(A(1));
      if (call.grad_losses != nullptr) {
        scale =
            live == n ? load(call.grad_losses + pixel) : load_first(call.grad_losses + pixel, live);
      }
      // total * softmax - chosen at the own class is (e - sum * chosen / total) * total / sum.
      A less[n];
      store(less, total == A(0) ? Vector<A>{} : sum[r] * (chosen / total));
      for (int64_t i = 0; i < live; ++i) {
        if (own[i] >= 0) raised[(r * C + own[i]) * n + i] -= less[i];
      }
      const Vector<A> factor = scale * total / sum[r];
      to_above[r] = factor * (A(1) - share[r]);
      to_below[r] = factor * share[r];
      if (kSmooths) {
        spread_above += kept * scale * call.spread * (A(1) - share[r]);
        spread_below += kept * scale * call.spread * share[r];
      }
    }
  }
  if constexpr (kGradient) {
    for (int64_t c = 0; c < C; ++c) {
      Vector<A> up{}, down{};
      FASTSEG_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vector<A> e = load(raised + (r * C + c) * n);
        up += e * to_above[r];
        down += e * to_below[r];
      }
      if (kSmooths) {
        up -= spread_above * call.weight[c];
        down -= spread_below * call.weight[c];
      }
      store(tile.above + c * n, load(tile.above + c * n) + up);  // may be the same place as below
      store(tile.below + c * n, load(tile.below + c * n) + down);
    }
  }
}

template <class A, int kRows = kTileRowsOfHead>
FASTSEG_INLINE void loss_tile_of(int64_t count, const Loss<A>& call, const LossScratch<A>& scratch,
                                 const LossTile<A>& tile) {
  if (count != kRows) {
    if constexpr (kRows > 1) loss_tile_of<A, kRows - 1>(count, call, scratch, tile);
    return;
  }
  const bool smooths = call.spread != 0;
  if (call.gradient != nullptr) {
    smooths ? loss_tile<A, kRows, true, true>(call, scratch, tile)
            : loss_tile<A, kRows, true, false>(call, scratch, tile);
  } else {
    smooths ? loss_tile<A, kRows, false, true>(call, scratch, tile)
            : loss_tile<A, kRows, false, false>(call, scratch, tile);
  }
}

// `above` and `below`: sums of the strip's input rows, for the gradient.
template <class S, class A>
FASTSEG_NOINLINE void loss_strip(const Loss<A>& call, LossScratch<A>& scratch, int64_t image,
                                 const Strip& strip, bool records, A* above, A* below) {
  constexpr int64_t n = kLanes<A>;
  const Logits<A>& logits = call.logits;
  const int64_t row = image * logits.P + strip.begin, tile_size = logits.C * n;
  scratch.window.template pack<S>(logits, image, strip);
  for (int64_t r = 0; r < strip.rows; ++r) {
    read_targets(call, image, strip.begin + r, r, records, scratch);
  }
  for (int64_t i = 0; i < kTileRowsOfHead * n; ++i) scratch.totals[i] = 0;
  for (int64_t v = 0; v < logits.spread.vectors; ++v) {
    scratch.window.spread(logits, strip, v);
    const LossTile<A> tile{row,
                           v,
                           records,
                           logits.rows + strip.begin,
                           above == nullptr ? nullptr : above + v * tile_size,
                           below == nullptr ? nullptr : below + v * tile_size};
    loss_tile_of<A>(strip.rows, call, scratch, tile);
  }
  if (!records) return;
  for (int64_t r = 0; r < strip.rows; ++r) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += scratch.totals[r * n + i];
    call.row_losses[row + r] = total;
  }
}

// Strips [begin, end) of all images, without a gradient.
template <class S, class A>
void loss_strips(const Loss<A>& call, int64_t begin, int64_t end, char* memory) {
  LossScratch<A> scratch(call, memory);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t count = call.logits.strip_count;
    loss_strip<S>(call, scratch, i / count, call.logits.strips[i % count], true,
                  static_cast<A*>(nullptr), static_cast<A*>(nullptr));
  }
}

// Stores the gradient of an input row from its sums.
template <class A>
FASTSEG_NOINLINE void store_gradient(const Loss<A>& call, const LossScratch<A>& scratch,
                                     int64_t image, int64_t h, const A* sums) {
  constexpr int64_t n = kLanes<A>;
  const Logits<A>& logits = call.logits;
  const int64_t C = logits.C, w = logits.w;
  A* row = call.gradient +
           (call.channels_last ? (image * logits.h + h) * w * C : (image * C * logits.h + h) * w);
  for (int64_t c = 0; c < C; c += n) {
    const int64_t live = C - c < n ? C - c : n;
    rows_to_columns(sums + c * n, n, C * n, logits.spread.vectors, live, scratch.columns);
    if (!call.channels_last) {
      columns_to_gradients(call.column_taps, w, 1, scratch.columns, live, row + c * logits.h * w,
                           logits.h * w);
      continue;
    }
    for (int64_t i = 0; i < w; ++i) {
      const Vector<A> gradient = sum_columns(call.column_taps, i, scratch.columns, 1, 0);
      live == n ? store(row + i * C + c, gradient) : store_first(row + i * C + c, gradient, live);
    }
  }
}

// The strips between input row h and the next.
template <class S, class A>
FASTSEG_NOINLINE void loss_below(const Loss<A>& call, LossScratch<A>& scratch, int64_t image,
                                 int64_t h, bool records) {
  A* above = scratch.sums[h % 2];
  A* below = scratch.sums[h + 1 == call.logits.h ? h % 2 : (h + 1) % 2];
  for (int64_t i = call.first_strip[h]; i < call.first_strip[h + 1]; ++i) {
    loss_strip<S>(call, scratch, image, call.logits.strips[i], records, above, below);
  }
}

// The loss of the strips below gradient rows [begin, end) of all images, and these gradient rows.
template <class S, class A>
void loss_rows(const Loss<A>& call, int64_t begin, int64_t end, char* memory) {
  LossScratch<A> scratch(call, memory);
  const Logits<A>& logits = call.logits;
  const int64_t size = logits.spread.vectors * logits.C * kLanes<A>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / logits.h, h = row % logits.h;
    if (row == begin || h == 0) {
      for (A* sums : scratch.sums) std::memset(sums, 0, size * sizeof(A));
      if (h > 0) loss_below<S>(call, scratch, image, h - 1, false);
    }
    if (h + 1 < logits.h) std::memset(scratch.sums[(h + 1) % 2], 0, size * sizeof(A));
    loss_below<S>(call, scratch, image, h, true);
    store_gradient(call, scratch, image, h, scratch.sums[h % 2]);
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
