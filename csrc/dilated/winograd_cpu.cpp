// Winograd's convolution on the CPU: when it pays, memory, threads. The kernels are in
// winograd_cpu_kernels.h.

#include "csrc/dilated/winograd_cpu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "csrc/common/simd.h"
#include "csrc/common/torch_cpu.h"
#include "csrc/dilated/winograd_cpu_plan.h"

#define FASTSEG_KERNELS "csrc/dilated/winograd_cpu_kernels.h"
#include "csrc/common/for_each_simd.h"

namespace fastseg {
namespace winograd {
namespace {

struct Kernels {
  void (*filters)(const Taps&, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
  void (*products)(const Call&, int64_t, int64_t, int64_t, int64_t, const float*, float*, char*);
  bool (*outputs)(const Call&, int64_t, int64_t, const float*);
  int64_t (*scratch_bytes)(int64_t);
  int64_t (*sums_size)(int64_t, int64_t);
  int64_t (*filters_size)(int64_t);
  void (*panels)(const Call&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
  void (*grads)(const Call&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
  void (*weight_products)(int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*,
                          int64_t, bool, char*);
  bool (*weights)(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
  int64_t (*panels_plane)(int64_t, int64_t);
  int64_t (*grads_plane)(int64_t, int64_t);
  int64_t weight_scratch_bytes;
  int64_t tile_rows, lanes;
};

// clang-format off: one line for each thing
#define FASTSEG_KERNELS_OF(simd, bytes)                                            \
  {simd::winograd_filters, simd::winograd_products, simd::winograd_outputs,   \
   simd::winograd_scratch_bytes, simd::winograd_sums_size, simd::winograd_filters_size, \
   simd::winograd_panels, simd::winograd_grads, simd::winograd_weight_products, \
   simd::winograd_weights, simd::winograd_panels_plane, simd::winograd_grads_plane, \
   simd::kWinogradWeightScratchBytes, simd::kTileRows, simd::kLanes<float>}
// clang-format on

Kernels kernels() { FASTSEG_RETURN_BEST(FASTSEG_KERNELS_OF); }

#undef FASTSEG_KERNELS_OF

struct Starts {
  std::vector<int64_t> rows, columns;

  explicit Starts(const ConvShape& shape)
      : rows(tile_starts(shape.P, shape.dilation_h)),
        columns(tile_starts(shape.Q, shape.dilation_w)) {}
};

// Of a tensor with adjacent channels.
dilated_cpu::Image image_of(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), 1, tensor.stride(2),
          tensor.stride(3)};
}

Call call_of(const ConvShape& shape, const Starts& starts, const at::Tensor& x,
             const at::Tensor& y) {
  Call call{};
  call.N = shape.N, call.H = shape.H, call.W = shape.W, call.channels = shape.C;
  call.P = shape.P, call.Q = shape.Q, call.columns = shape.K;
  call.pad_top = shape.pad_top, call.pad_left = shape.pad_left;
  call.dilation_h = shape.dilation_h, call.dilation_w = shape.dilation_w;
  call.source = image_of(x), call.target = image_of(y);
  call.row_starts = starts.rows.data(), call.column_starts = starts.columns.data();
  call.row_count = static_cast<int64_t>(starts.rows.size());
  call.column_count = static_cast<int64_t>(starts.columns.size());
  return call;
}

// Memory that the calling thread keeps between calls, and shares with others during one: up to 21
// MB.
float* shared_scratch(int64_t elements) {
  struct Shared {};
  return reinterpret_cast<float*>(
      thread_scratch<Shared>(elements * static_cast<int64_t>(sizeof(float))));
}

// Whether all results are finite.
bool convolve(const Call& call, const Taps& taps) {
  const Kernels found = kernels();
  // Blocks of equal size, as many for each thread, and worth reading the filter for.
  const int64_t threads =
      std::min(threads_for(call.tiles() * kElements * call.channels * call.columns),
               ceil_div(call.tiles(), found.tile_rows));
  const int64_t most = std::max(kMaxTiles, kSums / (kElements * call.columns));
  const int64_t passes = ceil_div(call.tiles(), most);
  const int64_t at_once = round_up(ceil_div(ceil_div(call.tiles(), passes), kMaxTiles), threads);
  const int64_t blocks = at_once * passes;
  const int64_t tiles = ceil_div(call.tiles(), blocks);
  const int64_t sums_size = found.sums_size(tiles, call.columns);
  const int64_t scratch_bytes = found.scratch_bytes(tiles);
  float* filters = shared_scratch(found.filters_size(call.columns) + at_once * sums_size);
  float* sums = filters + found.filters_size(call.columns);
  const auto first_tile = [&](int64_t block) { return call.tiles() * block / blocks; };
  const int64_t vectors = ceil_div(call.columns, found.lanes);
  std::atomic<bool> finite{true};
  for (int64_t first = 0; first < blocks; first += at_once) {
    // task(first tile, end, M) for every block of this pass.
    const auto for_blocks = [&](const auto& task) {
      at::parallel_for(0, at_once, ceil_div(at_once, threads), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          task(first_tile(first + i), first_tile(first + i + 1), sums + i * sums_size);
        }
      });
    };
    for (int64_t channel = 0; channel < call.channels; channel += kDepth) {
      const int64_t depth = std::min(kDepth, call.channels - channel);
      at::parallel_for(0, vectors, ceil_div(vectors, threads), [&](int64_t begin, int64_t end) {
        found.filters(taps, call.columns, channel, depth, begin * found.lanes,
                      std::min(end * found.lanes, call.columns), filters);
      });
      for_blocks([&](int64_t begin, int64_t end, float* own) {
        found.products(call, begin, end, channel, depth, filters, own,
                       thread_scratch(scratch_bytes));
      });
    }
    for_blocks([&](int64_t begin, int64_t end, const float* own) {
      if (!found.outputs(call, begin, end, own)) finite = false;
    });
  }
  return finite;
}

}  // namespace

ConvShape turned(const ConvShape& shape) {
  ConvShape found = shape;
  std::swap(found.C, found.K), std::swap(found.H, found.P), std::swap(found.W, found.Q);
  found.pad_top = 2 * shape.dilation_h - shape.pad_top;
  found.pad_left = 2 * shape.dilation_w - shape.pad_left;
  return found;
}

bool convolve_into(const ConvShape& shape, const at::Tensor& weight, bool is_turned,
                   const at::Tensor& x, const dilated_cpu::Epilogue& epilogue,
                   const at::Tensor& y) {
  const Starts starts(shape);
  const Call whole = call_of(shape, starts, x, y);
  Taps taps{weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1), weight.stride(2),
            weight.stride(3)};
  if (is_turned) {
    taps.data += 2 * (taps.row + taps.tap);
    std::swap(taps.column, taps.channel);
    taps.row = -taps.row, taps.tap = -taps.tap;
  }
  const int64_t slices = ceil_div(shape.K, kMaxColumns);
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t first = shape.K * slice / slices;
    const auto from_first = [&](const at::Tensor& vector) {
      return vector.defined() ? vector.const_data_ptr<float>() + first : nullptr;
    };
    Call call = whole;
    call.columns = shape.K * (slice + 1) / slices - first;
    call.target.data = static_cast<float*>(whole.target.data) + first;
    call.scale = from_first(epilogue.scale), call.bias = from_first(epilogue.bias);
    call.activation = epilogue.activation;
    Taps own = taps;
    own.data += first * taps.column;
    if (!convolve(call, own)) return false;
  }
  return true;
}

at::Tensor grad_weight(const ConvShape& shape, const at::Tensor& grad_y, const at::Tensor& x) {
  const Kernels found = kernels();
  const Starts starts(shape);
  const Call call = call_of(shape, starts, x, grad_y);
  // No sum is one long chain of additions, whose rounding would show.
  constexpr int64_t kShortest = 32;
  const int64_t quarter = std::max(kShortest, ceil_div(call.tiles(), 4));
  const int64_t blocks = ceil_div(call.tiles(), std::min(kWeightTiles, quarter));
  const int64_t tiles = ceil_div(call.tiles(), blocks);
  const int64_t depth = std::min(kWeightChannels, shape.C);
  const int64_t columns = std::min(kWeightColumns, shape.K);
  const int64_t plane = columns * depth;
  float* v = shared_scratch(
      kElements * (found.panels_plane(tiles, depth) + found.grads_plane(tiles, columns) + plane));
  float* grads = v + kElements * found.panels_plane(tiles, depth);
  float* sums = grads + kElements * found.grads_plane(tiles, columns);
  const at::Tensor grad =
      at::empty({shape.K, 3, 3, shape.C}, x.options().memory_format(std::nullopt));
  const int64_t threads = threads_for(call.tiles() * kElements * shape.C * shape.K);
  std::atomic<bool> finite{true};
  for (int64_t c = 0; c < shape.C; c += depth) {
    const int64_t deep = std::min(depth, shape.C - c);
    for (int64_t k = 0; k < shape.K; k += columns) {
      const int64_t wide = std::min(columns, shape.K - k);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = call.tiles() * block / blocks;
        const int64_t count = call.tiles() * (block + 1) / blocks - first;
        at::parallel_for(0, count, ceil_div(count, threads), [&](int64_t begin, int64_t end) {
          found.panels(call, first, count, begin, end, c, deep, v);
          found.grads(call, first, count, begin, end, k, wide, grads);
        });
        run_tasks(kElements * ceil_div(wide, found.tile_rows), threads, [&](int64_t i) {
          found.weight_products(i, count, v, deep, grads, wide, sums, plane, block == 0,
                                thread_scratch(found.weight_scratch_bytes));
        });
      }
      auto* to = grad.mutable_data_ptr<float>() + k * 9 * shape.C + c;
      at::parallel_for(0, wide, ceil_div(wide, threads), [&](int64_t begin, int64_t end) {
        if (!found.weights(sums, plane, deep, begin, end, shape.C, to)) finite = false;
      });
    }
  }
  return finite ? grad.permute({0, 3, 1, 2}) : at::Tensor();
}

}  // namespace winograd
}  // namespace fastseg
