// Depthwise convolution on the CPU: checks, allocation, the plan of a call, threads, registration.
// The kernels are in depthwise_cpu_kernels.h.

#include "csrc/depthwise/depthwise_cpu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "csrc/common/conv_shape.h"
#include "csrc/common/simd.h"
#include "csrc/common/torch_conv.h"
#include "csrc/common/torch_cpu.h"

#define FASTSEG_KERNELS "csrc/depthwise/depthwise_cpu_kernels.h"
#include "csrc/common/for_each_simd.h"

namespace fastseg {
namespace depthwise_cpu {

Image image_of(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2), tensor.stride(3)};
}

Filter filter_of(const at::Tensor& tensor) {
  void* data = const_cast<void*>(tensor.const_data_ptr());
  if (tensor.dim() == 1) return {data, tensor.stride(0), 0, 0};
  return {data, tensor.stride(0), tensor.stride(2), tensor.stride(3)};
}

ConvShape checked_shape(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation) {
  const ConvShape shape = conv_shape(input, weight, stride, padding, dilation);
  TORCH_CHECK(shape.C > 0 && shape.R > 0 && shape.S > 0 && shape.K > 0 && shape.K % shape.C == 0 &&
                  weight.size(1) == 1,
              "fastseg: expected weight [C * m, 1, R, S] for input [N, C, H, W], but got weight ",
              weight.sizes(), " and input ", input.sizes());
  TORCH_CHECK(input.device().is_cpu(), "fastseg: expected CPU tensors, but got ", input.device());
  return shape;
}

Call forward_call(const ConvShape& shape, const at::Tensor& input, const at::Tensor& weight,
                  const at::Tensor& bias, Activation activation, bool neighbours,
                  int64_t vector_bytes) {
  const int64_t item = input.element_size();
  const bool in_place = input.stride(1) == 1 && neighbours && shape.multiplier() == 1 &&
                        shape.C * std::max<int64_t>(item, 4) >= vector_bytes;
  const bool whole_lines = vector_bytes == 64;
  Call call = plan_forward(shape, item, whole_lines && in_place && pairs_pay(shape), whole_lines);
  call.activation = activation;
  call.source = image_of(input);
  call.weight = filter_of(weight);
  if (bias.defined()) call.bias = filter_of(bias);
  Access access{};
  // Tiles that do not slide load a source many times: from a packed row, if the caches' sets are
  // few.
  const bool slides = !call.runs.empty() || call.dilation_w <= 2;
  const int64_t pixel = input.stride(3) * item;
  access.source = input.stride(1) == 1 && (slides || !aliased(pixel)) &&
                  (item < 4 || !copies_pay(call, pixel, whole_lines));
  access.target = neighbours && call.multiplier == 1;
  if (item < 4 && !(access.source && access.target)) access = {};  // in place all or none
  cut_tasks(vector_bytes / std::max<int64_t>(item, 4), item, access, &call);
  return call;
}

}  // namespace depthwise_cpu

namespace {

using depthwise_cpu::Call;
using depthwise_cpu::filter_of;
using depthwise_cpu::image_of;

using Kernel = void (*)(const Call&, int64_t, int64_t, char*);

struct Kernels {
  int64_t vector_bytes;
  Kernel forward, backward, reduce;
  int64_t (*scratch_bytes)(const Call&);
};

#define FASTSEG_KERNELS_OF(simd, bytes) \
  {bytes, simd::forward<S>, simd::backward<S>, simd::reduce<S>, simd::scratch_bytes<S>}

template <class S>
Kernels kernels_of() {
  FASTSEG_RETURN_BEST(FASTSEG_KERNELS_OF);
}

#undef FASTSEG_KERNELS_OF

Kernels kernels_for(at::ScalarType type) {
  return with_storage(type, [](auto element) { return kernels_of<decltype(element)>(); });
}

// `work` in multiply-adds over all items: a thread is not woken for less than a million of them.
void run(Kernel kernel, const Call& call, int64_t items, int64_t work, int64_t scratch_bytes) {
  const int64_t grain = std::max<int64_t>(1, (items << 20) / std::max<int64_t>(1, work));
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    kernel(call, begin, end, thread_scratch(scratch_bytes));
  });
}

// Whether the targets go past the caches, in whole cache lines: as vectors, or in tiles of several.
// What is half a line at first does harm where a cache holds the line.
bool streams_pay(const Call& call, const at::Tensor& target, bool whole_lines) {
  const auto address = reinterpret_cast<uintptr_t>(target.const_data_ptr());
  const int64_t item = target.element_size();
  const bool lines = call.runs.empty() && call.S == 3 && call.dilation_w <= 2;
  return item >= 4 && call.blocks.front().direct_target &&
         (whole_lines ? call.leaves_core() : lines && call.exceeds_l3()) &&
         (address | static_cast<uintptr_t>(target.size(1) * item)) % 64 == 0;
}

at::Tensor depthwise_conv2d_cpu(const at::Tensor& input,                // [N, C, H, W]
                                const at::Tensor& weight,               // [C * m, 1, R, S]
                                const std::optional<at::Tensor>& bias,  // [C * m]
                                at::IntArrayRef stride, at::IntArrayRef padding,
                                at::IntArrayRef dilation, std::string_view activation) {
  const ConvShape shape = depthwise_cpu::checked_shape(input, weight, stride, padding, dilation);
  const Kernels kernels = kernels_for(input.scalar_type());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == shape.K &&
                        bias->scalar_type() == input.scalar_type() && bias->device().is_cpu()),
              "fastseg: expected bias [", shape.K, "] of dtype ", input.scalar_type(), ", but got ",
              bias->sizes(), " of dtype ", bias->scalar_type());
  const Activation chosen = parse_activation(activation);
  const at::Tensor output =
      at::empty({shape.N, shape.K, shape.P, shape.Q},
                input.options().memory_format(conv_memory_format(input, weight)));
  if (output.numel() == 0) return output;

  Call call = depthwise_cpu::forward_call(shape, input, weight, bias.value_or(at::Tensor()), chosen,
                                          output.stride(1) == 1, kernels.vector_bytes);
  call.target = image_of(output);
  call.streams = streams_pay(call, output, kernels.vector_bytes == 64);
  run(kernels.forward, call, call.tasks(), output.numel() * (shape.R * shape.S + 4),
      kernels.scratch_bytes(call));
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> depthwise_conv2d_backward_cpu(
    const at::Tensor& grad_output,  // [N, C * m, P, Q]
    const at::Tensor& input,        // [N, C, H, W]
    const at::Tensor& weight,       // [C * m, 1, R, S]
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    std::array<bool, 3> output_mask) {
  const ConvShape shape = depthwise_cpu::checked_shape(input, weight, stride, padding, dilation);
  const Kernels kernels = kernels_for(input.scalar_type());
  auto [grad_input, grad_weight, grad_bias] = empty_gradients(
      shape, grad_output, input, weight, output_mask[0], output_mask[1], output_mask[2]);
  if (input.numel() == 0) {
    if (output_mask[1]) grad_weight.zero_();
    if (output_mask[2]) at::sum_out(grad_bias, grad_output, {0, 2, 3});
    return {grad_input, grad_weight, grad_bias};
  }

  const int64_t item = input.element_size();
  Call call = depthwise_cpu::plan_backward(shape, item);
  call.source = image_of(grad_output);
  call.x = image_of(input);
  call.weight = filter_of(weight);
  call.needs_grad_x = output_mask[0];
  call.needs_grad_weight = output_mask[1];
  call.needs_grad_bias = output_mask[2];
  if (output_mask[0]) call.target = image_of(grad_input);
  if (output_mask[1]) call.grad_weight = filter_of(grad_weight);
  if (output_mask[2]) call.grad_bias = filter_of(grad_bias);
  depthwise_cpu::Access access{};
  const bool whole_lines = kernels.vector_bytes == 64;
  const auto in_place = [&](const at::Tensor& tensor) {
    return tensor.stride(1) == 1 &&
           (item < 4 || !copies_pay(call, tensor.stride(3) * item, whole_lines));
  };
  access.source = in_place(grad_output) && !call.runs.empty();
  access.target = output_mask[0] && grad_input.stride(1) == 1;
  access.x = in_place(input);
  if (item < 4) {  // in place by runs, and all or none
    const bool all = access.source && access.x && (access.target || !output_mask[0]);
    access = {all, all, all};
  }
  depthwise_cpu::cut_tasks(kernels.vector_bytes / std::max<int64_t>(item, 4), item, access, &call);
  call.streams = output_mask[0] && whole_lines && streams_pay(call, grad_input, true);
  at::Tensor partial;
  if (output_mask[1] || output_mask[2]) {
    partial = at::empty({call.tasks() * call.partial_size()},
                        input.options().dtype(accumulation_type(input.scalar_type())));
    call.partial = partial.mutable_data_ptr();
  }

  const int64_t products = (output_mask[0] + output_mask[1]) * shape.R * shape.S;
  run(kernels.backward, call, call.tasks(), grad_output.numel() * (products + 4),
      kernels.scratch_bytes(call));
  if (partial.defined()) {
    run(kernels.reduce, call, call.block_count(), partial.numel(),
        call.partial_size() * partial.element_size());
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastseg, CPU, library) {
  library.impl("depthwise_conv2d.cpu", &depthwise_conv2d_cpu);
  library.impl("depthwise_conv2d_backward.cpu", &depthwise_conv2d_backward_cpu);
}

}  // namespace fastseg
