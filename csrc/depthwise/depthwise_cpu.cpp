// Depthwise convolution on the CPU: checks, allocation, the plan of a call, threads, registration.
// The kernels are in depthwise_cpu_kernels.h.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <string_view>
#include <tuple>

#include "csrc/common/conv_shape.h"
#include "csrc/common/simd.h"
#include "csrc/common/torch_conv.h"
#include "csrc/depthwise/depthwise_cpu_plan.h"

#if FASTSEG_SIMD_X86
#define FASTSEG_SIMD avx512
#define FASTSEG_SIMD_BYTES 64
FASTSEG_TARGET_AVX512
#include "csrc/depthwise/depthwise_cpu_kernels.h"
FASTSEG_TARGET_END
#undef FASTSEG_SIMD
#undef FASTSEG_SIMD_BYTES

#define FASTSEG_SIMD avx2
#define FASTSEG_SIMD_BYTES 32
FASTSEG_TARGET_AVX2
#include "csrc/depthwise/depthwise_cpu_kernels.h"
FASTSEG_TARGET_END
#undef FASTSEG_SIMD
#undef FASTSEG_SIMD_BYTES
#endif

#define FASTSEG_SIMD plain
#define FASTSEG_SIMD_BYTES 16
#include "csrc/depthwise/depthwise_cpu_kernels.h"
#undef FASTSEG_SIMD
#undef FASTSEG_SIMD_BYTES

namespace fastseg {
namespace {

using depthwise_cpu::Block;
using depthwise_cpu::Call;
using depthwise_cpu::Filter;
using depthwise_cpu::Image;

using Kernel = void (*)(const Call&, int64_t, int64_t, char*);

struct Kernels {
  int64_t vector_bytes;
  Kernel forward, backward, reduce;
  int64_t (*scratch_bytes)(const Call&);
};

template <class S>
Kernels kernels_of() {
#if FASTSEG_SIMD_X86
  if (capability() == Capability::kAvx512) {
    return {64, avx512::forward<S>, avx512::backward<S>, avx512::reduce<S>, avx512::scratch_bytes<S>};
  }
  if (capability() == Capability::kAvx2) {
    return {32, avx2::forward<S>, avx2::backward<S>, avx2::reduce<S>, avx2::scratch_bytes<S>};
  }
#endif
  return {16, plain::forward<S>, plain::backward<S>, plain::reduce<S>, plain::scratch_bytes<S>};
}

Kernels kernels_for(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return kernels_of<float>();
    case at::kDouble:
      return kernels_of<double>();
    case at::kHalf:
      return kernels_of<Half>();
    case at::kBFloat16:
      return kernels_of<BFloat16>();
    default:
      TORCH_CHECK(false, "fastseg: expected float64, float32, float16 or bfloat16, but got ", type);
  }
}

Image image_of(const at::Tensor& t, const void* data) {
  return {const_cast<void*>(data), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Filter filter_of(const at::Tensor& t, const void* data) {
  return {const_cast<void*>(data), t.stride(0), t.stride(2), t.stride(3)};
}

static int64_t env(const char*n,int64_t d){const char*e=getenv(n);return e?atoll(e):d;}

// Cuts the work: blocks of channels, bands of rows.
void cut_tasks(const Kernels& kernels, int64_t item, bool direct_source,
               bool direct_target, Call* call) {
  const int64_t m = call->multiplier, accumulator = std::max<int64_t>(item, 4);
  const int64_t vector = kernels.vector_bytes / accumulator;
  const int64_t width = std::max(call->columns.sources, call->columns.targets);
  const int64_t rows = call->walk.rows;
  const int64_t min_band = std::max<int64_t>(4, 4 * (call->R - 1));
  const int64_t max_bands = std::max<int64_t>(1, rows / min_band);
  const int64_t work = call->N * call->C * m * rows * call->columns.targets * (call->R * call->S + 4);
  const int64_t wanted = std::clamp<int64_t>(work >> 18, 1, 64);
  // Direct: pixels of many channels, as long as the rows in use stay in half of a 1 MiB cache.
  const int64_t whole = call->C / vector * vector;
  int64_t lanes = 128 / item;
  if (direct_source) {
    static int64_t bl=env("BLOCK",0);
    const int64_t cache = (int64_t{512} << 10) / ((call->R + 1) * width * item);
    while (lanes * 2 <= whole && lanes * 2 <= cache && lanes * item < 1024 &&
           call->N * (whole / (lanes * 2)) * max_bands >= wanted) {
      lanes *= 2;
    }
    if(bl) lanes=bl;
  }
  const auto cut = [&](int64_t begin, int64_t end, bool source, bool target) {
    for (int64_t c = begin; c < end; c += lanes) {
      call->blocks.push_back({c, std::min(lanes, end - c), source, target});
    }
  };
  call->blocks.reserve(call->C / lanes + 2);
  if (direct_source || direct_target) {
    cut(0, whole, direct_source, direct_target);
    cut(whole, call->C, false, false);
  } else {
    cut(0, call->C, false, false);
  }
  call->block_lanes = 0;
  for (const Block& block : call->blocks) {
    call->block_lanes = std::max(call->block_lanes, depthwise_cpu::round_up(block.channels, vector));
  }
  call->bands = std::clamp<int64_t>(depthwise_cpu::ceil_div(wanted, std::max<int64_t>(1, call->N * call->block_count())), 1, max_bands);
}

// Memory that a thread keeps between calls.
char* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<char, Free> buffer;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    buffer.reset(static_cast<char*>(std::aligned_alloc(64, depthwise_cpu::round_up(bytes, 64))));
    TORCH_CHECK(buffer != nullptr, "fastseg: could not allocate ", bytes, " bytes of scratch memory");
    size = bytes;
  }
  return buffer.get();
}

void run(const Call& call, Kernel kernel, int64_t scratch_bytes, int64_t items, int64_t work) {
  // A thread is worth waking for about 10 us of work.
  const int64_t grain = std::max<int64_t>(1, (items << 20) / std::max<int64_t>(1, work));
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    kernel(call, begin, end, thread_scratch(scratch_bytes));
  });
}

bool has_runs(const ConvShape& shape, int64_t targets) {
  static int64_t minrun=env("MINRUN",6);
  return shape.S == 3 && shape.R <= 3 && shape.stride_w == 1 && targets >= minrun * shape.dilation_w;
}

at::Tensor depthwise_conv2d_cpu(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, std::string_view activation) {
  const ConvShape shape = conv_shape(input, weight, stride, padding, dilation);
  const Activation act = parse_activation(activation);
  at::Tensor output = at::empty({shape.N, shape.K, shape.P, shape.Q}, input.options().memory_format(conv_memory_format(input, weight)));
  if (output.numel() == 0) return output;

  const Kernels kernels = kernels_for(input.scalar_type());
  Call call{};
  call.N = shape.N;
  call.C = shape.C;
  call.multiplier = shape.multiplier();
  call.R = shape.R;
  call.S = shape.S;
  call.rows = depthwise_cpu::output_axis(shape.H, shape.P, shape.R, shape.stride_h, shape.pad_top, shape.dilation_h);
  call.columns = depthwise_cpu::output_axis(shape.W, shape.Q, shape.S, shape.stride_w, shape.pad_left, shape.dilation_w);
  call.dilation_w = shape.dilation_w;
  call.walk = {shape.P, std::min(shape.P, shape.dilation_h / std::gcd(shape.dilation_h, shape.stride_h))};
  call.source_row_stride = shape.dilation_h;
  call.activation = act;
  call.source = image_of(input, input.const_data_ptr());
  call.target = image_of(output, output.mutable_data_ptr());
  call.weight = filter_of(weight, weight.const_data_ptr());
  if (bias) call.bias = {const_cast<void*>(bias->const_data_ptr()), bias->stride(0), 0, 0};
  if (has_runs(shape, shape.Q)) call.runs = depthwise_cpu::cut_runs(call.columns, shape.dilation_w);
  const int64_t item = input.element_size();
  static int64_t dir=env("DIRECT",1);
  const bool direct_source = input.stride(1) == 1 && ((!call.runs.empty()&&dir)||dir==2);
  const bool direct_target = call.multiplier == 1 && output.stride(1) == 1 && act == Activation::kNone && (direct_source || item >= 4);
  cut_tasks(kernels, item, direct_source, direct_target, &call);
  run(call, kernels.forward, kernels.scratch_bytes(call), call.tasks(), output.numel() * (shape.R * shape.S + 4));
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> depthwise_conv2d_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, std::array<bool, 3> mask) {
  const ConvShape shape = conv_shape(input, weight, stride, padding, dilation);
  at::Tensor grad_input, grad_weight, grad_bias;
  if (mask[0]) grad_input = at::empty({shape.N, shape.C, shape.H, shape.W}, input.options().memory_format(conv_memory_format(input, weight)));
  if (mask[1]) grad_weight = at::empty_like(weight);
  if (mask[2]) grad_bias = at::empty({shape.K}, weight.options());
  const Kernels kernels = kernels_for(input.scalar_type());
  Call call{};
  call.N = shape.N;
  call.C = shape.C;
  call.multiplier = shape.multiplier();
  call.R = shape.R;
  call.S = shape.S;
  call.rows = depthwise_cpu::input_axis(shape.H, shape.P, shape.R, shape.stride_h, shape.pad_top, shape.dilation_h);
  call.columns = depthwise_cpu::input_axis(shape.W, shape.Q, shape.S, shape.stride_w, shape.pad_left, shape.dilation_w);
  call.dilation_w = shape.dilation_w;
  call.walk = {shape.H, std::min(shape.H, shape.dilation_h)};
  call.source_row_stride = shape.dilation_h / std::gcd(shape.dilation_h, shape.stride_h);
  call.source = image_of(grad_output, grad_output.const_data_ptr());
  call.x = image_of(input, input.const_data_ptr());
  call.weight = filter_of(weight, weight.const_data_ptr());
  call.needs_grad_x = mask[0];
  call.needs_grad_weight = mask[1];
  call.needs_grad_bias = mask[2];
  if (mask[0]) call.target = image_of(grad_input, grad_input.mutable_data_ptr());
  if (mask[1]) call.grad_weight = filter_of(grad_weight, grad_weight.mutable_data_ptr());
  if (mask[2]) call.grad_bias = {grad_bias.mutable_data_ptr(), grad_bias.stride(0), 0, 0};
  if (call.multiplier == 1 && has_runs(shape, shape.W)) call.runs = depthwise_cpu::cut_runs(call.columns, shape.dilation_w);
  const int64_t item = input.element_size();
  static int64_t dir=env("DIRECT",1);
  bool direct_source = call.multiplier == 1 && grad_output.stride(1) == 1 && input.stride(1) == 1 && ((!call.runs.empty()&&dir)||dir==2);
  bool direct_target = mask[0] && grad_input.stride(1) == 1;
  if (item < 4) direct_source = direct_target = direct_source && (direct_target || !mask[0]);
  cut_tasks(kernels, item, direct_source, direct_target, &call);
  const bool sums = mask[1] || mask[2];
  at::Tensor partial;
  if (sums) {
    partial = at::empty({call.N * call.bands * call.block_count() * call.partial_size()}, input.options().dtype(item == 8 ? at::kDouble : at::kFloat));
    call.partial = partial.mutable_data_ptr();
  }
  const int64_t work = input.numel() * (shape.R * shape.S * (mask[0] + mask[1]) * call.multiplier + 4);
  run(call, kernels.backward, kernels.scratch_bytes(call), call.tasks(), work);
  if (sums) {
    run(call, kernels.reduce, call.partial_size() * std::max<int64_t>(4, item), call.block_count(), partial.numel());
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastseg, CPU, library) {
  library.impl("depthwise_conv2d.cpu", &depthwise_conv2d_cpu);
  library.impl("depthwise_conv2d_backward.cpu", &depthwise_conv2d_backward_cpu);
}

}  // namespace fastseg
