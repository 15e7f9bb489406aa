// Forward and grad_input: targets gather what their live taps see. See dilated.cuh for the product.
//
//   target[n, th, tw, m] = activation(scale[m] * sum + bias[m]),
//   sum = over live taps and source channels d of source[n, sh, sw, d] * weight[tap, d, m]
//
// Rows of the product are the pixels of a rectangle of all images, columns target channels, depth
// the live taps times the source channels, rounded up to whole chunks. Depth is one flat count of
// chunks: a slice may hold the end of one tap and the begin of the next, so that 3 channels and 49
// taps fill their slices as 2048 channels and one tap do.
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

#include "csrc/dilated/dilated.cuh"

namespace fastseg {
namespace dilated {

struct GatherParams {
  Rectangles rectangles;
  int images;
  int channels;      // of the source
  int columns;       // target channels
  int column_tiles;  // of TILE::kColumns each
  const void* source;
  Strides4 source_strides;
  const void* weight;
  int64_t weight_line;  // from column to column (TURNED: from source channel to source channel)
  int64_t weight_row, weight_column;  // from tap to tap
  const void* scale;                  // [columns] or nullptr
  const void* bias;                   // [columns] or nullptr
  bool wide_bias;
  Activation activation;
  bool target_vectors;  // whether 16 bytes of target channels can be stored at once
  void* target;
  Strides4 target_strides;
};

template <typename OPERAND, typename TILE, bool TURNED, bool VECTORS>
struct GatherTraits : ProductTraits<OPERAND, TILE, false, TURNED> {
  using Base = ProductTraits<OPERAND, TILE, false, TURNED>;
  using Base::kVector;

  static constexpr bool kVectors = VECTORS;
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
  // source, and at last in the target, each row's pixel is.
  static constexpr int kOffsetsAt = std::max(Base::kPipelineBytes, kStagedBytes);
  static constexpr int kSharedBytes = kOffsetsAt + TILE::kRows * static_cast<int>(sizeof(int64_t));

  // A multiple of 8, so that all these lines are twisted in the same way.
  static_assert(kLineStep % 8 == 0 && Base::A::kLines % kLineStep == 0);
  static_assert(Base::B::kLines * Base::B::kChunks % TILE::kThreads == 0);
  static_assert(kBLines % kLinesOfChunk == 0 && kVector % kLinesOfChunk == 0);
  static_assert(kOffsetsAt % 16 == 0 && kSharedBytes <= kMostSharedBytes);
};

// A place in the flat depth of a rectangle: a channel of one of its live taps. Behind the last tap
// row is `tap_rows`.
struct DepthCursor {
  int channel, row, column;

  // Channels are counted up to `channels`, a whole number of chunks.
  __device__ __forceinline__ void advance(int elements, int channels, int tap_rows,
                                          int tap_columns) {
    channel += elements;
    while (channel >= channels && row < tap_rows) {
      channel -= channels;
      if (++column == tap_columns) column = 0, ++row;
    }
  }
};

template <typename Traits>
__device__ __forceinline__ void gather_epilogue(const GatherParams& params, const Pixel& first,
                                                int pixels, const SpanParams& rows,
                                                const SpanParams& columns, int first_column,
                                                unsigned char* shared, Accumulators<Traits>& sums) {
  using T = typename Traits::T;
  using Acc = typename Traits::Acc;
  using Unit = Mma<tf32>;
  constexpr int kUnits = Traits::kUnitRows * Traits::kUnitColumns, kVector = Traits::kVector;
  T* const staged = reinterpret_cast<T*>(shared);  // [kRows, kStagedLength]
  int64_t* const offsets = reinterpret_cast<int64_t*>(shared + Traits::kOffsetsAt);  // [kRows]
  const int lane = lane_id(), thread = thread_id_x();

  for (int row = thread; row < Traits::kRows; row += Traits::kThreads) {
    if (row >= pixels) continue;
    const Pixel pixel = pixel_behind(first, row, rows.count, columns.count);
    offsets[row] =
        pixel.image * params.target_strides.n +
        (rows.index + static_cast<int64_t>(rows.period) * pixel.row) * params.target_strides.h +
        (columns.index + static_cast<int64_t>(columns.period) * pixel.column) *
            params.target_strides.w;
  }

  Acc values[kUnits][4];
#pragma unroll
  for (int n = 0; n < Traits::kUnitColumns; ++n) {
    Acc scale[2] = {Acc(1), Acc(1)}, bias[2] = {Acc(0), Acc(0)};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = first_column + warp_column<Traits>() + 8 * n + Unit::d_column(lane, j);
      if (column >= params.columns) continue;
      if (params.scale != nullptr) scale[j] = static_cast<const Acc*>(params.scale)[column];
      if (params.bias != nullptr) {
        bias[j] = params.wide_bias ? static_cast<const Acc*>(params.bias)[column]
                                   : widen(static_cast<const T*>(params.bias)[column]);
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
  activate(params.activation, values);
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

  T* const target = static_cast<T*>(params.target);
  const int width = min(Traits::kColumns, params.columns - first_column);
  if (params.target_vectors) {
    constexpr int kChunks = Traits::kColumns / kVector;
    for (int i = thread; i < pixels * kChunks; i += Traits::kThreads) {
      const int row = i / kChunks, column = i % kChunks * kVector;
      if (column >= width) continue;
      *reinterpret_cast<uint4*>(target + offsets[row] + first_column + column) =
          *reinterpret_cast<const uint4*>(staged + row * Traits::kStagedLength + column);
    }
  } else if (params.target_strides.c == 1) {
    for (int i = thread; i < pixels * Traits::kColumns; i += Traits::kThreads) {
      const int row = i / Traits::kColumns, column = i % Traits::kColumns;
      if (column >= width) continue;
      target[offsets[row] + first_column + column] = staged[row * Traits::kStagedLength + column];
    }
  } else {
    for (int i = thread; i < width * Traits::kRows; i += Traits::kThreads) {
      const int row = i % Traits::kRows, column = i / Traits::kRows;
      if (row >= pixels) continue;
      target[offsets[row] + (first_column + column) * params.target_strides.c] =
          staged[row * Traits::kStagedLength + column];
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, min_blocks<Traits>())
    dilated_gather(const __grid_constant__ GatherParams params) {
  using T = typename Traits::T;
  using A = typename Traits::A;
  using B = typename Traits::B;
  constexpr int kVector = Traits::kVector, kDepth = Traits::kDepth;

  FASTSEG_DYNAMIC_SHARED(shared);
  const int thread = thread_id_x();
  const int block = static_cast<int>(block_id_x());
  const int tile = block / params.column_tiles;
  const int first_column = (block - tile * params.column_tiles) * Traits::kColumns;
  int number = 0;
  while (number + 1 < params.rectangles.count &&
         params.rectangles.entries[number + 1].first_tile <= tile) {
    ++number;
  }
  const Rectangles::Entry& entry = params.rectangles.entries[number];
  const SpanParams& rows = params.rectangles.rows[entry.rows];
  const SpanParams& columns = params.rectangles.columns[entry.columns];

  const int64_t first_pixel = static_cast<int64_t>(tile - entry.first_tile) * Traits::kRows;
  const Pixel first = pixel_at(first_pixel, rows.count, columns.count);
  // Of this tile; the ones behind the last are computed again and not stored.
  const int pixels = static_cast<int>(
      min(static_cast<int64_t>(Traits::kRows),
          static_cast<int64_t>(params.images) * rows.count.divisor * columns.count.divisor -
              first_pixel));

  const int channels = (params.channels + kVector - 1) / kVector * kVector;
  const int slices =
      (rows.taps * columns.taps * (channels / kVector) + A::kChunks - 1) / A::kChunks;

  // ---- What this thread copies of A ----

  const int chunk = thread % A::kChunks, first_line = thread / A::kChunks;
  const int place = A::offset(first_line, chunk);
  int64_t* const offsets = reinterpret_cast<int64_t*>(shared + Traits::kOffsetsAt);  // [kRows]
  for (int row = thread; row < Traits::kRows; row += Traits::kThreads) {
    const Pixel pixel = pixel_behind(first, min(row, pixels - 1), rows.count, columns.count);
    offsets[row] =  // at the first live tap
        pixel.image * params.source_strides.n +
        (rows.source + static_cast<int64_t>(rows.step) * pixel.row) * params.source_strides.h +
        (columns.source + static_cast<int64_t>(columns.step) * pixel.column) *
            params.source_strides.w;
  }
  __syncthreads();
  const int64_t source_row = rows.source_spacing * params.source_strides.h;
  const int64_t source_column = columns.source_spacing * params.source_strides.w;
  DepthCursor cursor{0, 0, 0};
  cursor.advance(chunk * kVector, channels, rows.taps, columns.taps);

  // ---- And of B ----

  const T* const weight = static_cast<const T*>(params.weight) + rows.weight * params.weight_row +
                          columns.weight * params.weight_column;  // the first live tap
  const int64_t weight_row = rows.weight_spacing * params.weight_row;
  const int64_t weight_column = columns.weight_spacing * params.weight_column;
  // Turned: a chunk of columns in kBLines neighbouring lines of depth.
  const int b_chunk = thread % B::kChunks, b_line = thread / B::kChunks * Traits::kBLines;
  const NeighbouringLines<B> b_place(b_line, b_chunk);
  DepthCursor b_cursors[Traits::kBLines / Traits::kLinesOfChunk];
  if constexpr (Traits::kBTurned) {
#pragma unroll
    for (int i = 0; i < Traits::kBLines; i += Traits::kLinesOfChunk) {
      DepthCursor& b_cursor = b_cursors[i / Traits::kLinesOfChunk];
      b_cursor = {0, 0, 0};
      b_cursor.advance((b_line + i) / kVector * kVector, channels, rows.taps, columns.taps);
    }
  }

  const auto fill = [&](T* a, T* b) {
    const bool live = cursor.row < rows.taps;
    const int count = live ? params.channels - cursor.channel : 0;
    const T* const source = static_cast<const T*>(params.source) + cursor.row * source_row +
                            cursor.column * source_column + cursor.channel;
#pragma unroll
    for (int i = 0; i < Traits::kALines; ++i) {
      copy_chunk<Traits::kVectors>(a + place + i * Traits::kLineStep * A::kLength,
                                   source + offsets[first_line + i * Traits::kLineStep], count);
    }
    if constexpr (!Traits::kBTurned) {
      const T* from = weight + (first_column + first_line) * params.weight_line +
                      cursor.row * weight_row + cursor.column * weight_column + cursor.channel;
#pragma unroll
      for (int i = 0; i < Traits::kBLines; ++i) {
        const int line = first_line + i * Traits::kLineStep;
        copy_chunk<Traits::kVectors>(b + place + i * Traits::kLineStep * B::kLength, from,
                                     first_column + line < params.columns ? count : 0);
        from += Traits::kLineStep * params.weight_line;
      }
    } else {
      const int column = first_column + b_chunk * kVector;
#pragma unroll
      for (int i = 0; i < Traits::kBLines; i += Traits::kLinesOfChunk) {
        const DepthCursor& b_cursor = b_cursors[i / Traits::kLinesOfChunk];
        const int channel = b_cursor.channel + (b_line + i) % kVector;
        const int count = b_cursor.row < rows.taps ? params.columns - column : 0;
        const T* from = weight + b_cursor.row * weight_row + b_cursor.column * weight_column +
                        channel * params.weight_line + column;
#pragma unroll
        for (int j = 0; j < Traits::kLinesOfChunk; ++j) {
          copy_chunk<Traits::kVectors>(b + b_place.of(i + j), from,
                                       channel + j < params.channels ? count : 0);
          from += params.weight_line;
        }
      }
#pragma unroll
      for (DepthCursor& b_cursor : b_cursors) {
        b_cursor.advance(kDepth, channels, rows.taps, columns.taps);
      }
    }
    cursor.advance(kDepth, channels, rows.taps, columns.taps);
  };

  Accumulators<Traits> sums = {};
  multiply_slices<Traits>(slices, reinterpret_cast<T*>(shared), sums, fill);
  gather_epilogue<Traits>(params, first, pixels, rows, columns, first_column, shared, sums);
}

// ---- Launch ----

// One direction of a convolution, as the host knows it.
struct Gather {
  DilatedProblem problem;
  Axes axes;
  GatherParams params;  // without `rectangles` and `column_tiles`
  bool vectors;         // whether sources and weight can be copied in chunks
};

// Wide tiles exist where operands come in chunks, thin ones too; small ones also where they do not.
template <typename OPERAND, bool VECTORS>
struct TilesOf {
  using type = TileList<Tile128x256, Tile128x128, Tile128x64, Tile128x32, Tile64x64, Tile32x32>;
};
template <typename OPERAND>
struct TilesOf<OPERAND, false> {
  using type = TileList<Tile64x64, Tile32x32>;
};
template <>
struct TilesOf<tf32, true> {
  using type = TileList<Tile128x128, Tile128x64, Tile128x32, Tile64x64, Tile32x32>;
};
template <>
struct TilesOf<float, true> {
  using type = TileList<Tile128x64SmallWarps, Tile64x64, Tile32x32>;
};
template <>
struct TilesOf<double, true> {
  using type = TileList<Tile64x64, Tile32x32>;
};

template <typename Traits>
void launch_gather_tiles(const Gather& gather, const std::vector<Span>& rows,
                         const std::vector<Span>& columns, cudaStream_t stream) {
  GatherParams params = gather.params;
  params.column_tiles = to_int(ceil_div(params.columns, Traits::kColumns));
  for (size_t i = 0; i < rows.size(); i += kMaxSpans) {
    for (size_t j = 0; j < columns.size(); j += kMaxSpans) {
      params.rectangles = rectangles_of(
          &rows[i], std::min<int64_t>(kMaxSpans, rows.size() - i), &columns[j],
          std::min<int64_t>(kMaxSpans, columns.size() - j), params.images, Traits::kRows);
      launch(dilated_gather<Traits>,
             grid_size(to_int(int64_t{params.rectangles.tiles} * params.column_tiles)),
             dim3(Traits::kThreads), Traits::kSharedBytes, stream, params);
    }
  }
}

template <typename OPERAND, bool TURNED, bool VECTORS, typename... TILES>
void choose_and_launch_gather(TileList<TILES...>, const Gather& gather, cudaStream_t stream) {
  const ConvShape& shape = gather.problem.shape;
  to_int(shape.R * shape.S * (int64_t{gather.params.channels} + kChunkBytes));  // the depth
  const std::vector<Span> rows = spans_of(gather.axes.rows);
  const std::vector<Span> columns = spans_of(gather.axes.columns);
  const auto time = [&](const TileCost& cost) {
    const int64_t column_tiles = ceil_div(gather.params.columns, cost.columns);
    std::vector<Work> works;
    for (const Span& row : rows) {
      for (const Span& column : columns) {
        const int64_t pixels = gather.params.images * row.count * column.count;
        const int64_t taps = static_cast<int64_t>(row.taps.size() * column.taps.size());
        works.push_back(
            {ceil_div(pixels, cost.rows) * column_tiles, taps * gather.params.channels});
      }
    }
    return time_of(works, cost, gather.problem.multiprocessors);
  };
  const int chosen = choose_tile({cost_of<GatherTraits<OPERAND, TILES, TURNED, VECTORS>>()...},
                                 gather.problem, time);
  int number = 0;
  ((number++ == chosen ? launch_gather_tiles<GatherTraits<OPERAND, TILES, TURNED, VECTORS>>(
                             gather, rows, columns, stream)
                       : void()),
   ...);
}

template <typename OPERAND, bool TURNED>
void launch_gather(const Gather& gather, cudaStream_t stream) {
  if (gather.vectors) {
    choose_and_launch_gather<OPERAND, TURNED, true>(typename TilesOf<OPERAND, true>::type(), gather,
                                                    stream);
  } else {
    choose_and_launch_gather<OPERAND, TURNED, false>(typename TilesOf<OPERAND, false>::type(),
                                                     gather, stream);
  }
}

template <bool TURNED>
void launch_gather(const Gather& gather, cudaStream_t stream) {
  if (gather.problem.tf32) return launch_gather<tf32, TURNED>(gather, stream);
  FASTSEG_DTYPE_SWITCH(gather.problem.dtype, T, { launch_gather<T, TURNED>(gather, stream); });
}

}  // namespace dilated
}  // namespace fastseg
