// The segmentation head on the CPU: checks, allocation, threads, registration. The kernels are in
// head_cpu_resize.h, head_cpu_argmax.h and head_cpu_kernels.h.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "csrc/common/simd.h"
#include "csrc/common/torch_cpu.h"
#include "csrc/head/head_cpu_plan.h"

#define FASTSEG_KERNELS "csrc/head/head_cpu_kernels.h"
#include "csrc/common/for_each_simd.h"

namespace fastseg {
namespace {

using head_cpu::Argmax;
using head_cpu::Logits;
using head_cpu::Loss;
using head_cpu::Resize;
using head_cpu::samples_of;
using head_cpu::spread_of;
using head_cpu::Strip;
using head_cpu::Tables;
using head_cpu::taps_of;

// Elements of the large side of a resize that are worth a thread, and of upsampled logits.
constexpr int64_t kGrain = int64_t{1} << 15;
// A resized row that is kept between output rows, and a sum of rows of grad_y, in elements: they
// stay in an L2 cache.
constexpr int64_t kKeptRow = int64_t{1} << 15, kKeptSum = int64_t{1} << 16;
// Targets of that many bytes are written past the caches: they would not stay in them. Larger ones
// come from the kernel as fresh pages, which are in the caches already. Short rows end in too many
// halves of cache lines.
constexpr int64_t kStreamed = int64_t{16} << 20, kFresh = int64_t{32} << 20, kLongRow = 4096;

// Rows or strips [begin, end) of a call, with scratch memory.
template <class Call>
using Run = void (*)(const Call&, int64_t, int64_t, char*);

template <class S, class T>
struct Kernels {
  int64_t vector_bytes, tile_rows;
  Run<Resize<T>> resize, resize_backward_lanes, resize_backward_channels;
  Run<Argmax<T>> argmax;
  Run<Loss<T>> loss, loss_and_gradient;
  int64_t (*resize_scratch)(const Resize<T>&);
  int64_t (*resize_backward_scratch)(const Resize<T>&);
  int64_t (*argmax_scratch)(const Argmax<T>&);
  int64_t (*loss_scratch)(const Loss<T>&);
};

#define FASTSEG_HEAD_KERNELS(simd, bytes)                                                         \
  Kernels<S, T> {                                                                                 \
    bytes, simd::kTileRowsOfHead, simd::resize_rows<S, T>, simd::resize_backward_lanes<S, T>,     \
        simd::resize_backward_channels<S, T>, simd::argmax_strips<S, T>, simd::loss_strips<S, T>, \
        simd::loss_rows<S, T>, simd::resize_scratch_bytes<T>,                                     \
        simd::resize_backward_scratch_bytes<T>, simd::argmax_scratch_bytes<T>,                    \
        simd::loss_scratch_bytes<T>                                                               \
  }

template <class S, class T = typename Accumulator<S>::type>
Kernels<S, T> kernels_of() {
  FASTSEG_RETURN_BEST(FASTSEG_HEAD_KERNELS);
}

#undef FASTSEG_HEAD_KERNELS

// `run` on `tasks` tasks of about `size` elements each.
template <class Call>
void run_parallel(Run<Call> run, const Call& call, int64_t tasks, int64_t size, int64_t scratch) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    run(call, begin, end, thread_scratch(scratch));
  });
}

using Scales = std::optional<at::ArrayRef<double>>;

void check_resize(const at::Tensor& tensor, at::IntArrayRef size, const Scales& scales) {
  TORCH_CHECK(tensor.dim() == 4 && tensor.device().is_cpu(),
              "fastseg: expected a 4-D tensor on the CPU, but got ", tensor.dim(), "-D on ",
              tensor.device());
  TORCH_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0 && tensor.size(1) > 0 &&
                  tensor.size(2) > 0 && tensor.size(3) > 0,
              "Input and output sizes should be greater than 0, but got input ", tensor.sizes(),
              " and output ", size);
  TORCH_CHECK(!scales || (scales->size() == 2 && (*scales)[0] > 0 && (*scales)[1] > 0),
              "fastseg: expected two positive scales");
}

// As fastseg/ops/head/op.py: where both memory formats are one in memory, strides are NCHW's.
at::Tensor empty_resized(const at::Tensor& like, at::IntArrayRef size, at::ScalarType type) {
  const bool same = like.size(1) == 1 || size[0] * size[1] == 1;
  return at::empty({like.size(0), like.size(1), size[0], size[1]},
                   like.options().dtype(type).memory_format(same ? at::MemoryFormat::Contiguous
                                                                 : like.suggest_memory_format()));
}

// `low` and `high` are (height, width).
SampleAxis axis_of(int index, at::IntArrayRef low, at::IntArrayRef high, const Scales& scales,
                   bool align_corners) {
  return sample_axis(low[index], high[index], scales ? (*scales)[index] : 0, align_corners);
}

template <class T>
Resize<T> resize_call(const at::Tensor& source, const at::Tensor& target, at::IntArrayRef low,
                      at::IntArrayRef high, bool channels_last) {
  Resize<T> call{};
  call.images = channels_last ? source.size(0) : source.size(0) * source.size(1);
  call.channels = channels_last ? source.size(1) : 1;
  call.h = low[0], call.w = low[1], call.P = high[0], call.Q = high[1];
  call.source = source.const_data_ptr();
  call.target = target.mutable_data_ptr();
  return call;
}

at::Tensor upsample_bilinear2d_cpu(const at::Tensor& input,  // [N, C, H, W]
                                   at::IntArrayRef size, Scales scales, bool align_corners) {
  check_resize(input, size, scales);
  const at::MemoryFormat format = input.suggest_memory_format();
  const at::Tensor x = input.contiguous(format);
  const at::Tensor y = empty_resized(input, size, input.scalar_type());
  if (y.numel() == 0) return y;
  with_storage(input.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using T = typename Accumulator<S>::type;
    const auto kernels = kernels_of<S>();
    const int64_t lanes = kernels.vector_bytes / sizeof(T);
    const at::IntArrayRef low = input.sizes().slice(2);
    const SampleAxis rows = axis_of(0, low, size, scales, align_corners);
    const SampleAxis columns = axis_of(1, low, size, scales, align_corners);
    Tables tables;
    Resize<T> call = resize_call<T>(x, y, low, size, format == at::MemoryFormat::ChannelsLast);
    call.rows = samples_of<T>(rows, &tables);
    call.columns = samples_of<T>(columns, &tables);
    const int64_t bytes = y.numel() * y.element_size();
    call.direct = call.channels >= lanes && (call.P <= call.h || bytes >= kFresh);
    call.block = call.Q, call.blocks = 1;
    if (call.channels < lanes) {
      call.spread = spread_of<T>(columns, call.columns, call.channels, lanes, &tables);
    } else if (!call.direct) {
      call.block = std::clamp<int64_t>(kKeptRow / call.channels, 1, call.Q);
      call.blocks = (call.Q + call.block - 1) / call.block;
    }
    call.streams = bytes >= kStreamed && bytes < kFresh && call.block * call.channels >= kLongRow;
    run_parallel(kernels.resize, call, call.images * call.blocks * call.P,
                 call.block * call.channels, kernels.resize_scratch(call));
  });
  return y;
}

at::Tensor upsample_bilinear2d_backward_cpu(const at::Tensor& grad_output,  // [N, C, P, Q]
                                            at::IntArrayRef input_size, Scales scales,
                                            bool align_corners) {
  TORCH_CHECK(input_size.size() == 4, "fastseg: expected input_size to have 4 elements, but got ",
              input_size.size());
  const at::IntArrayRef low = input_size.slice(2);
  check_resize(grad_output, low, scales);
  const at::MemoryFormat format = grad_output.suggest_memory_format();
  const at::Tensor grad_y = grad_output.contiguous(format);
  const at::Tensor grad_x = empty_resized(grad_output, low, grad_output.scalar_type());
  if (grad_x.numel() == 0) return grad_x;
  with_storage(grad_y.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using T = typename Accumulator<S>::type;
    const auto kernels = kernels_of<S>();
    const int64_t lanes = kernels.vector_bytes / sizeof(T);
    const at::IntArrayRef high = grad_y.sizes().slice(2);
    const SampleAxis rows = axis_of(0, low, high, scales, align_corners);
    const SampleAxis columns = axis_of(1, low, high, scales, align_corners);
    Tables tables;
    Resize<T> call =
        resize_call<T>(grad_y, grad_x, low, high, format == at::MemoryFormat::ChannelsLast);
    call.row_taps = taps_of<T>(rows, samples_of<T>(rows, &tables), &tables);
    call.column_taps = taps_of<T>(columns, samples_of<T>(columns, &tables), &tables);
    const int64_t gradient_rows = call.images * call.h;
    const int64_t row_size = call.row_taps.most * call.Q * call.channels;
    if (call.channels < lanes) {
      run_parallel(kernels.resize_backward_lanes, call, (gradient_rows + lanes - 1) / lanes,
                   row_size * lanes, kernels.resize_backward_scratch(call));
      return;
    }
    const int64_t blocks = (call.Q * call.channels + kKeptSum - 1) / kKeptSum;
    call.blocks = std::clamp<int64_t>(blocks, 1, call.channels / lanes);
    call.block = (call.channels + call.blocks - 1) / call.blocks;
    run_parallel(kernels.resize_backward_channels, call, gradient_rows * call.blocks,
                 row_size / call.blocks, kernels.resize_backward_scratch(call));
  });
  return grad_x;
}

// Logits as the kernels see them, and the axis of columns.
template <class T>
SampleAxis fill_logits(const at::Tensor& logits, at::IntArrayRef size, bool align_corners,
                       int64_t lanes, int64_t tile_rows, Tables* tables, std::vector<Strip>* strips,
                       Logits<T>* call) {
  const at::IntArrayRef low = logits.sizes().slice(2);
  const SampleAxis rows = axis_of(0, low, size, std::nullopt, align_corners);
  const SampleAxis columns = axis_of(1, low, size, std::nullopt, align_corners);
  call->data = logits.const_data_ptr();
  call->N = logits.size(0), call->C = logits.size(1);
  call->h = low[0], call->w = low[1], call->P = size[0], call->Q = size[1];
  call->stride_n = logits.stride(0), call->stride_c = logits.stride(1);
  call->stride_h = logits.stride(2), call->stride_w = logits.stride(3);
  call->rows = samples_of<T>(rows, tables);
  call->spread = spread_of<T>(columns, samples_of<T>(columns, tables), int64_t{1}, lanes, tables);
  *strips = head_cpu::strips_of<T>(rows, call->rows, tile_rows);
  call->strips = strips->data();
  call->strip_count = static_cast<int64_t>(strips->size());
  return columns;
}

at::Tensor upsample_argmax_cpu(const at::Tensor& logits,  // [N, C, h, w]
                               at::IntArrayRef size, bool align_corners, at::ScalarType dtype) {
  check_resize(logits, size, std::nullopt);
  TORCH_CHECK(dtype == at::kLong || (dtype == at::kByte && logits.size(1) <= 256),
              "fastseg: expected labels in int64, or in uint8 for at most 256 classes, but got ",
              dtype, " for ", logits.size(1), " classes");
  const at::Tensor labels =
      at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(dtype));
  if (labels.numel() == 0) return labels;
  with_storage(logits.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using T = typename Accumulator<S>::type;
    const auto kernels = kernels_of<S>();
    Tables tables;
    std::vector<Strip> strips;
    Argmax<T> call{};
    fill_logits<T>(logits, size, align_corners, kernels.vector_bytes / sizeof(T), kernels.tile_rows,
                   &tables, &strips, &call.logits);
    call.labels = labels.mutable_data_ptr();
    call.bytes = dtype == at::kByte;
    const int64_t tasks = call.logits.N * call.logits.strip_count;
    run_parallel(kernels.argmax, call, tasks, labels.numel() / tasks * call.logits.C,
                 kernels.argmax_scratch(call));
  });
  return labels;
}

struct LossOptions {
  std::optional<at::Tensor> weight;  // [C]
  int64_t ignore_index;
  double label_smoothing;
  bool align_corners;
};

void check_loss(const at::Tensor& logits, const at::Tensor& target, const LossOptions& options) {
  TORCH_CHECK(target.dim() == 3 && target.scalar_type() == at::kLong && target.device().is_cpu(),
              "fastseg: expected an int64 target [N, H, W] on the CPU, but got ", target.sizes(),
              " of dtype ", target.scalar_type());
  check_resize(logits, target.sizes().slice(1), std::nullopt);
  TORCH_CHECK(logits.size(0) == target.size(0),
              "fastseg: expected as many targets as logits, but got ", target.size(0), " and ",
              logits.size(0));
  TORCH_CHECK(
      !options.weight || (options.weight->dim() == 1 && options.weight->size(0) == logits.size(1) &&
                          options.weight->device().is_cpu()),
      "fastseg: expected weight to be [", logits.size(1), "] on the CPU");
}

// Sums of the loss over [N, P, Q], what is not wanted undefined.
struct LossResult {
  at::Tensor losses;    // [N, P, Q]
  at::Tensor gradient;  // [N, C, h, w] of the sum of losses times grad_losses
  double loss, weight;
};

LossResult run_loss(const at::Tensor& logits, const at::Tensor& target, const LossOptions& options,
                    const at::Tensor& grad_losses, bool with_losses, bool with_gradient) {
  const at::ScalarType wide = accumulation_type(logits.scalar_type());
  const at::Tensor y = target.contiguous();
  const int64_t C = logits.size(1);
  const at::Tensor weight = options.weight ? options.weight->to(wide).contiguous()
                                           : at::ones({C}, logits.options().dtype(wide));
  const at::Tensor scale = grad_losses.defined() ? grad_losses.to(wide).contiguous() : grad_losses;
  LossResult result{};
  if (with_losses) result.losses = at::empty(y.sizes(), logits.options().dtype(wide));
  if (with_gradient) result.gradient = empty_resized(logits, logits.sizes().slice(2), wide);
  if (y.numel() == 0) return result;
  const at::Tensor sums = at::empty({2, y.size(0) * y.size(1)}, y.options().dtype(at::kDouble));
  const at::Tensor offenders = at::empty({y.size(0) * y.size(1)}, y.options());
  with_storage(logits.scalar_type(), [&](auto element) {
    using S = decltype(element);
    using T = typename Accumulator<S>::type;
    const auto kernels = kernels_of<S>();
    Tables tables;
    std::vector<Strip> strips;
    Loss<T> call{};
    const SampleAxis columns = fill_logits<T>(logits, y.sizes().slice(1), options.align_corners,
                                              kernels.vector_bytes / sizeof(T), kernels.tile_rows,
                                              &tables, &strips, &call.logits);
    call.target = y.const_data_ptr<int64_t>();
    call.weight = weight.const_data_ptr<T>();
    call.ignore_index = options.ignore_index;
    call.certain = static_cast<T>(1 - options.label_smoothing);
    call.spread = static_cast<T>(options.label_smoothing / static_cast<double>(C));
    double total = 0;
    for (int64_t c = 0; c < C; ++c) total += call.weight[c];
    call.spread_total = static_cast<T>(options.label_smoothing / static_cast<double>(C) * total);
    call.grad_losses = scale.defined() ? scale.const_data_ptr<T>() : nullptr;
    call.losses = with_losses ? result.losses.template mutable_data_ptr<T>() : nullptr;
    call.row_losses = sums.mutable_data_ptr<double>();
    call.row_weights = call.row_losses + sums.size(1);
    call.row_offenders = offenders.mutable_data_ptr<int64_t>();
    const int64_t upsampled = y.numel() * C;
    if (!with_gradient) {
      const int64_t tasks = call.logits.N * call.logits.strip_count;
      run_parallel(kernels.loss, call, tasks, upsampled / tasks, kernels.loss_scratch(call));
      return;
    }
    call.gradient = result.gradient.template mutable_data_ptr<T>();
    call.channels_last = result.gradient.is_contiguous(at::MemoryFormat::ChannelsLast);
    call.column_taps = taps_of<T>(columns, samples_of<T>(columns, &tables), &tables);
    int64_t* first_strip = tables.take<int64_t>(call.logits.h + 1);
    for (int64_t h = 0, i = 0; h <= call.logits.h; ++h) {
      while (i < call.logits.strip_count && strips[i].above < h) ++i;
      first_strip[h] = i;
    }
    call.first_strip = first_strip;
    const int64_t rows = call.logits.N * call.logits.h;
    run_parallel(kernels.loss_and_gradient, call, rows, upsampled / rows,
                 kernels.loss_scratch(call));
  });
  const int64_t rows = sums.size(1);
  const int64_t* found = offenders.const_data_ptr<int64_t>();
  const double* row = sums.const_data_ptr<double>();
  for (int64_t i = 0; i < rows; ++i) {
    TORCH_CHECK_INDEX(found[i] < 0, "Target ",
                      y.const_data_ptr<int64_t>()[i * y.size(2) + found[i]], " is out of bounds.");
    result.loss += row[i];
    result.weight += row[rows + i];
  }
  return result;
}

// loss, sum of the targets' weights, gradient, a target that is no class: see
// fastseg/ops/head/op.py.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> upsample_cross_entropy_cpu(
    const at::Tensor& logits,                 // [N, C, h, w]
    const at::Tensor& target,                 // [N, P, Q]
    const std::optional<at::Tensor>& weight,  // [C]
    int64_t ignore_index, double label_smoothing, bool align_corners, std::string_view reduction,
    bool with_gradient) {
  const LossOptions options{weight, ignore_index, label_smoothing, align_corners};
  check_loss(logits, target, options);
  const bool none = reduction == "none", mean = reduction == "mean";
  TORCH_CHECK(none || mean || reduction == "sum",
              "fastseg: expected reduction to be 'none', 'mean' or 'sum', but got '",
              std::string(reduction), "'");
  const LossResult result = run_loss(logits, target, options, {}, none, with_gradient);
  const auto wide = logits.options().dtype(accumulation_type(logits.scalar_type()));
  const auto scalar = [&](double value) { return at::scalar_tensor(value, wide); };
  return {none ? result.losses : scalar(mean ? result.loss / result.weight : result.loss),
          scalar(result.weight), with_gradient ? result.gradient : at::empty({0}, wide),
          at::scalar_tensor(ignore_index, target.options())};
}

at::Tensor upsample_cross_entropy_backward_cpu(const at::Tensor& grad_losses,  // [N, P, Q]
                                               const at::Tensor& logits,       // [N, C, h, w]
                                               const at::Tensor& target,       // [N, P, Q]
                                               const std::optional<at::Tensor>& weight,  // [C]
                                               int64_t ignore_index, double label_smoothing,
                                               bool align_corners) {
  const LossOptions options{weight, ignore_index, label_smoothing, align_corners};
  check_loss(logits, target, options);
  TORCH_CHECK(grad_losses.sizes() == target.sizes() && grad_losses.device().is_cpu(),
              "fastseg: expected grad_losses ", target.sizes(), " on the CPU, but got ",
              grad_losses.sizes());
  return run_loss(logits, target, options, grad_losses, false, true).gradient;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastseg, CPU, library) {
  library.impl("upsample_bilinear2d.cpu", &upsample_bilinear2d_cpu);
  library.impl("upsample_bilinear2d_backward.cpu", &upsample_bilinear2d_backward_cpu);
  library.impl("upsample_argmax.cpu", &upsample_argmax_cpu);
  library.impl("upsample_cross_entropy.cpu", &upsample_cross_entropy_cpu);
  library.impl("upsample_cross_entropy_backward.cpu", &upsample_cross_entropy_backward_cpu);
}

}  // namespace fastseg
