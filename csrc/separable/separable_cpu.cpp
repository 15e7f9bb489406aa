// Depthwise-separable convolution and the branches of separable ASPP on the CPU: checks,
// allocation, threads, registration. The kernels are in separable_cpu_kernels.h.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "csrc/batch_norm/batch_norm_cpu.h"
#include "csrc/common/conv_shape.h"
#include "csrc/common/simd.h"
#include "csrc/common/torch_conv.h"
#include "csrc/common/torch_cpu.h"
#include "csrc/depthwise/depthwise_cpu.h"
#include "csrc/dilated/dilated_cpu.h"
#include "csrc/separable/separable_cpu_plan.h"

#define FASTSEG_KERNELS "csrc/separable/separable_cpu_kernels.h"
#include "csrc/common/for_each_simd.h"

namespace fastseg {
namespace {

using dilated_cpu::Epilogue;
using separable_cpu::Call;

struct Kernels {
  int64_t vector_bytes, panel_columns;
  void (*pack)(const Call&, int64_t);
  void (*run)(const Call&, int64_t, char*);
  int64_t (*panels)(const Call&);
  int64_t (*scratch_bytes)(const Call&);
};

#define FASTSEG_KERNELS_OF(simd, bytes) \
  {bytes,                               \
   simd::kPanelColumns<T>,              \
   simd::pack_separable<S>,             \
   simd::run_separable<S>,              \
   simd::separable_panels<S>,           \
   simd::separable_scratch_bytes<S>}

template <class S>
Kernels kernels_of() {
  using T = typename Accumulator<S>::type;
  FASTSEG_RETURN_BEST(FASTSEG_KERNELS_OF);
}

#undef FASTSEG_KERNELS_OF

Kernels kernels_for(at::ScalarType type) {
  return with_storage(type, [](auto element) { return kernels_of<decltype(element)>(); });
}

// The depthwise half of a separable convolution.
struct Depthwise {
  ConvShape shape;
  at::Tensor weight;  // [C * m, 1, R, S]
  at::Tensor bias;    // [C * m] or undefined
  Activation activation;
};

// Depthwise filters that contain their scale, in the accumulation type if there is one.
at::Tensor scaled(const at::Tensor& weight, const at::Tensor& scale) {
  return scale.defined() ? weight * scale.view({-1, 1, 1, 1}) : weight;
}

// What one separable convolution needs besides its tensors' memory. `panels` keeps the packed
// pointwise weight.
struct Prepared {
  Call call;
  at::Tensor panels;
};

Prepared prepare(const Depthwise& depthwise, const at::Tensor& x, const at::Tensor& pointwise,
                 const Epilogue& epilogue, const at::Tensor& y, const Kernels& kernels,
                 int64_t threads) {
  const ConvShape& shape = depthwise.shape;
  Prepared found;
  Call& call = found.call;
  call.depthwise = depthwise_cpu::forward_call(shape, x, depthwise.weight, depthwise.bias,
                                               depthwise.activation, true, kernels.vector_bytes);
  call.P = shape.P, call.Q = shape.Q, call.K = pointwise.size(0), call.depth = shape.K;
  call.weight = pointwise.const_data_ptr();
  call.weight_stride = pointwise.stride(0);
  call.target = depthwise_cpu::image_of(y);
  call.direct = y.stride(1) == 1 && y.scalar_type() == accumulation_type(y.scalar_type());
  call.scale = epilogue.scale.defined() ? epilogue.scale.const_data_ptr() : nullptr;
  call.bias = epilogue.bias.defined() ? epilogue.bias.const_data_ptr() : nullptr;
  call.activation = epilogue.activation;
  separable_cpu::cut(x.element_size(), kernels.panel_columns, threads, &call);
  found.panels =
      at::empty({kernels.panels(call)}, x.options().dtype(accumulation_type(x.scalar_type())));
  call.panels = found.panels.mutable_data_ptr();
  return found;
}

// Runs the calls, bands of the same rows next to each other: they read the same part of x.
void run(const std::vector<Prepared>& branches, int64_t images, int64_t products,
         const Kernels& kernels) {
  const int64_t threads = threads_for(products);
  const int64_t count = static_cast<int64_t>(branches.size());
  std::vector<std::pair<int64_t, int64_t>> packs;
  int64_t bands = 0, scratch = 0;
  for (int64_t b = 0; b < count; ++b) {
    const Call& call = branches[b].call;
    for (size_t i = 0; i < call.blocks.size(); ++i) packs.emplace_back(b, i);
    bands = std::max(bands, call.bands);
    scratch = std::max(scratch, kernels.scratch_bytes(call));
  }
  run_tasks(static_cast<int64_t>(packs.size()), threads,
            [&](int64_t i) { kernels.pack(branches[packs[i].first].call, packs[i].second); });
  run_tasks(images * bands * count, threads, [&](int64_t i) {
    const Call& call = branches[i % count].call;
    const int64_t image = i / count / bands, band = i / count % bands;
    if (band < call.bands) kernels.run(call, image * call.bands + band, thread_scratch(scratch));
  });
}

at::Tensor with_adjacent_outputs(const at::Tensor& pointwise) {
  return pointwise.size(1) == 1 || pointwise.stride(1) == 1
             ? pointwise
             : pointwise.contiguous(at::MemoryFormat::ChannelsLast);
}

void check_pointwise(const at::Tensor& weight, int64_t channels, const at::Tensor& input) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == channels &&
                  weight.size(2) == 1 && weight.size(3) == 1 &&
                  weight.scalar_type() == input.scalar_type() && weight.device().is_cpu(),
              "fastseg: expected pointwise_weight [K, ", channels,
              ", 1, 1] like the input, but got ", weight.sizes(), " of dtype ",
              weight.scalar_type());
}

at::Tensor separable_conv2d_cpu(const at::Tensor& input,             // [N, C, H, W]
                                const at::Tensor& depthwise_weight,  // [C * m, 1, R, S]
                                const at::Tensor& pointwise_weight,  // [K, C * m, 1, 1]
                                const std::optional<at::Tensor>& depthwise_bias,  // [C * m]
                                const std::optional<at::Tensor>& bias,            // [K]
                                at::IntArrayRef stride, at::IntArrayRef padding,
                                at::IntArrayRef dilation, std::string_view depthwise_activation,
                                std::string_view activation,
                                const std::optional<at::Tensor>& depthwise_scale,  // [C * m]
                                const std::optional<at::Tensor>& scale) {          // [K]
  const ConvShape shape =
      depthwise_cpu::checked_shape(input, depthwise_weight, stride, padding, dilation);
  check_pointwise(pointwise_weight, shape.K, input);
  const at::ScalarType type = input.scalar_type(), wide = accumulation_type(type);
  const int64_t K = pointwise_weight.size(0);
  const at::Tensor y =
      at::empty({shape.N, K, shape.P, shape.Q},
                input.options().memory_format(conv_memory_format(input, depthwise_weight)));
  const at::Tensor first_scale =
      dilated_cpu::per_channel(depthwise_scale, "depthwise_scale", shape.K, wide);
  const Epilogue epilogue{dilated_cpu::per_channel(scale, "scale", K, wide),
                          dilated_cpu::per_channel(bias, "bias", K, wide),
                          parse_activation(activation)};
  const at::Tensor first_bias =
      dilated_cpu::per_channel(depthwise_bias, "depthwise_bias", shape.K, wide);
  Depthwise depthwise{shape, depthwise_weight, first_bias, parse_activation(depthwise_activation)};
  if (y.numel() == 0) return y;

  // Scaled filters and a norm's shift do not fit 16 bits: such a call is made in float32.
  const bool widens = type != wide && (first_scale.defined() || first_bias.defined());
  const at::ScalarType kind = widens ? wide : type;
  const Kernels kernels = kernels_for(kind);
  const at::Tensor x = dilated_cpu::with_adjacent_channels(input).to(kind);
  const at::Tensor pointwise = with_adjacent_outputs(pointwise_weight).to(kind);
  depthwise.weight = scaled(depthwise_weight.to(kind), first_scale);
  const at::Tensor result = widens ? at::empty_like(y, y.options().dtype(kind)) : y;
  std::vector<Prepared> prepared;
  prepared.push_back(
      prepare(depthwise, x, pointwise, epilogue, result, kernels, at::get_num_threads()));
  run(prepared, shape.N, y.numel() * shape.K, kernels);
  return widens ? y.copy_(result) : y;
}

std::tuple<at::Tensor, at::Tensor> separable_aspp_branches_cpu(
    const at::Tensor& input,                          // [N, C, H, W]
    at::TensorList depthwise_weights,                 // each [C, 1, R, S]
    at::TensorList weights,                           // each [K_b, C, 1, 1], plain ones first
    const std::optional<at::Tensor>& depthwise_bias,  // [branches with a depthwise filter * C]
    const std::optional<at::Tensor>& bias,            // [sum of K_b]
    at::IntArrayRef dilations, std::string_view depthwise_activation, std::string_view activation,
    bool statistics,
    const std::optional<at::Tensor>& depthwise_scale,  // as depthwise_bias
    const std::optional<at::Tensor>& scale) {          // as bias
  TORCH_CHECK(input.dim() == 4 && input.device().is_cpu(),
              "fastseg: expected a 4-D input on the CPU, but got ", input.dim(), "-D on ",
              input.device());
  const int64_t own = static_cast<int64_t>(depthwise_weights.size());
  const int64_t count = static_cast<int64_t>(weights.size()), plain = count - own;
  TORCH_CHECK(plain >= 0 && count > 0 && dilations.size() == depthwise_weights.size(),
              "fastseg: expected a dilation for each of at most ", count,
              " depthwise weights, but got ", dilations.size(), " and ", own);
  const int64_t C = input.size(1);
  const at::ScalarType type = input.scalar_type(), wide = accumulation_type(type);
  int64_t channels = 0;
  for (const at::Tensor& weight : weights) {
    check_pointwise(weight, C, input);
    channels += weight.size(0);
  }
  const Activation between = parse_activation(depthwise_activation);
  const Epilogue epilogue{dilated_cpu::per_channel(scale, "scale", channels, wide),
                          dilated_cpu::per_channel(bias, "bias", channels, wide),
                          parse_activation(activation)};
  TORCH_CHECK(!statistics || epilogue.activation == Activation::kNone,
              "fastseg: expected activation 'none' with statistics, but got '",
              std::string(activation), "'");
  const at::Tensor first_scale =
      dilated_cpu::per_channel(depthwise_scale, "depthwise_scale", own * C, wide);
  const at::Tensor first_bias =
      dilated_cpu::per_channel(depthwise_bias, "depthwise_bias", own * C, wide);
  const at::Tensor y =
      at::empty({input.size(0), channels, input.size(2), input.size(3)},
                input.options().memory_format(conv_memory_format(input, weights[0])));

  const bool widens = type != wide && (first_scale.defined() || first_bias.defined());
  const at::ScalarType kind = widens ? wide : type;
  const at::Tensor result = widens ? at::empty_like(y, y.options().dtype(kind)) : y;
  if (y.numel() > 0) {
    const Kernels kernels = kernels_for(kind);
    const at::Tensor x = dilated_cpu::with_adjacent_channels(input).to(kind);
    std::vector<Prepared> prepared;
    std::vector<at::Tensor> kept;  // what the calls point to
    int64_t first = 0, products = 0;
    for (int64_t b = 0; b < count; ++b) {
      const at::Tensor pointwise = with_adjacent_outputs(weights[b]).to(kind);
      const int64_t K = pointwise.size(0);
      const Epilogue part{
          epilogue.scale.defined() ? epilogue.scale.narrow(0, first, K) : at::Tensor(),
          epilogue.bias.defined() ? epilogue.bias.narrow(0, first, K) : at::Tensor(),
          epilogue.activation};
      const at::Tensor target = result.narrow(1, first, K);
      first += K;
      if (b < plain) {
        const ConvShape shape = conv_shape(x, pointwise, {1, 1}, {0, 0, 0, 0}, {1, 1});
        dilated_cpu::forward_into({shape, pointwise}, x, part, false, target);
        continue;
      }
      const int64_t own_index = b - plain;
      const auto of_branch = [&](const at::Tensor& vector) {
        return vector.defined() ? vector.narrow(0, own_index * C, C) : vector;
      };
      const at::Tensor& weight = depthwise_weights[own_index];
      TORCH_CHECK(weight.dim() == 4 && weight.size(0) == C && weight.size(2) % 2 == 1 &&
                      weight.size(3) % 2 == 1,
                  "fastseg: expected depthwise weights [", C,
                  ", 1, R, S] with odd R and S, but got ", weight.sizes());
      const int64_t dilation = dilations[own_index];
      const int64_t rows = dilation * (weight.size(2) / 2),
                    columns = dilation * (weight.size(3) / 2);
      const at::Tensor filter = scaled(weight.to(kind), of_branch(first_scale));
      kept.insert(kept.end(), {pointwise, filter});
      const Depthwise depthwise{
          depthwise_cpu::checked_shape(x, filter, {1, 1}, {rows, rows, columns, columns},
                                       {dilation, dilation}),
          filter, of_branch(first_bias), between};
      prepared.push_back(
          prepare(depthwise, x, pointwise, part, target, kernels, at::get_num_threads()));
      products += target.numel() * C;
    }
    run(prepared, input.size(0), products, kernels);
    if (widens) y.copy_(result);
  }
  return {y,
          statistics ? channel_sums(result) : at::empty({0}, input.options().dtype(at::kDouble))};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastseg, CPU, library) {
  library.impl("separable_conv2d.cpu", &separable_conv2d_cpu);
  library.impl("separable_aspp_branches.cpu", &separable_aspp_branches_cpu);
}

}  // namespace fastseg
