// Depthwise-separable convolution in one kernel: the depthwise result z is made, tile by tile,
// where the matrix product behind it looks for its left operand, and is never in global memory.
//
//   z[pixel, c] = depthwise_activation(scale * sum over taps of x[pixel + tap, c] * filter[tap, c]
//                                      + bias)
//   y[pixel, k] = activation(scale * sum over c of z[pixel, c] * weight[k, c] + bias)
//
// A block owns ROWS pixels x COLUMNS output channels, whose sums it keeps in registers, and goes
// along c in slices of 128 bytes (64 halves). Between two barriers every warp makes its share of z
// for the next slice and multiplies this one:
//
//     x, 8 channels a load, each tap        filters of slice s + 2         weight of slice s + 2
//                 | make                          | registers                     | cp.async
//     shared  [ z of s + 1 | z of s ]        [ s + 1 | s + 2 ]             [ s | s + 1 | s + 2 ]
//                              |                                             |
//                              +-------------- multiply, slice s ------------+
//
// Neither waits for the other, so half of a scheduler's warps make first and the other half
// multiply first: the ordinary multipliers and the tensor cores work at the same time.
//
// Branches. A launch covers several convolutions of one image (separable ASPP), and plain 1x1 ones
// among them, whose z is x. Blocks of the same pixels are neighbours, so that all branches find the
// same x in L2, and each writes its channels of the one output. Operands, their places in shared
// memory and the product are those of dense convolution, see csrc/dilated/dilated.cuh.
//
// A tap that looks at padding is neither loaded nor multiplied. 3x3 filters travel through shared
// memory in the accumulator's dtype, any others are read where they are. Channels that fill no
// chunk, or lie at odd addresses, or a multiplier, take loads of one element (VECTORS = false).
//
// What limits it, for halves, a 3x3 filter and a slice of 128 x 256: z takes 8192 x 9 products. 8
// of them take 20 instructions, 8 to multiply and add and as many to widen x, so that a
// multiprocessor issues them in about 1500 cycles; the other 64 x 128 x 256 products take 360 to
// issue, and keep its tensor cores busy for about 1500. Up to 256 output channels therefore cost
// about a quarter more than the 1x1 convolution alone, and save z's way to memory and back. Each
// further 256 make z again. x is read once from memory, and up to 9 times from L1.
#pragma once

#include "csrc/dilated/dilated.cuh"
#include "csrc/separable/separable_plan.h"

namespace fastseg {
namespace separable {

using dilated::Accumulators;
using dilated::kMostSharedBytes;
using dilated::Pixel;
using dilated::pixel_at;
using dilated::pixel_behind;
using dilated::warp_column;
using dilated::warp_row;

// Where the window of a pixel begins in the image: its first tap, which may look at padding.
struct alignas(16) Site {
  int64_t offset;
  int row, column;
};

// Everything that follows from the template arguments.
template <typename OPERAND, typename TILE, bool VECTORS>
struct SeparableTraits : dilated::ProductTraits<OPERAND, TILE, false, false> {
  using Base = dilated::ProductTraits<OPERAND, TILE, false, false>;
  using Base::kDepth;
  using Base::kVector;
  using typename Base::A;
  using typename Base::Acc;
  using typename Base::B;
  using typename Base::T;

  static constexpr bool kVectors = VECTORS;
  // Chunks that a thread makes of one slice of z, and copies of one of the weight: one a line.
  static constexpr int kLineStep = TILE::kThreads / A::kChunks;
  static constexpr int kALines = A::kLines / kLineStep;
  static constexpr int kBLines = B::kLines / kLineStep;
  // Of them, lines that share what a thread reads of a filter: as many as registers allow beside
  // the sums.
  static constexpr int kSumRegisters =
      Base::kUnitRows * Base::kUnitColumns * static_cast<int>(sizeof(Acc));
  static constexpr int kRegisters = 65536 / (TILE::kThreads * TILE::kMinBlocks);
  static constexpr int kLinesAtOnce = kRegisters - kSumRegisters > 64 ? 2 : 1;

  // The taps of a slice of 3x3 filters, kDepth channels each. Somewhat longer than that, so that
  // threads with neighbouring taps of one channel store to different banks.
  static constexpr int kFilterTaps = 9;
  static constexpr int kFilterLength = kDepth + 4;
  static constexpr int kFilterElements = kFilterTaps * kFilterLength;
  static constexpr int kFetched = (kFilterTaps * kDepth + TILE::kThreads - 1) / TILE::kThreads;

  // The tile of results, a chunk of padding behind each row.
  static constexpr int kStagedLength = TILE::kColumns + kVector;
  static constexpr int kStagedBytes = TILE::kRows * kStagedLength * static_cast<int>(sizeof(T));
  // In shared memory: two slices of z, kStages of the weight, two of filters, and when those are
  // done the statistics, then the tile of results; behind them where each row's pixel is in the
  // image and in the target.
  static constexpr int kOperandElements = 2 * A::kElements + TILE::kStages * B::kElements;
  static constexpr int kFiltersAt = kOperandElements * static_cast<int>(sizeof(T));
  static constexpr int kFilterBytes =
      VECTORS ? 2 * kFilterElements * static_cast<int>(sizeof(Acc)) : 0;
  static constexpr int kSitesAt = std::max(kFiltersAt + kFilterBytes, kStagedBytes);
  static constexpr int kTargetsAt = kSitesAt + TILE::kRows * static_cast<int>(sizeof(Site));
  static constexpr int kSharedBytes = kTargetsAt + TILE::kRows * static_cast<int>(sizeof(int64_t));
  static constexpr int kRowWarps = TILE::kRows / TILE::kWarpRows;
  static constexpr int kStatisticsBytes =
      kRowWarps * 2 * TILE::kColumns * static_cast<int>(sizeof(Acc));

  // A multiple of 8, so that all lines of a thread are twisted in the same way.
  static_assert(kLineStep % 8 == 0 && A::kLines % kLineStep == 0 && B::kLines % kLineStep == 0);
  static_assert(A::kChunks == B::kChunks && kALines % kLinesAtOnce == 0);
  static_assert(kVector * sizeof(Acc) % 16 == 0 && kFilterLength * sizeof(Acc) % 16 == 0);
  static_assert(kFiltersAt % 16 == 0 && kSitesAt % 16 == 0 && kStatisticsBytes <= kSitesAt);
  static_assert(kSharedBytes <= kMostSharedBytes);
};

// 0 <= i < end, for an end that is not negative.
__device__ __forceinline__ bool inside(int i, int end) {
  return static_cast<unsigned>(i) < static_cast<unsigned>(end);
}

// This thread's number, as if it were not known before: what follows from it is computed anew for
// each slice, by a few instructions, and not kept in registers that the sums need.
__device__ __forceinline__ int thread_anew() {
  int thread = thread_id_x();
#ifndef FASTSEG_HOST
  asm volatile("" : "+r"(thread));
#endif
  return thread;
}

// ---- Filters ----

// Place of a channel in a row of a slice of filters. A thread reads the channels of its chunk in
// accesses of 16 bytes; the first ones of all chunks lie side by side, then the second ones, so
// that the chunks of neighbouring threads come from different banks.
template <typename Traits>
__host__ __device__ constexpr int filter_place(int channel) {
  constexpr int kVector = Traits::kVector;
  constexpr int kAccess = 16 / static_cast<int>(sizeof(typename Traits::Acc));
  const int chunk = channel / kVector, within = channel % kVector;
  return within / kAccess * (Traits::kDepth / kVector * kAccess) + chunk * kAccess +
         within % kAccess;
}

// One row of it, the channels of `chunk`.
template <typename Traits>
__device__ __forceinline__ void read_filters(const typename Traits::Acc* row, int chunk,
                                             typename Traits::Acc (&values)[Traits::kVector]) {
  using Acc = typename Traits::Acc;
  constexpr int kAccess = 16 / static_cast<int>(sizeof(Acc));
#pragma unroll
  for (int v = 0; v < Traits::kVector; v += kAccess) {
    const uint4 access =
        *reinterpret_cast<const uint4*>(row + filter_place<Traits>(v) + chunk * kAccess);
    memcpy(&values[v], &access, sizeof access);
  }
}

// This thread's share of the 3x3 filters [channels, 9] of the slice that begins at `first_channel`,
// on its way from global memory to shared: fetched while there is something else to do, stored
// afterwards.
template <typename Traits>
class FilterCopy {
 public:
  using T = typename Traits::T;

  __device__ __forceinline__ void fetch(const T* filter, int first_channel, int channels) {
    const int thread = thread_anew();
    const int left = min(Traits::kDepth, channels - first_channel) * Traits::kFilterTaps - thread;
    const T* const from =
        filter + static_cast<int64_t>(first_channel) * Traits::kFilterTaps + thread;
#pragma unroll
    for (int j = 0; j < Traits::kFetched; ++j) {
      fetched_[j] = {};
      if (j * Traits::kThreads < left) {
        fetched_[j] = load_pack<T, 1>(from + j * Traits::kThreads);
      }
    }
  }

  __device__ __forceinline__ void store(Accumulator<T>* filters) const {  // [9, kFilterLength]
    const int thread = thread_anew();
#pragma unroll
    for (int j = 0; j < Traits::kFetched; ++j) {
      const int i = thread + j * Traits::kThreads;
      const int channel = i / Traits::kFilterTaps, tap = i % Traits::kFilterTaps;
      if (channel >= Traits::kDepth) continue;
      Accumulator<T> value[1];
      widen(fetched_[j], value);
      filters[tap * Traits::kFilterLength + filter_place<Traits>(channel)] = value[0];
    }
  }

 private:
  Pack<T, 1> fetched_[Traits::kFetched];
};

// ---- z ----

// The channel of the image from which a thread counts that makes z from `channel` on: the same one
// where channels come in chunks, otherwise 0, since a multiplier may stand between the two.
template <typename Traits>
__device__ __forceinline__ int first_seen(int channel) {
  return Traits::kVectors ? channel : 0;
}

// What `count` channels of z from `channel` on see of one pixel, whose channel first_seen() lies at
// `pixel`; zeros behind them.
template <typename Traits>
__device__ __forceinline__ Pack<typename Traits::T, Traits::kVector> load_channels(
    const SeparableParams& params, const typename Traits::T* pixel, int channel, int count) {
  using T = typename Traits::T;
  if constexpr (Traits::kVectors) {
    return load_pack<T, Traits::kVector>(pixel);
  } else {
    Accumulator<T> values[Traits::kVector];
#pragma unroll
    for (int v = 0; v < Traits::kVector; ++v) {
      values[v] = Accumulator<T>(0);
      if (v < count) values[v] = widen(pixel[params.multiplier.quotient(channel + v)]);
    }
    return narrow<T, Traits::kVector>(values);
  }
}

// `count` scales or biases of z from `channel` on.
template <typename Traits, typename From>
__device__ __forceinline__ void load_parameters(const From* from, int channel, int count,
                                                typename Traits::Acc (&values)[Traits::kVector]) {
  if constexpr (Traits::kVectors) {
    constexpr int kAccess = std::min(Traits::kVector, 16 / static_cast<int>(sizeof(From)));
#pragma unroll
    for (int v = 0; v < Traits::kVector; v += kAccess) {
      typename Traits::Acc part[kAccess];
      widen(load_pack<From, kAccess>(from + channel + v), part);
#pragma unroll
      for (int i = 0; i < kAccess; ++i) values[v + i] = part[i];
    }
  } else {
#pragma unroll
    for (int v = 0; v < Traits::kVector; ++v) {
      if (v < count) values[v] = widen(from[channel + v]);
    }
  }
}

// The pixels of which a thread makes a chunk of z each, at one row of their windows.
template <typename Traits>
struct Windows {
  const typename Traits::T* source[Traits::kLinesAtOnce];  // the row's first tap
  int row[Traits::kLinesAtOnce], column[Traits::kLinesAtOnce];
};

// z += x * filter for the taps s, ... of a row. GUARDED: some of them may look at padding.
// filter_at(t, weights) gives those of tap s + t.
template <typename Traits, int TAPS, bool GUARDED, typename FilterAt>
__device__ __forceinline__ void add_taps(
    const SeparableParams& params, const BranchParams& branch, const Windows<Traits>& windows,
    int s, int channel, int count, FilterAt filter_at,
    typename Traits::Acc (&z)[Traits::kLinesAtOnce][Traits::kVector]) {
  using Acc = typename Traits::Acc;
  constexpr int kVector = Traits::kVector, kLines = Traits::kLinesAtOnce;
  Pack<typename Traits::T, kVector> x[kLines][TAPS];
  bool live[kLines][TAPS];
#pragma unroll
  for (int l = 0; l < kLines; ++l) {
#pragma unroll
    for (int t = 0; t < TAPS; ++t) {
      live[l][t] = !GUARDED || (inside(windows.row[l], params.H) &&
                                inside(windows.column[l] + (s + t) * branch.dilation_w, params.W));
      if constexpr (GUARDED) x[l][t] = {};
      if (!live[l][t]) continue;
      x[l][t] = load_channels<Traits>(params, windows.source[l] + (s + t) * branch.column_step,
                                      channel, count);
    }
  }
#pragma unroll
  for (int t = 0; t < TAPS; ++t) {
    Acc weights[kVector];
    filter_at(t, weights);
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      if (!live[l][t]) continue;
      Acc values[kVector];
      widen(x[l][t], values);
#pragma unroll
      for (int v = 0; v < kVector; ++v) z[l][v] = multiply_add(values[v], weights[v], z[l][v]);
    }
  }
}

// z = activation(scale * z + bias)
template <typename Traits>
__device__ __forceinline__ void finish_channels(
    const SeparableParams& params, const BranchParams& branch, int channel, int count,
    typename Traits::Acc (&z)[Traits::kLinesAtOnce][Traits::kVector]) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  constexpr int kVector = Traits::kVector;
  Acc scale[kVector], bias[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) scale[v] = Acc(1), bias[v] = Acc(0);
  if (count > 0 && branch.scale != nullptr) {
    load_parameters<Traits>(static_cast<const Acc*>(branch.scale), channel, count, scale);
  }
  if (count > 0 && branch.bias != nullptr) {
    if (params.wide_depthwise_bias) {
      load_parameters<Traits>(static_cast<const Acc*>(branch.bias), channel, count, bias);
    } else {
      load_parameters<Traits>(static_cast<const T*>(branch.bias), channel, count, bias);
    }
  }
#pragma unroll
  for (auto& line : z) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) line[v] = multiply_add(scale[v], line[v], bias[v]);
  }
  activate(params.depthwise_activation, z);
}

// This thread's chunks of a slice of z; zeros behind the last channel, as every activation of zero
// is. STAGED: the filters are 3x3 and lie in `filters`.
template <typename Traits, bool STAGED>
__device__ __forceinline__ void make_slice(const SeparableParams& params,
                                           const BranchParams& branch, const Site* sites,
                                           const typename Traits::Acc* filters, int first_channel,
                                           typename Traits::T* slice) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  using A = typename Traits::A;
  constexpr int kVector = Traits::kVector, kLines = Traits::kLinesAtOnce;
  constexpr int kTaps = STAGED ? 3 : 1;  // of a filter's row, loaded together
  const int thread = thread_anew();
  const int chunk = thread % A::kChunks, first_line = thread / A::kChunks;
  const int channel = first_channel + chunk * kVector, count = params.channels - channel;
  const int filter_rows = STAGED ? 3 : branch.filter_rows;
  const int filter_columns = STAGED ? 3 : branch.filter_columns;
  const T* const input = static_cast<const T*>(params.input) + first_seen<Traits>(channel);
  T* const place = slice + A::offset(first_line, chunk);

#pragma unroll 1
  for (int i = 0; i < Traits::kALines; i += kLines) {
    Windows<Traits> windows;
    bool columns_inside = true;  // of all taps of all windows
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      const Site site = sites[first_line + (i + l) * Traits::kLineStep];
      windows.source[l] = input + site.offset;
      windows.row[l] = site.row, windows.column[l] = site.column;
      columns_inside = columns_inside && site.column >= 0 &&
                       site.column + (filter_columns - 1) * branch.dilation_w < params.W;
    }
    Acc z[kLines][kVector] = {};
#pragma unroll 1
    for (int r = 0; r < filter_rows && count > 0; ++r) {
      bool rows_inside = true;
#pragma unroll
      for (int l = 0; l < kLines; ++l) rows_inside &= inside(windows.row[l], params.H);
#pragma unroll 1
      for (int s = 0; s < filter_columns; s += kTaps) {
        const auto filter_at = [&](int t, Acc(&weights)[kVector]) {
          if constexpr (STAGED) {
            read_filters<Traits>(filters + (3 * r + t) * Traits::kFilterLength, chunk, weights);
          } else {
            const int taps = filter_rows * filter_columns;
            const T* const filter = static_cast<const T*>(branch.filter) +
                                    static_cast<int64_t>(channel) * taps + r * filter_columns + s;
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              weights[v] = v < count ? widen(filter[v * taps]) : Acc(0);
            }
          }
        };
        if (STAGED && rows_inside && columns_inside) {
          add_taps<Traits, kTaps, false>(params, branch, windows, s, channel, count, filter_at, z);
        } else {
          add_taps<Traits, kTaps, true>(params, branch, windows, s, channel, count, filter_at, z);
        }
      }
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
        windows.source[l] += branch.row_step, windows.row[l] += branch.dilation_h;
      }
    }
    finish_channels<Traits>(params, branch, channel, count, z);
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      store_pack(place + (i + l) * Traits::kLineStep * A::kLength, narrow<T, kVector>(z[l]));
    }
  }
}

// The same where z is x.
template <typename Traits>
__device__ __forceinline__ void copy_slice(const SeparableParams& params, const Site* sites,
                                           int first_channel, typename Traits::T* slice) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  constexpr int kLines = Traits::kVectors ? 4 : 1;  // in flight
  const int thread = thread_anew();
  const int chunk = thread % A::kChunks, first_line = thread / A::kChunks;
  const int channel = first_channel + chunk * Traits::kVector, count = params.channels - channel;
  const T* const input = static_cast<const T*>(params.input) + first_seen<Traits>(channel);
  T* const place = slice + A::offset(first_line, chunk);
#pragma unroll 1
  for (int i = 0; i < Traits::kALines; i += kLines) {
    Pack<T, Traits::kVector> x[kLines] = {};
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      const Site& site = sites[first_line + (i + l) * Traits::kLineStep];
      if (count <= 0) continue;
      x[l] = load_channels<Traits>(params, input + site.offset, channel, count);
    }
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      store_pack(place + (i + l) * Traits::kLineStep * A::kLength, x[l]);
    }
  }
}

}  // namespace separable
}  // namespace fastseg
