// Batch norm in eval mode behind a convolution, on the CPU: folded into the convolution's weight,
// or applied with the activation in one pass over the convolution's output. One operator call does
// everything, because in a deep network of small layers the calls are what takes the time.

#include "csrc/batch_norm/batch_norm_cpu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "csrc/common/conv_shape.h"
#include "csrc/common/simd.h"
#include "csrc/common/torch_conv.h"
#include "csrc/common/torch_cpu.h"

#define FASTSEG_KERNELS "csrc/batch_norm/batch_norm_cpu_kernels.h"
#include "csrc/common/for_each_simd.h"

namespace fastseg {
namespace {

// Elements that are worth a thread.
constexpr int64_t kGrain = int64_t{1} << 15;

using OptionalTensor = std::optional<at::Tensor>;

// The elements of a 1-D tensor, or nothing.
std::vector<double> values(const OptionalTensor& tensor, int64_t K) {
  if (!tensor) return {};
  TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == K && tensor->device().is_cpu(),
              "fastseg: expected the tensors of a batch norm to be [", K, "] on the CPU, but got ",
              tensor->sizes(), " on ", tensor->device());
  if (tensor->scalar_type() == at::kFloat && tensor->is_contiguous()) {
    const float* data = tensor->const_data_ptr<float>();
    return {data, data + K};
  }
  const at::Tensor converted = tensor->to(at::kDouble).contiguous();
  const double* data = converted.const_data_ptr<double>();
  return {data, data + K};
}

// A norm behind a convolution's bias as y * scale + shift. Both are [K] in `type`.
std::tuple<at::Tensor, at::Tensor> scale_and_shift(int64_t K, at::ScalarType type,
                                                   const OptionalTensor& bias,
                                                   const at::Tensor& mean,
                                                   const at::Tensor& variance,
                                                   const OptionalTensor& gamma,
                                                   const OptionalTensor& beta, double eps) {
  const std::vector<double> b = values(bias, K), m = values(mean, K), v = values(variance, K),
                            g = values(gamma, K), c = values(beta, K);
  at::Tensor scale = at::empty({K}, mean.options().dtype(type)), shift = at::empty_like(scale);
  const auto fill = [&](auto* scales, auto* shifts) {
    for (int64_t k = 0; k < K; ++k) {
      const double factor = (g.empty() ? 1.0 : g[k]) / std::sqrt(v[k] + eps);
      scales[k] = factor;
      shifts[k] = (c.empty() ? 0.0 : c[k]) + ((b.empty() ? 0.0 : b[k]) - m[k]) * factor;
    }
  };
  if (type == at::kDouble) {
    fill(scale.mutable_data_ptr<double>(), shift.mutable_data_ptr<double>());
  } else {
    fill(scale.mutable_data_ptr<float>(), shift.mutable_data_ptr<float>());
  }
  return {scale, shift};
}

std::tuple<at::Tensor, at::Tensor> fold_batch_norm(
    const at::Tensor& weight,  // [K, C / groups, R, S]
    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& variance,
    const OptionalTensor& gamma, const OptionalTensor& beta, double eps) {
  TORCH_CHECK(weight.dim() == 4, "fastseg: expected a 4-D weight, but got ", weight.dim(), "-D");
  auto [scale, shift] = scale_and_shift(weight.size(0), accumulation_type(weight.scalar_type()),
                                        bias, mean, variance, gamma, beta, eps);
  return {(weight * scale.view({-1, 1, 1, 1})).to(weight.scalar_type()),
          shift.to(weight.scalar_type())};
}

template <class S>
void scale_shift_activate(const at::Tensor& y, const at::Tensor& scale, const at::Tensor& shift,
                          Activation activation) {
  using A = typename Accumulator<S>::type;
  S* data = static_cast<S*>(y.mutable_data_ptr());
  const A* a = scale.const_data_ptr<A>();
  const A* b = shift.const_data_ptr<A>();
  const int64_t K = y.size(1), pixels = y.size(2) * y.size(3);
  auto* rows = plain::scale_rows<S, A>;
  auto* planes = plain::scale_planes<S, A>;
#if FASTSEG_SIMD_X86
  if (capability() == Capability::kAvx512) {
    rows = avx512::scale_rows<S, A>;
    planes = avx512::scale_planes<S, A>;
  } else if (capability() == Capability::kAvx2) {
    rows = avx2::scale_rows<S, A>;
    planes = avx2::scale_planes<S, A>;
  }
#endif
  if (y.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    at::parallel_for(0, y.size(0) * pixels, std::max<int64_t>(1, kGrain / K),
                     [&](int64_t begin, int64_t end) {
                       rows(data + begin * K, end - begin, K, a, b, activation);
                     });
  } else {
    at::parallel_for(
        0, y.size(0) * K, std::max<int64_t>(1, kGrain / pixels), [&](int64_t begin, int64_t end) {
          planes(data + begin * pixels, begin, end - begin, pixels, K, a, b, activation);
        });
  }
}

at::Tensor& batch_norm_activation_(at::Tensor& y,  // [N, K, P, Q]
                                   const OptionalTensor& bias, const at::Tensor& mean,
                                   const at::Tensor& variance, const OptionalTensor& gamma,
                                   const OptionalTensor& beta, double eps,
                                   std::string_view activation) {
  TORCH_CHECK(
      y.dim() == 4 && (y.is_contiguous() || y.is_contiguous(at::MemoryFormat::ChannelsLast)),
      "fastseg: expected y [N, K, P, Q], contiguous or channels_last, but got sizes ", y.sizes(),
      " and strides ", y.strides());
  const Activation chosen = parse_activation(activation);
  auto [scale, shift] = scale_and_shift(y.size(1), accumulation_type(y.scalar_type()), bias, mean,
                                        variance, gamma, beta, eps);
  if (y.numel() == 0) return y;
  with_storage(y.scalar_type(), [&](auto element) {
    scale_shift_activate<decltype(element)>(y, scale, shift, chosen);
  });
  return y;
}

// Sums of a few pixels in the accumulation type, added up in double: squares of values far from
// zero lose nothing that a variance would miss.
template <class S>
void add_channel_sums(const at::Tensor& y, double* total) {
  using A = typename Accumulator<S>::type;
  auto* sum_pixels = plain::sum_pixels<S, A>;
#if FASTSEG_SIMD_X86
  if (capability() == Capability::kAvx512) {
    sum_pixels = avx512::sum_pixels<S, A>;
  } else if (capability() == Capability::kAvx2) {
    sum_pixels = avx2::sum_pixels<S, A>;
  }
#endif
  constexpr int64_t kPixels = 64;
  const int64_t K = y.size(1), H = y.size(2), W = y.size(3), pixels = y.size(0) * H * W;
  const int64_t chunks = (pixels + kPixels - 1) / kPixels;
  const S* data = static_cast<const S*>(y.const_data_ptr());
  std::vector<A> sums(chunks * 2 * K);
  at::parallel_for(
      0, chunks, std::max<int64_t>(1, kGrain / (kPixels * K)), [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const S* at[kPixels];
          const int64_t first = chunk * kPixels, count = std::min(kPixels, pixels - first);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t pixel = first + i;
            at[i] = data + pixel / (H * W) * y.stride(0) + pixel / W % H * y.stride(2) +
                    pixel % W * y.stride(3);
          }
          sum_pixels(at, count, K, sums.data() + chunk * 2 * K);
        }
      });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t k = 0; k < 2 * K; ++k) total[k] += sums[chunk * 2 * K + k];
  }
}

at::Tensor activate_(at::Tensor y, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return y.relu_();
    case Activation::kRelu6:
      return y.clamp_(0, 6);
    case Activation::kHardswish:
      return at::hardswish_(y);
    case Activation::kSilu:
      return at::silu_(y);
    default:
      return y;
  }
}

using Scalars = c10::List<std::optional<at::Scalar>>;
using Pointwise = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                             at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t,
                             std::string_view, Scalars, std::optional<std::string_view>);

// ATen's convolution with an activation after it, inside oneDNN where PyTorch has that.
at::Tensor native_conv2d(const at::Tensor& input, const at::Tensor& weight,
                         const OptionalTensor& bias, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                         Activation activation) {
  static const auto onednn =
      c10::Dispatcher::singleton().findSchema({"mkldnn::_convolution_pointwise", ""});
  if (activation == Activation::kNone || !onednn || !at::globalContext().userEnabledMkldnn() ||
      input.scalar_type() != at::kFloat || input.numel() == 0) {
    return activate_(at::conv2d(input, weight, bias, stride, padding, dilation, groups),
                     activation);
  }
  static constexpr const char* kNames[] = {"none", "relu", "hardtanh", "hardswish", "swish"};
  Scalars scalars;
  if (activation == Activation::kRelu6) {
    scalars.push_back(at::Scalar(0.0));
    scalars.push_back(at::Scalar(6.0));
  }
  return onednn->typed<Pointwise>().call(input, weight, bias, padding, stride, dilation, groups,
                                         kNames[static_cast<int>(activation)], scalars, "");
}

using Depthwise = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                             at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, std::string_view);
using Dilated = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                           at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, std::string_view,
                           const OptionalTensor&);

template <class Signature>
c10::TypedOperatorHandle<Signature> cpu_kernel(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "cpu").typed<Signature>();
}

// Convolution, norm and activation in one call. `backend` is "cpu", our kernels, or "native".
// Dense ones of ours scale their sums; the others scale the weight, or with `scale_weight` false
// the output.
at::Tensor folded_conv2d(const at::Tensor& input,   // [N, C, H, W]
                         const at::Tensor& weight,  // [K, C / groups, R, S]
                         const OptionalTensor& bias, const at::Tensor& mean,
                         const at::Tensor& variance, const OptionalTensor& gamma,
                         const OptionalTensor& beta, double eps, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                         std::string_view activation, bool scale_weight, std::string_view backend) {
  TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
              "fastseg: expected stride, padding and dilation to be (height, width)");
  const bool own = backend == "cpu";
  TORCH_CHECK(own || backend == "native",
              "fastseg: expected backend to be 'cpu' or 'native', but got '", std::string(backend),
              "'");
  const int64_t pads[] = {padding[0], padding[0], padding[1], padding[1]};
  if (own && groups == 1) {
    static const auto dilated = cpu_kernel<Dilated>("fastseg::dilated_conv2d");
    const auto [scale, shift] =
        scale_and_shift(weight.size(0), accumulation_type(weight.scalar_type()), bias, mean,
                        variance, gamma, beta, eps);
    return dilated.call(input, weight, shift, stride, pads, dilation, activation, scale);
  }
  const auto convolve = [&](const at::Tensor& filter, const OptionalTensor& shift,
                            std::string_view applied) {
    if (own) {
      static const auto depthwise = cpu_kernel<Depthwise>("fastseg::depthwise_conv2d");
      return depthwise.call(input, filter, shift, stride, pads, dilation, applied);
    }
    return native_conv2d(input, filter, shift, stride, padding, dilation, groups,
                         parse_activation(applied));
  };
  if (scale_weight) {
    const auto [scaled, shift] = fold_batch_norm(weight, bias, mean, variance, gamma, beta, eps);
    return convolve(scaled, shift, activation);
  }
  at::Tensor y = convolve(weight, std::nullopt, "none");
  return batch_norm_activation_(y, bias, mean, variance, gamma, beta, eps, activation);
}

}  // namespace

at::Tensor channel_sums(const at::Tensor& y) {
  const at::Tensor total =
      at::zeros({2, y.size(1)}, y.options().dtype(at::kDouble).memory_format(std::nullopt));
  if (y.numel() == 0) return total;
  const at::Tensor z = y.stride(1) == 1 ? y : y.contiguous(at::MemoryFormat::ChannelsLast);
  with_storage(z.scalar_type(), [&](auto element) {
    add_channel_sums<decltype(element)>(z, total.mutable_data_ptr<double>());
  });
  return total;
}

TORCH_LIBRARY_IMPL(fastseg, CPU, library) {
  library.impl("folded_conv2d", &folded_conv2d);
  library.impl("fold_batch_norm", &fold_batch_norm);
  library.impl("batch_norm_activation_", &batch_norm_activation_);
}

}  // namespace fastseg
