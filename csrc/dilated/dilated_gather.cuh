// Forward and grad_input: targets gather what their live taps see. See dilated.cuh for the product.
//
//   target[n, th, tw, m] = activation(scale[m] * sum + bias[m]),
//   sum = over live taps and source channels d of source[n, sh, sw, d] * weight[tap, d, m]
//
// Rows of the product are the pixels of a rectangle of all images, columns target channels, depth
// the live taps times the source channels, rounded up to whole chunks. Depth is one flat count of
// chunks: a slice may hold the end of one tap and the begin of the next, so that 3 channels and 49
// taps fill their slices as 2048 channels and one tap do. The taps stand in a table in shared
// memory, which says where each lies in source and weight; that they may be of several convolutions
// with weights and channels of their own is all that makes a sum of branches, or their common
// grad_input, of it. Branches side by side are further rectangles of the same grid.
//
// Forward has the sources x and targets y; the weight's depth, c, runs along a line. grad_input has
// the sources grad_y and targets grad_x; the weight's columns do (TURNED). Nothing else differs.
//
// All rectangles are in one grid, because in a single image each has but a few tiles. Neighbouring
// blocks take the column tiles of the same pixels, which then come from cache.
//
// The sums leave through shared memory, so that they are stored in full lines of channels, or of
// pixels where the target's channels are not adjacent: an NCHW result needs no second pass.
#pragma once

#include <climits>

#include "csrc/dilated/dilated.cuh"
#include "csrc/dilated/dilated_gather_plan.h"

namespace fastseg {
namespace dilated {

struct GatherParams {
  Rectangles rectangles;
  int images;
  int row_period, column_period;  // targets from one to the next of a span
  int row_step, column_step;      // and sources
  const void* source;             // [N, H, W, C], or [N, P, Q, K]
  Strides4 source_strides;
  const void* scale;   // [target channels] or nullptr
  const void* bias;    // [target channels], or one of each image, or nullptr
  int64_t bias_image;  // from one image's to the next, or 0
  bool wide_bias;
  Activation activation;
  bool target_vectors;  // whether 16 bytes of target channels can be stored at once
  void* target;         // [N, P, Q, K], or [N, H, W, C]
  Strides4 target_strides;
  void* statistics;       // [tiles of pixels, 2, statistics_length], or nullptr
  int statistics_length;  // the target channels
};
// What a launch may have on every GPU and driver.
static_assert(sizeof(GatherParams) <= 4096);

// One live tap of a tile.
template <typename T>
struct alignas(16) TableTap {
  int64_t source;   // from where a pixel's offset points
  const T* weight;  // from the tile's columns on: [columns, channels] (TURNED: the other way round)
  int64_t line;     // of `weight`, its length
  int channels;
  int depth;  // the channels in whole chunks
};

// What every launch has room for, the end of the table included: six branches of 3x3, or a 7x7. For
// larger filters it asks for more shared memory.
constexpr int kUsualTaps = 63;

// What a block computes, in shared memory lest it take registers while products are summed up.
struct alignas(16) BlockTile {
  int rectangle;
  int tile;  // of the rectangle's pixels
  int pixels;
  int first_column;
};

template <typename OPERAND, typename TILE, bool TURNED, bool VECTORS>
struct GatherTraits : ProductTraits<OPERAND, TILE, false, TURNED> {
  using Base = ProductTraits<OPERAND, TILE, false, TURNED>;
  using Base::kVector;

  static constexpr bool kVectors = VECTORS;
  static constexpr int kUnits = Base::kUnitRows * Base::kUnitColumns;
  // Chunks that a thread copies of one slice: of A, and of B if that is not turned, one a line, all
  // at the same depth; of a turned B, kBLines neighbouring lines.
  static constexpr int kLineStep = TILE::kThreads / Base::A::kChunks;
  static constexpr int kALines = Base::A::kLines / kLineStep;
  static constexpr int kBLines = Base::B::kLines * Base::B::kChunks / TILE::kThreads;
  static constexpr int kLinesOfChunk = kBLines < kVector ? kBLines : kVector;

  // The tile of results, a chunk of padding behind each row.
  static constexpr int kStagedLength = TILE::kColumns + kVector;
  static constexpr int kStagedBytes =
      TILE::kRows * kStagedLength * static_cast<int>(sizeof(typename Base::T));
  // In shared memory: the pipeline, and when that is done the tile of results; then where in the
  // source, and at last in the target, each row's pixel is; then the BlockTile; then the table of
  // live taps, and at last each row's image.
  static constexpr int kOffsetsAt = std::max(Base::kPipelineBytes, kStagedBytes);
  static constexpr int kTileAt = kOffsetsAt + TILE::kRows * static_cast<int>(sizeof(int64_t));
  static constexpr int kTableAt = kTileAt + static_cast<int>(sizeof(BlockTile));
  using Tap = TableTap<typename Base::T>;
  static constexpr int kTableBytes = kUsualTaps * static_cast<int>(sizeof(Tap));
  static constexpr int kSharedBytes = kTableAt + kTableBytes;

  // A multiple of 8, so that all these lines are twisted in the same way.
  static_assert(kLineStep % 8 == 0 && Base::A::kLines % kLineStep == 0);
  static_assert(Base::B::kLines * Base::B::kChunks % TILE::kThreads == 0);
  static_assert(kBLines % kLinesOfChunk == 0 && kVector % kLinesOfChunk == 0);
  static_assert(kOffsetsAt % 16 == 0 && kTileAt % 16 == 0 && kSharedBytes <= kMostSharedBytes);
  static_assert(TILE::kRows * static_cast<int>(sizeof(int)) <= kTableBytes);
};

// A place in the flat depth of a table: a channel of one of its taps.
struct DepthCursor {
  int tap, channel;

  // `depth` is that of the tap.
  template <typename Tap>
  __device__ __forceinline__ void advance(const Tap* table, int depth, int elements) {
    channel += elements;
    while (channel >= depth) {
      channel -= depth;
      depth = table[++tap].depth;
    }
  }
};

// Writes the live taps of a rectangle into the table, and behind the last one that has no channels
// and never ends. Returns the depth in chunks.
template <typename Traits>
__device__ __forceinline__ int list_taps(const GatherParams& params, const Rectangles::Entry& entry,
                                         int first_column, typename Traits::Tap* table) {
  using T = typename Traits::T;
  const int thread = thread_id_x();
  const int row_run = params.rectangles.rows[entry.rows].run;
  const int column_run = params.rectangles.columns[entry.columns].run;
  int chunks = 0;
  for (int i = entry.branch; i < entry.branch + entry.branches; ++i) {
    const BranchParams& branch = params.rectangles.branches[i];
    const TapRun& rows = params.rectangles.row_runs[row_run + i - entry.branch];
    const TapRun& columns = params.rectangles.column_runs[column_run + i - entry.branch];
    const auto source_row = rows.source_spacing * params.source_strides.h;
    const auto source_column = columns.source_spacing * params.source_strides.w;
    const auto weight_row = rows.weight_spacing * params.rectangles.branches[i].weight_row;
    const auto weight_column = columns.weight_spacing * params.rectangles.branches[i].weight_column;
    const int64_t source = rows.source * params.source_strides.h +
                           columns.source * params.source_strides.w + branch.source;
    const T* const weight = static_cast<const T*>(branch.weight) + rows.weight * branch.weight_row +
                            columns.weight * branch.weight_column +
                            first_column * (Traits::kBTurned ? 1 : branch.weight_line);
    const int branch_chunks = (branch.channels + Traits::kVector - 1) / Traits::kVector;
    const int taps = rows.taps * columns.taps;
    for (int tap = thread; tap < taps; tap += Traits::kThreads) {
      const int row = tap / columns.taps, column = tap - row * columns.taps;
      table[tap] = {source + row * source_row + column * source_column,
                    weight + row * weight_row + column * weight_column, branch.weight_line,
                    branch.channels, branch_chunks * Traits::kVector};
    }
    table += taps;
    chunks += taps * branch_chunks;
  }
  if (thread == 0) {
    const void* const anything = params.rectangles.branches[entry.branch].weight;
    *table = {0, static_cast<const T*>(anything), 0, 0, INT_MAX};
  }
  return chunks;
}

// ---- From sums to results ----

// The sum and the sum of squares of each column of a tile, over its `pixels` rows, into the tile's
// row of params.statistics.
template <typename Traits, typename Acc>
__device__ __forceinline__ void write_statistics(const GatherParams& params,
                                                 const BranchParams& branch, int64_t tile,
                                                 int first_column, int pixels, Acc* shared,
                                                 const Acc (&values)[Traits::kUnits][4]) {
  using Unit = Mma<tf32>;
  constexpr int kWarpsDown = Traits::kRows / Traits::kWarpRows;
  const int lane = lane_id(), thread = thread_id_x();
  Acc* const own = shared + warp_row<Traits>() / Traits::kWarpRows * 2 * Traits::kColumns +
                   warp_column<Traits>();
#pragma unroll
  for (int n = 0; n < Traits::kUnitColumns; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Acc sum = Acc(0), squares = Acc(0);
#pragma unroll
      for (int m = 0; m < Traits::kUnitRows; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row<Traits>() + 16 * m + Unit::d_row(lane, 2 * half);
          const Acc value = values[m * Traits::kUnitColumns + n][2 * half + j];
          if (row >= pixels) continue;
          sum += value;
          squares = multiply_add(value, value, squares);
        }
      }
      // Lanes with the same lane % 4 have the same column.
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        sum += __shfl_xor_sync(0xffffffff, sum, distance);
        squares += __shfl_xor_sync(0xffffffff, squares, distance);
      }
      const int column = 8 * n + Unit::d_column(lane, j);
      if (lane < 4) own[column] = sum, own[Traits::kColumns + column] = squares;
    }
  }
  __syncthreads();

  const int width = min(Traits::kColumns, branch.columns - first_column);
  Acc* const target = static_cast<Acc*>(params.statistics) + tile * 2 * params.statistics_length +
                      branch.target + first_column;
  for (int i = thread; i < 2 * Traits::kColumns; i += Traits::kThreads) {
    const int kind = i / Traits::kColumns, column = i % Traits::kColumns;
    if (column >= width) continue;
    Acc sum = Acc(0);
#pragma unroll
    for (int warp = 0; warp < kWarpsDown; ++warp) sum += shared[2 * Traits::kColumns * warp + i];
    target[kind * static_cast<int64_t>(params.statistics_length) + column] = sum;
  }
  __syncthreads();
}

// values = scale * sums + bias
template <typename Traits, typename Acc>
__device__ __forceinline__ void scale_and_shift(const GatherParams& params,
                                                const BranchParams& branch, int first_column,
                                                int pixels, const int* images,
                                                Accumulators<Traits>& sums,
                                                Acc (&values)[Traits::kUnits][4]) {
  using T = typename Traits::T;
  using Unit = Mma<tf32>;
  const int lane = lane_id();
  const auto bias_at = [&](int64_t i) {
    return params.wide_bias ? static_cast<const Acc*>(params.bias)[i]
                            : widen(static_cast<const T*>(params.bias)[i]);
  };
#pragma unroll
  for (int n = 0; n < Traits::kUnitColumns; ++n) {
    Acc scale[2] = {Acc(1), Acc(1)}, bias[2] = {Acc(0), Acc(0)};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = first_column + warp_column<Traits>() + 8 * n + Unit::d_column(lane, j);
      if (column >= branch.columns) continue;
      const int channel = branch.target + column;
      if (params.scale != nullptr) scale[j] = static_cast<const Acc*>(params.scale)[channel];
      if (params.bias != nullptr && params.bias_image == 0) bias[j] = bias_at(channel);
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
  if (params.bias_image == 0) return;
#pragma unroll
  for (int m = 0; m < Traits::kUnitRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row<Traits>() + 16 * m + Unit::d_row(lane, 2 * half);
      if (row >= pixels) continue;
      const int64_t first = images[row] * params.bias_image + branch.target;
#pragma unroll
      for (int n = 0; n < Traits::kUnitColumns; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = first_column + warp_column<Traits>() + 8 * n + Unit::d_column(lane, j);
          if (column >= branch.columns) continue;
          values[m * Traits::kUnitColumns + n][2 * half + j] += bias_at(first + column);
        }
      }
    }
  }
}

// Turns a tile's sums into results, and stores them.
template <typename Traits>
__device__ __forceinline__ void gather_epilogue(const GatherParams& params, const BlockTile& own,
                                                unsigned char* shared, Accumulators<Traits>& sums) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  using Unit = Mma<tf32>;
  constexpr int kVector = Traits::kVector;
  T* const staged = reinterpret_cast<T*>(shared);  // [kRows, kStagedLength]
  int64_t* const offsets = reinterpret_cast<int64_t*>(shared + Traits::kOffsetsAt);  // [kRows]
  int* const images = reinterpret_cast<int*>(shared + Traits::kTableAt);             // [kRows]
  const int lane = lane_id(), thread = thread_id_x();
  const int pixels = own.pixels, first_column = own.first_column;
  const Rectangles::Entry& entry = params.rectangles.entries[own.rectangle];
  const SpanParams& rows = params.rectangles.rows[entry.rows];
  const SpanParams& columns = params.rectangles.columns[entry.columns];
  const BranchParams& branch = params.rectangles.branches[entry.branch];  // they share a target

  const int64_t first_pixel = static_cast<int64_t>(own.tile) * Traits::kRows;
  for (int row = thread; row < Traits::kRows; row += Traits::kThreads) {
    if (row >= pixels) continue;
    const Pixel pixel = pixel_at(first_pixel + row, rows.count, columns.count);
    images[row] = pixel.image;
    offsets[row] = pixel.image * params.target_strides.n +
                   (rows.index + static_cast<int64_t>(params.row_period) * pixel.row) *
                       params.target_strides.h +
                   (columns.index + static_cast<int64_t>(params.column_period) * pixel.column) *
                       params.target_strides.w;
  }

  Acc values[Traits::kUnits][4];
  if constexpr (Traits::kBTurned) {  // a gradient is the sum itself
#pragma unroll
    for (int unit = 0; unit < Traits::kUnits; ++unit) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[unit][i] = sums[unit / Traits::kUnitColumns][unit % Traits::kUnitColumns].reg[i];
      }
    }
  } else {
    if (params.bias_image != 0) __syncthreads();  // images
    scale_and_shift<Traits>(params, branch, first_column, pixels, images, sums, values);
    if (params.statistics != nullptr) {
      write_statistics<Traits>(params, branch, int64_t{entry.first_tile} + own.tile, first_column,
                               pixels, reinterpret_cast<Acc*>(shared), values);
    }
    activate(params.activation, values);
  }
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

  T* const target =
      static_cast<T*>(params.target) + (branch.target + first_column) * params.target_strides.c;
  const int width = min(Traits::kColumns, branch.columns - first_column);
  if (params.target_vectors) {
    constexpr int kChunks = Traits::kColumns / kVector;
    for (int i = thread; i < pixels * kChunks; i += Traits::kThreads) {
      const int row = i / kChunks, column = i % kChunks * kVector;
      if (column >= width) continue;
      *reinterpret_cast<uint4*>(target + offsets[row] + column) =
          *reinterpret_cast<const uint4*>(staged + row * Traits::kStagedLength + column);
    }
  } else if (params.target_strides.c == 1) {
    for (int i = thread; i < pixels * Traits::kColumns; i += Traits::kThreads) {
      const int row = i / Traits::kColumns, column = i % Traits::kColumns;
      if (column >= width) continue;
      target[offsets[row] + column] = staged[row * Traits::kStagedLength + column];
    }
  } else {
    for (int i = thread; i < width * Traits::kRows; i += Traits::kThreads) {
      const int row = i % Traits::kRows, column = i / Traits::kRows;
      if (row >= pixels) continue;
      target[offsets[row] + column * params.target_strides.c] =
          staged[row * Traits::kStagedLength + column];
    }
  }
}

// ---- The kernel ----

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, min_blocks<Traits>())
    dilated_gather(const __grid_constant__ GatherParams params) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  using B = typename Traits::B;
  using Tap = typename Traits::Tap;
  constexpr int kVector = Traits::kVector, kDepth = Traits::kDepth;

  FASTSEG_DYNAMIC_SHARED(shared);
  const int thread = thread_id_x();
  const int block = static_cast<int>(block_id_x());
  int number = 0;  // of the last rectangle that begins at this block or before
  for (int behind = params.rectangles.count; behind - number > 1;) {
    const int middle = (number + behind) / 2;
    (params.rectangles.entries[middle].first_block <= block ? number : behind) = middle;
  }
  const Rectangles::Entry& entry = params.rectangles.entries[number];
  const SpanParams& rows = params.rectangles.rows[entry.rows];
  const SpanParams& columns = params.rectangles.columns[entry.columns];
  const int target_columns = params.rectangles.branches[entry.branch].columns;
  const int column_tiles = (target_columns + Traits::kColumns - 1) / Traits::kColumns;
  const int tile = (block - entry.first_block) / column_tiles;
  const int first_column = (block - entry.first_block - tile * column_tiles) * Traits::kColumns;

  const int64_t first_pixel = static_cast<int64_t>(tile) * Traits::kRows;
  // Of this tile; the ones behind the last are computed again and not stored.
  const int pixels = static_cast<int>(
      min(static_cast<int64_t>(Traits::kRows),
          static_cast<int64_t>(params.images) * rows.count.divisor * columns.count.divisor -
              first_pixel));
  BlockTile* const own = reinterpret_cast<BlockTile*>(shared + Traits::kTileAt);
  if (thread == 0) *own = {number, tile, pixels, first_column};

  int64_t* const offsets = reinterpret_cast<int64_t*>(shared + Traits::kOffsetsAt);  // [kRows]
  for (int row = thread; row < Traits::kRows; row += Traits::kThreads) {
    const Pixel pixel = pixel_at(first_pixel + min(row, pixels - 1), rows.count, columns.count);
    offsets[row] =
        pixel.image * params.source_strides.n +
        static_cast<int64_t>(params.row_step) * pixel.row * params.source_strides.h +
        static_cast<int64_t>(params.column_step) * pixel.column * params.source_strides.w;
  }
  Tap* const table = reinterpret_cast<Tap*>(shared + Traits::kTableAt);

  const int width = target_columns - first_column;  // that is left, of this tile and the next ones

  // What this thread copies of A, and of B; turned, a chunk of columns in kBLines neighbouring
  // lines of depth.
  const int chunk = thread % A::kChunks, first_line = thread / A::kChunks;
  const int place = A::offset(first_line, chunk);
  const int b_chunk = thread % B::kChunks, b_line = thread / B::kChunks * Traits::kBLines;
  const NeighbouringLines<B> b_place(b_line, b_chunk);

  const int slices =
      (list_taps<Traits>(params, entry, first_column, table) + A::kChunks - 1) / A::kChunks;
  __syncthreads();
  DepthCursor cursor{0, 0}, b_cursor{0, 0};
  cursor.advance(table, table->depth, chunk * kVector);
  if constexpr (Traits::kBTurned) b_cursor.advance(table, table->depth, b_line / kVector * kVector);

  const auto fill = [&](T* a, T* b) {
    const Tap tap = table[cursor.tap];
    const int count = tap.channels - cursor.channel;
    const T* const source = static_cast<const T*>(params.source) + tap.source + cursor.channel;
#pragma unroll
    for (int i = 0; i < Traits::kALines; ++i) {
      copy_chunk<Traits::kVectors>(a + place + i * Traits::kLineStep * A::kLength,
                                   source + offsets[first_line + i * Traits::kLineStep], count);
    }
    if constexpr (!Traits::kBTurned) {
      const T* from = tap.weight + first_line * tap.line + cursor.channel;
#pragma unroll
      for (int i = 0; i < Traits::kBLines; ++i) {
        const int line = first_line + i * Traits::kLineStep;
        copy_chunk<Traits::kVectors>(b + place + i * Traits::kLineStep * B::kLength, from,
                                     line < width ? count : 0);
        from += Traits::kLineStep * tap.line;
      }
    } else {
      const int column = b_chunk * kVector;
      DepthCursor at = b_cursor;
      Tap b_tap = table[at.tap];
      const int depth = b_tap.depth;
#pragma unroll
      for (int i = 0; i < Traits::kBLines; i += Traits::kLinesOfChunk) {
        const int channel = at.channel + (b_line + i) % kVector;
        const T* from = b_tap.weight + channel * b_tap.line + column;
#pragma unroll
        for (int j = 0; j < Traits::kLinesOfChunk; ++j) {
          copy_chunk<Traits::kVectors>(b + b_place.of(i + j), from,
                                       channel + j < b_tap.channels ? width - column : 0);
          from += b_tap.line;
        }
        if (i + Traits::kLinesOfChunk < Traits::kBLines) {
          at.advance(table, b_tap.depth, kVector);
          b_tap = table[at.tap];
        }
      }
      b_cursor.advance(table, depth, kDepth);
    }
    cursor.advance(table, tap.depth, kDepth);
  };

  Accumulators<Traits> sums = {};
  multiply_slices<Traits>(slices, reinterpret_cast<T*>(shared), sums, fill);
  gather_epilogue<Traits>(params, *own, shared, sums);
}

}  // namespace dilated
}  // namespace fastseg
