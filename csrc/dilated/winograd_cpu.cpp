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
  Transforms (*transforms)(const Forms&);
  void (*products)(const Call&, int64_t, int64_t, int64_t, const float*, float*, const char*);
  int64_t (*scratch_bytes)(int64_t, int64_t);
  int64_t (*sums_size)(int64_t, int64_t, int64_t);
  int64_t (*filters_size)(int64_t, int64_t);
  void (*weight_products)(int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*,
                          int64_t, bool);
  int64_t (*panels_plane)(int64_t, int64_t);
  int64_t (*grads_plane)(int64_t, int64_t);
  int64_t panel_columns;
};

// clang-format off: one line for each thing
#define FASTSEG_KERNELS_OF(simd, bytes)                                            \
  {simd::winograd_transforms, simd::winograd_products, simd::winograd_scratch_bytes, \
   simd::winograd_sums_size, simd::winograd_filters_size, simd::winograd_weight_products, \
   simd::winograd_panels_plane, simd::winograd_grads_plane, \
   simd::kPanelColumns<float>}
// clang-format on

Kernels kernels() { FASTSEG_RETURN_BEST(FASTSEG_KERNELS_OF); }

#undef FASTSEG_KERNELS_OF

// How a convolution is cut into tiles.
struct Tiling {
  Forms forms;
  std::vector<int64_t> rows, columns;

  Tiling(const ConvShape& shape, const Forms& found)
      : forms(found),
        rows(tile_starts(forms.rows, shape.P, shape.dilation_h)),
        columns(tile_starts(forms.columns, shape.Q, shape.dilation_w)) {}
};

// Of a tensor with adjacent channels.
dilated_cpu::Image image_of(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), 1, tensor.stride(2),
          tensor.stride(3)};
}

Call call_of(const ConvShape& shape, const Tiling& tiling, const at::Tensor& x,
             const at::Tensor& y) {
  Call call{};
  call.N = shape.N, call.H = shape.H, call.W = shape.W, call.channels = shape.C;
  call.P = shape.P, call.Q = shape.Q, call.columns = shape.K;
  call.pad_top = shape.pad_top, call.pad_left = shape.pad_left;
  call.dilation_h = shape.dilation_h, call.dilation_w = shape.dilation_w;
  call.source = image_of(x), call.target = image_of(y);
  call.elements = tiling.forms.elements();
  call.row_starts = tiling.rows.data(), call.column_starts = tiling.columns.data();
  call.row_count = static_cast<int64_t>(tiling.rows.size());
  call.column_count = static_cast<int64_t>(tiling.columns.size());
  return call;
}

// A share of a range for each of `parts`, in whole `units` but for the last one.
struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};
Range share(int64_t part, int64_t parts, int64_t all, int64_t unit) {
  const int64_t units = ceil_div(all, unit);
  const auto from = [&](int64_t i) { return std::min(all, units * i / parts * unit); };
  return {from(part), from(part + 1)};
}

// How threads share a rectangle: each has a part of both sides.
struct Grid {
  int64_t rows, columns;
};

// That of which a thread's part costs least.
template <class Cost>
Grid best_grid(int64_t threads, int64_t most_rows, int64_t most_columns, const Cost& cost) {
  Grid best = {1, 1};
  for (int64_t columns = 1; columns <= std::min(threads, most_columns); ++columns) {
    const Grid grid = {std::min(threads / columns, most_rows), columns};
    if (cost(grid) < cost(best)) best = grid;
  }
  return best;
}

// task(row, column) for each part of a grid, a thread for each.
template <class Task>
void for_parts(const Grid& grid, const Task& task) {
  at::parallel_for(0, grid.rows * grid.columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i / grid.columns, i % grid.columns);
  });
}

// The outputs of some tiles and all columns of `call`, with `sums_size` elements of M at most;
// whether they are finite.
bool convolve(const Call& call, const Kernels& found, const Transforms& transforms,
              const Taps& taps, Range tiles, int64_t sums_size) {
  const int64_t most = std::max<int64_t>(1, kMaxElements / call.elements);
  const int64_t passes =
      ceil_div(tiles.size(), std::max(most, sums_size / (call.elements * call.columns)));
  const int64_t blocks = ceil_div(ceil_div(tiles.size(), passes), most);  // of a pass
  const int64_t block_size = ceil_div(tiles.size(), passes * blocks);
  const int64_t filters_size = found.filters_size(call.elements, call.columns);
  const int64_t block_sums = found.sums_size(call.elements, block_size, call.columns);
  const int64_t v_bytes = round_up(found.scratch_bytes(call.elements, block_size), 64);
  char* v = thread_scratch(v_bytes + (filters_size + blocks * block_sums) *
                                         static_cast<int64_t>(sizeof(float)));
  float* filters = reinterpret_cast<float*>(v + v_bytes);
  float* sums = filters + filters_size;
  bool finite = true;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const auto block = [&](int64_t i) {
      const Range own = share(pass * blocks + i, passes * blocks, tiles.size(), 1);
      return Range{tiles.begin + own.begin, tiles.begin + own.end};
    };
    for (int64_t channel = 0; channel < call.channels; channel += kDepth) {
      const int64_t depth = std::min(kDepth, call.channels - channel);
      transforms.filters(taps, call.columns, channel, depth, filters);
      for (int64_t i = 0; i < blocks; ++i) {
        const Range own = block(i);
        transforms.inputs(call, own.begin, own.end, channel, depth, v);
        found.products(call, own.size(), channel, depth, filters, sums + i * block_sums, v);
      }
    }
    for (int64_t i = 0; i < blocks; ++i) {
      const Range own = block(i);
      finite = transforms.outputs(call, own.begin, own.end, sums + i * block_sums) && finite;
    }
  }
  return finite;
}

// grad_weight of some channels and columns; whether it is finite.
bool add_up_weights(const Call& call, const Kernels& found, const Transforms& transforms,
                    Range channels, Range columns, float* grad) {
  // No sum is one long chain of additions, whose rounding would show.
  constexpr int64_t kShortest = 32;
  const int64_t quarter = std::max(kShortest, ceil_div(call.tiles(), 4));
  const int64_t blocks = ceil_div(call.tiles(), std::min(kWeightTiles, quarter));
  const int64_t tiles = ceil_div(call.tiles(), blocks);
  const int64_t depth = std::min(kWeightChannels, channels.size());
  const int64_t width = std::min(kWeightColumns, columns.size());
  const int64_t panels_size = call.elements * found.panels_plane(tiles, depth);
  const int64_t grads_size = call.elements * found.grads_plane(tiles, width);
  auto* v = reinterpret_cast<float*>(
      thread_scratch((panels_size + grads_size + call.elements * depth * width) *
                     static_cast<int64_t>(sizeof(float))));
  float* grads = v + panels_size;
  float* sums = grads + grads_size;
  bool finite = true;
  for (int64_t c = channels.begin; c < channels.end; c += depth) {
    const int64_t deep = std::min(depth, channels.end - c);
    for (int64_t k = columns.begin; k < columns.end; k += width) {
      const int64_t wide = std::min(width, columns.end - k);
      for (int64_t i = 0; i < blocks; ++i) {
        const Range own = share(i, blocks, call.tiles(), 1);
        transforms.panels(call, own.begin, own.end, c, deep, v);
        transforms.grads(call, own.begin, own.end, k, wide, grads);
        found.weight_products(call.elements, own.size(), v, deep, grads, wide, sums, deep * wide,
                              i == 0);
      }
      finite = transforms.weights(sums, deep * wide, wide, deep, call.channels,
                                  grad + k * 9 * call.channels + c) &&
               finite;
    }
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

bool convolve_into(const ConvShape& shape, const Forms& forms, const at::Tensor& weight,
                   bool is_turned, const at::Tensor& x, const dilated_cpu::Epilogue& epilogue,
                   const at::Tensor& y) {
  const Tiling tiling(shape, forms);
  const Call whole = call_of(shape, tiling, x, y);
  Taps taps{weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1), weight.stride(2),
            weight.stride(3)};
  if (is_turned) {
    taps.data += 2 * (taps.row + taps.tap);
    std::swap(taps.column, taps.channel);
    taps.row = -taps.row, taps.tap = -taps.tap;
  }
  const Kernels found = kernels();
  const Transforms transforms = found.transforms(forms);
  const int64_t threads = threads_for(whole.tiles() * whole.elements * shape.C * shape.K);
  const Grid grid = best_grid(threads, whole.tiles(), ceil_div(shape.K, found.panel_columns),
                              [&](const Grid& parts) {
                                return cost(forms, ceil_div(whole.tiles(), parts.rows), shape.C,
                                            ceil_div(shape.K, parts.columns));
                              });
  std::atomic<bool> finite{true};
  for_parts(grid, [&](int64_t row, int64_t column) {
    const Range tiles = share(row, grid.rows, whole.tiles(), 1);
    const Range columns = share(column, grid.columns, shape.K, found.panel_columns);
    const int64_t slices = ceil_div(columns.size(), kMaxColumns);
    for (int64_t i = 0; i < slices; ++i) {
      const Range slice = share(i, slices, columns.size(), found.panel_columns);
      const int64_t first = columns.begin + slice.begin;
      const auto from_first = [&](const at::Tensor& vector) {
        return vector.defined() ? vector.const_data_ptr<float>() + first : nullptr;
      };
      Call call = whole;
      call.columns = slice.size();
      call.target.data = static_cast<float*>(whole.target.data) + first;
      call.scale = from_first(epilogue.scale), call.bias = from_first(epilogue.bias);
      call.activation = epilogue.activation;
      Taps own = taps;
      own.data += first * taps.column;
      if (!convolve(call, found, transforms, own, tiles, std::max(kSums / threads, kLeastSums)))
        finite = false;
    }
  });
  return finite;
}

at::Tensor grad_weight(const ConvShape& shape, const Forms& forms, const at::Tensor& grad_y,
                       const at::Tensor& x) {
  const Kernels found = kernels();
  const Tiling tiling(shape, forms);
  const Transforms transforms = found.transforms(forms);
  const Call call = call_of(shape, tiling, x, grad_y);
  const Grid grid =
      best_grid(threads_for(call.tiles() * call.elements * shape.C * shape.K),
                ceil_div(shape.C, found.panel_columns), shape.K, [&](const Grid& parts) {
                  return cost(forms, call.tiles(), ceil_div(shape.C, parts.rows),
                              ceil_div(shape.K, parts.columns));
                });
  const at::Tensor grad =
      at::empty({shape.K, 3, 3, shape.C}, x.options().memory_format(std::nullopt));
  auto* to = grad.mutable_data_ptr<float>();
  std::atomic<bool> finite{true};
  for_parts(grid, [&](int64_t row, int64_t column) {
    const Range channels = share(row, grid.rows, shape.C, found.panel_columns);
    const Range columns = share(column, grid.columns, shape.K, 1);
    if (!add_up_weights(call, found, transforms, channels, columns, to)) finite = false;
  });
  return finite ? grad.permute({0, 3, 1, 2}) : at::Tensor();
}

}  // namespace winograd
}  // namespace fastseg
