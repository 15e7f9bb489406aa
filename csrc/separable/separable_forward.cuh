// The kernel of separable convolutions: z of one slice and the product of the one before it, in
// turns, then the results. See separable.cuh for the picture.
#pragma once

#include "csrc/separable/separable.cuh"

namespace fastseg {
namespace separable {

// ---- Results ----

template <typename Traits>
using Values = typename Traits::Acc[Traits::kUnitRows * Traits::kUnitColumns][4];

// The sums and sums of squares of the first `pixels` rows of a tile -> `sums` [2, channels], in a
// fixed order: a lane's rows, then lanes, then warps. `shared` is free again on return.
template <typename Traits>
__device__ __forceinline__ void store_statistics(const Values<Traits>& values, int pixels,
                                                 int width, typename Traits::Acc* shared,
                                                 typename Traits::Acc* sums, int channels) {
  using Acc = typename Traits::Acc;
  using Unit = Mma<tf32>;
  constexpr int kColumns = Traits::kColumns;
  const int lane = lane_id(), row_warp = warp_row<Traits>() / Traits::kWarpRows;
  // shared [kRowWarps, 2, kColumns]
#pragma unroll
  for (int n = 0; n < Traits::kUnitColumns; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Acc found[2] = {Acc(0), Acc(0)};
#pragma unroll
      for (int m = 0; m < Traits::kUnitRows; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row<Traits>() + 16 * m + Unit::d_row(lane, 2 * half);
          if (row >= pixels) continue;
          const Acc value = values[m * Traits::kUnitColumns + n][2 * half + j];
          found[0] += value;
          found[1] = multiply_add(value, value, found[1]);
        }
      }
#pragma unroll
      for (int other = 4; other < 32; other *= 2) {
#pragma unroll
        for (Acc& sum : found) sum += __shfl_xor_sync(0xffffffff, sum, other);
      }
      const int column = warp_column<Traits>() + 8 * n + Unit::d_column(lane, j);
      if (lane >= 4) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) shared[(2 * row_warp + i) * kColumns + column] = found[i];
    }
  }
  __syncthreads();
  for (int i = thread_id_x(); i < 2 * kColumns; i += Traits::kThreads) {
    const int kind = i / kColumns, column = i % kColumns;
    if (column >= width) continue;
    Acc sum = Acc(0);
#pragma unroll
    for (int warp = 0; warp < Traits::kRowWarps; ++warp) sum += shared[2 * kColumns * warp + i];
    sums[static_cast<int64_t>(kind) * channels + column] = sum;
  }
  __syncthreads();
}

// The tile `staged` [kRows, kStagedLength] -> the target, in full lines of channels, or of pixels
// where the target's channels are not adjacent.
template <typename Traits>
__device__ __forceinline__ void store_tile(const typename Traits::T* staged, const int64_t* offsets,
                                           int pixels, int width, bool vectors,
                                           int64_t channel_stride, typename Traits::T* target) {
  constexpr int kVector = Traits::kVector, kColumns = Traits::kColumns;
  constexpr int kLength = Traits::kStagedLength;
  if (vectors) {
    constexpr int kChunks = kColumns / kVector;
    for (int i = thread_id_x(); i < pixels * kChunks; i += Traits::kThreads) {
      const int row = i / kChunks, column = i % kChunks * kVector;
      if (column >= width) continue;
      *reinterpret_cast<uint4*>(target + offsets[row] + column) =
          *reinterpret_cast<const uint4*>(staged + row * kLength + column);
    }
  } else if (channel_stride == 1) {
    for (int i = thread_id_x(); i < pixels * kColumns; i += Traits::kThreads) {
      const int row = i / kColumns, column = i % kColumns;
      if (column < width) target[offsets[row] + column] = staged[row * kLength + column];
    }
  } else {
    for (int i = thread_id_x(); i < width * Traits::kRows; i += Traits::kThreads) {
      const int row = i % Traits::kRows, column = i / Traits::kRows;
      if (row >= pixels) continue;
      target[offsets[row] + column * channel_stride] = staged[row * kLength + column];
    }
  }
}

template <typename Traits>
__device__ __forceinline__ void separable_epilogue(const SeparableParams& params,
                                                   const BranchParams& branch, int tile, int pixels,
                                                   int first_column, const int64_t* targets,
                                                   unsigned char* shared,
                                                   const Accumulators<Traits>& sums) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  using Unit = Mma<tf32>;
  const int lane = lane_id(), first_channel = branch.first_channel + first_column;
  const int width = min(Traits::kColumns, branch.columns - first_column);
  Values<Traits> values;
#pragma unroll
  for (int n = 0; n < Traits::kUnitColumns; ++n) {
    Acc scale[2] = {Acc(1), Acc(1)}, bias[2] = {Acc(0), Acc(0)};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = warp_column<Traits>() + 8 * n + Unit::d_column(lane, j);
      if (column >= width) continue;
      const int channel = first_channel + column;
      if (params.scale != nullptr) scale[j] = static_cast<const Acc*>(params.scale)[channel];
      if (params.bias != nullptr) {
        bias[j] = params.wide_bias ? static_cast<const Acc*>(params.bias)[channel]
                                   : widen(static_cast<const T*>(params.bias)[channel]);
      }
    }
#pragma unroll
    for (int m = 0; m < Traits::kUnitRows; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[m * Traits::kUnitColumns + n][i] =
            multiply_add(scale[i % 2], sums[m][n].reg[i], bias[i % 2]);
      }
    }
  }
  if (params.statistics != nullptr) {
    Acc* const to = static_cast<Acc*>(params.statistics) +
                    static_cast<int64_t>(tile) * 2 * params.target_channels + first_channel;
    store_statistics<Traits>(values, pixels, width, reinterpret_cast<Acc*>(shared), to,
                             params.target_channels);
  }
  activate(params.activation, values);

  T* const staged = reinterpret_cast<T*>(shared);  // [kRows, kStagedLength]
#pragma unroll
  for (int m = 0; m < Traits::kUnitRows; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kUnitColumns; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row<Traits>() + 16 * m + Unit::d_row(lane, 2 * half);
        const int column = warp_column<Traits>() + 8 * n + Unit::d_column(lane, 0);
        const Acc(&unit)[4] = values[m * Traits::kUnitColumns + n];
        const Acc both[2] = {unit[2 * half], unit[2 * half + 1]};
        store_pack(staged + row * Traits::kStagedLength + column, narrow<T, 2>(both));
      }
    }
  }
  __syncthreads();
  store_tile<Traits>(staged, targets, pixels, width, branch.target_vectors, params.target_strides.c,
                     static_cast<T*>(params.target) + first_channel * params.target_strides.c);
}

// ---- Kernel ----

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, dilated::min_blocks<Traits>())
    separable_product(const __grid_constant__ SeparableParams params) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  using A = typename Traits::A;
  using B = typename Traits::B;
  constexpr int kStages = Traits::kStages, kDepth = Traits::kDepth;

  FASTSEG_DYNAMIC_SHARED(shared);
  T* const z_slices = reinterpret_cast<T*>(shared);      // [2, kRows, kDepth]
  T* const weight_slices = z_slices + 2 * A::kElements;  // [kStages, kColumns, kDepth]
  Acc* const filters = reinterpret_cast<Acc*>(shared + Traits::kFiltersAt);  // [2, taps, kDepth]
  Site* const sites = reinterpret_cast<Site*>(shared + Traits::kSitesAt);    // [kRows]
  int64_t* const targets = reinterpret_cast<int64_t*>(shared + Traits::kTargetsAt);  // [kRows]

  const int block = static_cast<int>(block_id_x());
  const int tile = block / params.column_tiles, column_tile = block - tile * params.column_tiles;
  int number = 0;
  while (number + 1 < params.branch_count &&
         params.branches[number + 1].first_column_tile <= column_tile) {
    ++number;
  }
  const BranchParams& branch = params.branches[number];
  const int first_column = (column_tile - branch.first_column_tile) * Traits::kColumns;

  const int64_t first_pixel = static_cast<int64_t>(tile) * Traits::kRows;
  const Pixel first = pixel_at(first_pixel, params.rows, params.columns);
  // Of this tile; the ones behind the last are computed again and not stored.
  const int pixels = static_cast<int>(
      min(static_cast<int64_t>(Traits::kRows),
          static_cast<int64_t>(params.images) * params.rows.divisor * params.columns.divisor -
              first_pixel));
  for (int row = thread_id_x(); row < Traits::kRows; row += Traits::kThreads) {
    const Pixel pixel = pixel_behind(first, min(row, pixels - 1), params.rows, params.columns);
    const int h = pixel.row * params.stride_h - branch.pad_top;
    const int w = pixel.column * params.stride_w - branch.pad_left;
    sites[row] = {pixel.image * params.input_strides.n + h * params.input_strides.h +
                      w * params.input_strides.w,
                  h, w};
    targets[row] = pixel.image * params.target_strides.n + pixel.row * params.target_strides.h +
                   pixel.column * params.target_strides.w;
  }

  const int slices = (params.channels + kDepth - 1) / kDepth;
  const bool staged = Traits::kVectors && branch.filter != nullptr && branch.filter_rows == 3 &&
                      branch.filter_columns == 3;
  const T* const filter = static_cast<const T*>(branch.filter);  // [channels, taps]
  FilterCopy<Traits> filter_copy;
  const auto filters_of = [&](int slice) { return filters + slice % 2 * Traits::kFilterElements; };

  const auto make = [&](int slice) {
    T* const z = z_slices + slice % 2 * A::kElements;
    if (branch.filter == nullptr) {
      copy_slice<Traits>(params, sites, slice * kDepth, z);
      return;
    }
    if constexpr (Traits::kVectors) {
      if (staged) {
        make_slice<Traits, true>(params, branch, sites, filters_of(slice), slice * kDepth, z);
        return;
      }
    }
    make_slice<Traits, false>(params, branch, sites, nullptr, slice * kDepth, z);
  };

  const auto copy_weight = [&](int slice, int stage) {
    const int thread = thread_anew();
    const int chunk = thread % B::kChunks, first_line = thread / B::kChunks;
    const int channel = slice * kDepth + chunk * Traits::kVector;
    const T* from = static_cast<const T*>(branch.weight) +
                    (first_column + first_line) * branch.weight_line + channel;
    T* to = weight_slices + stage * B::kElements + B::offset(first_line, chunk);
#pragma unroll
    for (int i = 0; i < Traits::kBLines; ++i) {
      const int column = first_column + first_line + i * Traits::kLineStep;
      dilated::copy_chunk<Traits::kVectors>(
          to, from, column < branch.columns ? params.channels - channel : 0);
      from += Traits::kLineStep * branch.weight_line;
      to += Traits::kLineStep * B::kLength;
    }
  };

  if constexpr (Traits::kVectors) {
    if (staged) {
      filter_copy.fetch(filter, 0, params.channels);
      filter_copy.store(filters);
    }
  }
#pragma unroll
  for (int stage = 0; stage < kStages - 2; ++stage) {
    if (stage < slices) copy_weight(stage, stage);
    cp_async_commit();
  }
  const bool makes_first = warp_id() / 4 % 2 == 0;  // a scheduler has every fourth warp
  int copied = kStages - 2, multiplied = 0;         // stages
  Accumulators<Traits> sums = {};
  // The first round only makes, the last one only multiplies.
  for (int slice = -1; slice < slices; ++slice) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // weights have landed, z is made, and everybody is done with what was before
    if (slice + kStages - 1 < slices) copy_weight(slice + kStages - 1, copied);
    cp_async_commit();
    copied = copied + 1 < kStages ? copied + 1 : 0;
    const bool more_filters = staged && slice + 2 < slices;
    if constexpr (Traits::kVectors) {
      if (more_filters) filter_copy.fetch(filter, (slice + 2) * kDepth, params.channels);
    }
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      if ((turn == 0) == makes_first) {
        if (slice + 1 < slices) make(slice + 1);
      } else if (slice >= 0) {
        dilated::multiply_slice<Traits>(z_slices + slice % 2 * A::kElements,
                                        weight_slices + multiplied * B::kElements, sums);
        multiplied = multiplied + 1 < kStages ? multiplied + 1 : 0;
      }
    }
    if constexpr (Traits::kVectors) {
      if (more_filters) filter_copy.store(filters_of(slice + 2));
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  separable_epilogue<Traits>(params, branch, tile, pixels, first_column, targets, shared, sums);
}

}  // namespace separable
}  // namespace fastseg
