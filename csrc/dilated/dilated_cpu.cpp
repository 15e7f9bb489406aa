// Dense convolution on the CPU: checks, allocation, the plan of a call, threads, registration. The
// kernels are in dilated_cpu_kernels.h.

#include "csrc/dilated/dilated_cpu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "csrc/common/conv_shape.h"
#include "csrc/common/simd.h"
#include "csrc/common/torch_conv.h"
#include "csrc/common/torch_cpu.h"
#include "csrc/dilated/dilated_cpu_plan.h"
#include "csrc/dilated/winograd_cpu.h"
#include "csrc/dilated/winograd_cpu_plan.h"

#define FASTSEG_KERNELS "csrc/dilated/dilated_cpu_kernels.h"
#include "csrc/common/for_each_simd.h"

namespace fastseg {
namespace {

using dilated_cpu::Branch;
using dilated_cpu::Call;
using dilated_cpu::Epilogue;
using dilated_cpu::Filter;
using dilated_cpu::Image;
using dilated_cpu::Part;
using dilated_cpu::ShiftCall;
using dilated_cpu::Step;
using dilated_cpu::Steps;
using dilated_cpu::TargetClass;
using dilated_cpu::WeightCall;
using dilated_cpu::WeightTask;

struct Kernels {
  void (*run_part)(const Call&, const Part&, char*);
  int64_t (*scratch_bytes)(const Call&);
  void (*run_weight_task)(const WeightCall&, const WeightTask&, char*);
  int64_t weight_scratch_bytes;
  void (*run_shift)(const ShiftCall&, int64_t, int64_t, char*);
  void (*to_channels_last)(const void*, int64_t, int64_t, int64_t, int64_t, void*);
  int64_t tile_rows, panel_columns, max_depth;
  int64_t item;  // bytes of an element
};

// clang-format off: one line for each thing
#define FASTSEG_KERNELS_OF(simd, bytes)                           \
  {simd::run_part<S>, simd::scratch_bytes<S>,              \
   simd::run_weight_task<S>, simd::kWeightScratchBytes<T>, \
   simd::run_shift<T>,                                     \
   simd::to_channels_last<S>,                              \
   simd::kTileRows, simd::kPanelColumns<T>, simd::kMaxDepth<T>, \
   sizeof(S)}
// clang-format on

template <class S>
Kernels kernels_of() {
  using T = typename Accumulator<S>::type;
  FASTSEG_RETURN_BEST(FASTSEG_KERNELS_OF);
}

#undef FASTSEG_KERNELS_OF

Kernels kernels_for(at::ScalarType type) {
  return with_storage(type, [](auto element) { return kernels_of<decltype(element)>(); });
}

// A size-1 dimension may claim any stride, and is as good as adjacent.
int64_t stride_or_one(const at::Tensor& tensor, int64_t dim) {
  return tensor.size(dim) == 1 ? 1 : tensor.stride(dim);
}

Image image_of(const at::Tensor& tensor) {  // [N, C, H, W]
  return {const_cast<void*>(tensor.const_data_ptr()), stride_or_one(tensor, 0),
          stride_or_one(tensor, 1), stride_or_one(tensor, 2), stride_or_one(tensor, 3)};
}

// Of a weight [K, C, R, S] with its channels adjacent.
Filter filter_of(const at::Tensor& weight) {
  return {const_cast<void*>(weight.const_data_ptr()), weight.stride(0), weight.stride(2),
          weight.stride(3)};
}

// [N][rows][columns] -> [N][columns][rows], `block` columns at a time. Our own threads take a
// fraction of the time of ATen's copy.
void transpose_into(const at::Tensor& from, const at::Tensor& to, int64_t N, int64_t rows,
                    int64_t columns, int64_t block, const Kernels& kernels) {
  const int64_t blocks = ceil_div(columns, block),
                grain = (1 << 16) / (rows * std::min(columns, block));
  const auto* source = static_cast<const char*>(from.const_data_ptr());
  auto* target = static_cast<char*>(to.mutable_data_ptr());
  at::parallel_for(0, N * blocks, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / blocks * rows * columns * kernels.item;
      const int64_t first = i % blocks * block;
      kernels.to_channels_last(source + image, columns, first, std::min(first + block, columns),
                               rows, target + image);
    }
  });
}

// `tensor` [N, C, H, W], or a weight, with its channels adjacent: a copy, unless it is
// channels_last already or has one pixel (one tap).
at::Tensor with_adjacent_channels(const at::Tensor& tensor, const Kernels& kernels) {
  const int64_t N = tensor.size(0), C = tensor.size(1), pixels = tensor.size(2) * tensor.size(3);
  if (stride_or_one(tensor, 1) == 1) return tensor;
  // A weight's planes fill no vector: there ATen's copy is the faster one.
  constexpr int64_t kFewPixels = 16, kBlock = 256;
  if (!tensor.is_contiguous() || pixels < kFewPixels) {
    return tensor.contiguous(at::MemoryFormat::ChannelsLast);
  }
  const at::Tensor copy =
      at::empty(tensor.sizes(), tensor.options().memory_format(at::MemoryFormat::ChannelsLast));
  transpose_into(tensor, copy, N, C, pixels, kBlock, kernels);
  return copy;
}

// The reverse: `pixels` is channels_last.
void copy_from_channels_last(const at::Tensor& pixels, const at::Tensor& target,
                             const Kernels& kernels) {
  constexpr int64_t kBlock = 64;
  if (!target.is_contiguous()) {
    target.copy_(pixels);
  } else {
    transpose_into(pixels, target, target.size(0), target.size(2) * target.size(3), target.size(1),
                   kBlock, kernels);
  }
}

ConvShape dense_shape(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation) {
  const ConvShape shape = conv_shape(input, weight, stride, padding, dilation);
  TORCH_CHECK(shape.C > 0 && shape.K > 0 && shape.R > 0 && shape.S > 0 && weight.size(1) == shape.C,
              "fastseg: expected weight [K, C, R, S] for input [N, C, H, W], but got weight ",
              weight.sizes(), " and input ", input.sizes());
  TORCH_CHECK(input.device().is_cpu(), "fastseg: expected CPU tensors, but got ", input.device());
  return shape;
}

// Whether the pixels of all images follow each other at equal distances.
bool is_one_row(const Image& image, int64_t N, int64_t H, int64_t W) {
  return (H == 1 || image.h == W * image.w) && (N == 1 || image.n == H * W * image.w);
}

// One class of the targets, sums over `channels` channels of the sources; with `adds` they start
// from what the targets hold.
void run_class(TargetClass cls, int64_t images, int64_t channels, int64_t columns,
               const Kernels& kernels, Call call, bool adds = false) {
  const int64_t taps = static_cast<int64_t>(cls.taps.size());
  if (taps == 1 && dilated_cpu::is_identity(cls) && is_one_row(call.source, images, cls.P, cls.Q) &&
      is_one_row(call.target, images, cls.P, cls.Q)) {
    cls = dilated_cpu::flattened(cls, images);
    images = 1;
  }
  Steps found = dilated_cpu::cut_steps(cls, channels, kernels.max_depth);
  call.P = cls.P, call.Q = cls.Q;
  call.step_h = cls.step_h, call.step_w = cls.step_w;
  call.target.h *= cls.row_period, call.target.w *= cls.column_period;
  if (adds) {
    for (Step& step : found.steps) step.starts = false;
  } else if (found.steps.size() > 1 && columns < call.target.w &&
             call.target.w * kernels.item % 4096 == 0) {
    // A slice of pixels that are whole pages apart has a few sets of every cache to itself: sums
    // would drive each other out.
    call.direct = false;
  }
  call.clears = !found.start_all && !adds;
  call.finishes_last = !call.direct || (!found.finish_all && call.finishes());
  call.blocks = found.blocks.data(), call.steps = found.steps.data();
  call.step_count = static_cast<int64_t>(found.steps.size());
  for (const Step& step : found.steps) call.depth = std::max(call.depth, step.depth);
  // Panels fill half of a second-level cache. What the steps read and write at a block of pixels
  // should stay in the last-level one, but a block has to be worth packing the filter for it.
  constexpr int64_t kPanelElements = 1 << 17, kBlockElements = 1 << 19, kBlockWork = 1 << 11;
  const int64_t depth = std::max<int64_t>(1, call.depth);
  call.block_columns = std::min(round_up(columns, kernels.panel_columns),
                                round_up(kPanelElements / depth, kernels.panel_columns));
  const int64_t targets = images * cls.P * cls.Q;
  call.block_pixels = targets;
  if (call.step_count > 1 || !call.direct) {
    const int64_t pixels = kBlockElements / (depth + call.block_columns);
    call.block_pixels = std::min(targets, std::max(pixels, kBlockWork));
  }

  const int64_t threads = threads_for(targets * columns * channels * taps);
  const std::vector<Part> parts = dilated_cpu::cut_parts(cls, images, channels, columns, threads,
                                                         kernels.tile_rows, kernels.panel_columns);
  const int64_t scratch_bytes = kernels.scratch_bytes(call);
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.run_part(call, parts[i], thread_scratch(scratch_bytes));
    }
  });
}

// The sum of all branches by one product with all taps of all of them at once: see ShiftCall.
void run_few_outputs(const std::vector<Branch>& branches, const at::Tensor& x,
                     const Kernels& kernels, const Call& call) {
  const ConvShape& shape = branches.front().shape;
  std::vector<at::Tensor> filters;
  std::vector<dilated_cpu::LiveTap> taps;
  int64_t first = 0;  // of a branch's taps among all
  for (const Branch& branch : branches) {
    const int64_t S = branch.shape.S, count = branch.shape.R * S;
    filters.push_back(
        branch.weight.permute({2, 3, 0, 1}).reshape({count * shape.K, shape.C, 1, 1}));
    const TargetClass cls = dilated_cpu::target_classes(output_axes(branch.shape)).front();
    for (dilated_cpu::LiveTap tap : cls.taps) {
      tap.r = first + tap.r * S + tap.s, tap.s = 0;
      taps.push_back(tap);
    }
    first += count;
  }
  const at::Tensor filter = filters.size() == 1 ? filters.front() : at::cat(filters);
  const at::Tensor z = at::empty({shape.N, filter.size(0), shape.H, shape.W},
                                 x.options().memory_format(at::MemoryFormat::ChannelsLast));
  ConvShape pointwise = shape;
  pointwise.K = filter.size(0), pointwise.P = shape.H, pointwise.Q = shape.W;
  pointwise.R = pointwise.S = 1;
  pointwise.stride_h = pointwise.stride_w = 1;
  pointwise.pad_top = pointwise.pad_left = 0;
  Call product{};
  product.source = image_of(x), product.target = image_of(z);
  product.weight = filter_of(filter);
  product.direct = true;
  run_class(dilated_cpu::target_classes(output_axes(pointwise)).front(), shape.N, shape.C,
            pointwise.K, kernels, product);

  ShiftCall shift{};
  shift.P = shape.P, shift.Q = shape.Q, shift.K = shape.K, shift.S = 1;
  shift.step_h = shape.stride_h, shift.step_w = shape.stride_w;
  shift.z = z.const_data_ptr();
  shift.z_n = z.stride(0), shift.z_h = z.stride(2), shift.z_w = z.stride(3);
  shift.target = call.target;
  shift.scale = call.scale, shift.bias = call.bias, shift.activation = call.activation;
  shift.taps = taps.data(), shift.tap_count = static_cast<int64_t>(taps.size());
  const int64_t row_bytes = shape.Q * shape.K * x.element_size();
  at::parallel_for(0, shape.N * shape.P, std::max<int64_t>(1, (1 << 19) / (9 * row_bytes)),
                   [&](int64_t begin, int64_t end) {
                     kernels.run_shift(shift, begin, end, thread_scratch(row_bytes));
                   });
}

// A call that leaves `epilogue` of its sums in y.
Call call_into(const at::Tensor& y, const Epilogue& epilogue) {
  Call call{};
  call.target = image_of(y);
  call.scale = epilogue.scale.defined() ? epilogue.scale.const_data_ptr() : nullptr;
  call.bias = epilogue.bias.defined() ? epilogue.bias.const_data_ptr() : nullptr;
  call.activation = epilogue.activation;
  call.direct = call.target.c == 1 && y.scalar_type() == accumulation_type(y.scalar_type());
  return call;
}

bool shift_pays(const Branch& branch, const at::Tensor& y, const Kernels& kernels) {
  return y.scalar_type() == accumulation_type(y.scalar_type()) &&
         dilated_cpu::shift_pays(branch.shape,
                                 dilated_cpu::target_classes(output_axes(branch.shape)).front(),
                                 kernels.panel_columns);
}

// Whether the convolution of x into y was done by Winograd's algorithm: if that is faster, and all
// results are finite. `shape` is winograd::turned() for a gradient.
bool by_winograd(const ConvShape& shape, const at::Tensor& weight, bool is_turned,
                 const at::Tensor& x, const Epilogue& epilogue, bool adds, const at::Tensor& y,
                 const Kernels& kernels) {
  const bool finishes = epilogue.scale.defined() || epilogue.bias.defined() ||
                        epilogue.activation != Activation::kNone;
  if (x.scalar_type() != at::kFloat || y.scalar_type() != at::kFloat || (adds && finishes)) {
    return false;
  }
  const std::optional<winograd::Forms> forms = winograd::forms_that_pay(shape);
  if (!forms) return false;
  const bool in_place = !adds && stride_or_one(y, 1) == 1;
  const at::Tensor result =
      in_place ? y
               : at::empty(y.sizes(), y.options().memory_format(at::MemoryFormat::ChannelsLast));
  const at::Tensor source = with_adjacent_channels(x, kernels);
  if (!winograd::convolve_into(shape, *forms, weight, is_turned, source, epilogue, result)) {
    return false;
  }
  if (adds) {
    y.add_(result);
  } else if (!in_place) {
    copy_from_channels_last(result, y, kernels);
  }
  return true;
}

}  // namespace

namespace dilated_cpu {

at::Tensor per_channel(const std::optional<at::Tensor>& tensor, const char* name, int64_t K,
                       at::ScalarType type) {
  if (!tensor) return {};
  TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == K && tensor->device().is_cpu(),
              "fastseg: expected ", name, " [", K, "] on the CPU, but got ", tensor->sizes(),
              " on ", tensor->device());
  return tensor->to(type).contiguous();
}

at::Tensor with_adjacent_channels(const at::Tensor& tensor) {
  return fastseg::with_adjacent_channels(tensor, kernels_for(tensor.scalar_type()));
}

void forward_into(const Branch& branch, const at::Tensor& x, const Epilogue& epilogue, bool adds,
                  const at::Tensor& y) {
  const ConvShape& shape = branch.shape;
  const Kernels kernels = kernels_for(x.scalar_type());
  Call call = call_into(y, epilogue);
  if (!adds && fastseg::shift_pays(branch, y, kernels)) {
    run_few_outputs({branch}, x, kernels, call);
    return;
  }
  if (by_winograd(shape, branch.weight, false, x, epilogue, adds, y, kernels)) return;
  const at::Tensor w = fastseg::with_adjacent_channels(branch.weight, kernels);
  // With one tap, inputs are read once, and transposed on the way.
  const at::Tensor source =
      shape.R * shape.S == 1 ? x : fastseg::with_adjacent_channels(x, kernels);
  call.source = image_of(source), call.weight = filter_of(w);
  run_class(target_classes(output_axes(shape)).front(), shape.N, shape.C, shape.K, kernels, call,
            adds);
}

void forward_sum_into(const std::vector<Branch>& branches, const at::Tensor& x,
                      const Epilogue& epilogue, const at::Tensor& y) {
  const Kernels kernels = kernels_for(x.scalar_type());
  const bool shifts = std::all_of(branches.begin(), branches.end(), [&](const Branch& branch) {
    return fastseg::shift_pays(branch, y, kernels);
  });
  if (shifts) {
    run_few_outputs(branches, x, kernels, call_into(y, epilogue));
    return;
  }
  for (size_t i = 0; i < branches.size(); ++i) {
    forward_into(branches[i], x, i + 1 == branches.size() ? epilogue : Epilogue{}, i > 0, y);
  }
}

void grad_input_into(const Branch& branch, const at::Tensor& grad_y, bool adds,
                     const at::Tensor& grad_x) {
  const ConvShape& shape = branch.shape;
  const Kernels kernels = kernels_for(grad_y.scalar_type());
  const at::Tensor gy = fastseg::with_adjacent_channels(grad_y, kernels);
  if (shape.stride_h == 1 && shape.stride_w == 1 &&
      by_winograd(winograd::turned(shape), branch.weight, true, gy, {}, adds, grad_x, kernels)) {
    return;
  }
  const at::Tensor weight = fastseg::with_adjacent_channels(branch.weight, kernels);
  for (const TargetClass& cls : target_classes(input_axes(shape))) {
    Call call = call_into(grad_x, {});
    call.source = image_of(gy), call.weight = filter_of(weight);
    call.turned = true;
    call.target.data = static_cast<char*>(call.target.data) +
                       (cls.row * call.target.h + cls.column * call.target.w) * gy.element_size();
    run_class(cls, shape.N, shape.K, shape.C, kernels, call, adds);
  }
}

at::Tensor grad_weight(const ConvShape& shape, const at::Tensor& grad_y, const at::Tensor& input) {
  const Kernels kernels = kernels_for(input.scalar_type());
  const at::Tensor gy = fastseg::with_adjacent_channels(grad_y, kernels);
  const at::Tensor x = fastseg::with_adjacent_channels(input, kernels);
  if (x.scalar_type() == at::kFloat) {
    if (const std::optional<winograd::Forms> forms = winograd::forms_that_pay(shape)) {
      const at::Tensor grad = winograd::grad_weight(shape, *forms, gy, x);
      if (grad.defined()) return grad;
    }
  }
  const TargetClass cls = target_classes(output_axes(shape)).front();
  const int64_t splits = weight_splits(cls.taps, shape.N, shape.K, shape.C);
  const std::vector<WeightTask> tasks =
      cut_weight_tasks(cls.taps, shape.N, shape.K, shape.C, splits);
  const int64_t all_taps = shape.R * shape.S;
  const bool dead = static_cast<int64_t>(cls.taps.size()) < all_taps;
  const std::array<int64_t, 5> sizes = {splits, shape.K, shape.R, shape.S, shape.C};
  const auto options =
      x.options().dtype(accumulation_type(x.scalar_type())).memory_format(std::nullopt);
  const at::Tensor sums = dead ? at::zeros(sizes, options) : at::empty(sizes, options);
  WeightCall call{};
  call.step_h = shape.stride_h, call.step_w = shape.stride_w;
  call.x = image_of(x), call.grad_y = image_of(gy);
  call.sums = {sums.mutable_data_ptr(), sums.stride(1), sums.stride(2), sums.stride(3)};
  call.sums_split = sums.stride(0);
  call.taps = cls.taps.data();
  run_tasks(static_cast<int64_t>(tasks.size()),
            threads_for(gy.numel() * shape.C * static_cast<int64_t>(cls.taps.size())),
            [&](int64_t i) {
              kernels.run_weight_task(call, tasks[i], thread_scratch(kernels.weight_scratch_bytes));
            });
  at::Tensor sum = sums[0];
  for (int64_t split = 1; split < splits; ++split) sum.add_(sums[split]);
  return sum.permute({0, 3, 1, 2});
}

}  // namespace dilated_cpu

namespace {

at::Tensor dilated_conv2d_cpu(const at::Tensor& input,                // [N, C, H, W]
                              const at::Tensor& weight,               // [K, C, R, S]
                              const std::optional<at::Tensor>& bias,  // [K] or [N, K]
                              at::IntArrayRef stride, at::IntArrayRef padding,
                              at::IntArrayRef dilation, std::string_view activation,
                              const std::optional<at::Tensor>& scale) {  // [K]
  Branch branch{dense_shape(input, weight, stride, padding, dilation), weight};
  ConvShape& shape = branch.shape;
  const at::ScalarType wide = accumulation_type(input.scalar_type());
  const bool bias_of_images = bias && bias->dim() == 2;
  TORCH_CHECK(!bias_of_images || bias->size(0) == shape.N,
              "fastseg: expected bias [K] or [N, K] for ", shape.N, " images, but got ",
              bias->sizes());
  Epilogue epilogue;
  epilogue.scale = dilated_cpu::per_channel(scale, "scale", shape.K, wide);
  epilogue.activation = parse_activation(activation);
  const at::Tensor output =
      at::empty({shape.N, shape.K, shape.P, shape.Q},
                input.options().memory_format(conv_memory_format(input, weight)));
  if (output.numel() == 0) return output;
  if (!bias_of_images) {
    epilogue.bias = dilated_cpu::per_channel(bias, "bias", shape.K, wide);
    dilated_cpu::forward_into(branch, input, epilogue, false, output);
    return output;
  }
  const int64_t images = shape.N;
  shape.N = 1;
  for (int64_t n = 0; n < images; ++n) {
    epilogue.bias = dilated_cpu::per_channel((*bias)[n], "bias", shape.K, wide);
    dilated_cpu::forward_into(branch, input.narrow(0, n, 1), epilogue, false,
                              output.narrow(0, n, 1));
  }
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dilated_conv2d_backward_cpu(
    const at::Tensor& grad_output,  // [N, K, P, Q]
    const at::Tensor& input,        // [N, C, H, W]
    const at::Tensor& weight,       // [K, C, R, S]
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    std::array<bool, 3> output_mask) {
  const ConvShape shape = dense_shape(input, weight, stride, padding, dilation);
  auto [grad_input, grad_weight, grad_bias] = empty_gradients(
      shape, grad_output, input, weight, output_mask[0], output_mask[1], output_mask[2]);
  if (output_mask[2]) at::sum_out(grad_bias, grad_output, {0, 2, 3});
  if (input.numel() == 0) {
    if (output_mask[1]) grad_weight.zero_();
    return {grad_input, grad_weight, grad_bias};
  }
  if (!output_mask[0] && !output_mask[1]) return {grad_input, grad_weight, grad_bias};

  const at::Tensor gy = dilated_cpu::with_adjacent_channels(grad_output);
  if (output_mask[0]) dilated_cpu::grad_input_into({shape, weight}, gy, false, grad_input);
  if (output_mask[1]) grad_weight.copy_(dilated_cpu::grad_weight(shape, gy, input));
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastseg, CPU, library) {
  library.impl("dilated_conv2d.cpu", &dilated_conv2d_cpu);
  library.impl("dilated_conv2d_backward.cpu", &dilated_conv2d_backward_cpu);
}

}  // namespace fastseg
