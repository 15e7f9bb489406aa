// The branches of atrous spatial pyramid pooling on the CPU: dense convolutions of one image by the
// kernels of csrc/dilated, each writing its slice of one buffer, or all adding up into one tensor.
//
//     "concat"   y[n, first_b + k, p, q] = act(scale * conv_b(x)[n, k, p, q] + bias)
//     "sum"      y[n, k, p, q] = act(scale * (conv_0(x) + conv_1(x) + ...)[n, k, p, q] + bias)
//
// Nothing is copied together afterwards, and in the backward pass grad_x is the only tensor of the
// image's size: branches add to it in place, one after the other, so that sums have a fixed order.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "csrc/batch_norm/batch_norm_cpu.h"
#include "csrc/common/torch_conv.h"
#include "csrc/common/torch_cpu.h"
#include "csrc/dilated/dilated_cpu.h"

namespace fastseg {
namespace {

using dilated_cpu::Branch;
using dilated_cpu::Epilogue;

struct Branches {
  std::vector<Branch> all;
  bool sums;         // "sum"
  int64_t channels;  // of the output
};

Branches branches_of(const at::Tensor& input, at::TensorList weights, at::IntArrayRef dilations,
                     std::string_view reduction) {
  TORCH_CHECK(!weights.empty() && weights.size() == dilations.size(),
              "fastseg: expected one weight and dilation for each branch, but got ", weights.size(),
              " and ", dilations.size());
  TORCH_CHECK(reduction == "concat" || reduction == "sum",
              "fastseg: expected reduction to be 'concat' or 'sum', but got '",
              std::string(reduction), "'");
  TORCH_CHECK(input.device().is_cpu(), "fastseg: expected CPU tensors, but got ", input.device());
  Branches found{{}, reduction == "sum", 0};
  for (size_t b = 0; b < weights.size(); ++b) {
    const at::Tensor& weight = weights[b];
    TORCH_CHECK(weight.dim() == 4 && weight.size(1) == input.size(1) && weight.size(0) > 0 &&
                    weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1,
                "fastseg: expected weights [K, ", input.size(1),
                ", R, S] with odd R and S, but got ", weight.sizes());
    const int64_t rows = dilations[b] * (weight.size(2) / 2);
    const int64_t columns = dilations[b] * (weight.size(3) / 2);
    found.all.push_back({conv_shape(input, weight, {1, 1}, {rows, rows, columns, columns},
                                    {dilations[b], dilations[b]}),
                         weight});
    TORCH_CHECK(!found.sums || weight.size(0) == weights[0].size(0),
                "fastseg: expected branches of one width, but got ", weights[0].size(0), " and ",
                weight.size(0));
    found.channels = found.sums ? weight.size(0) : found.channels + weight.size(0);
  }
  return found;
}

at::Tensor slice(const at::Tensor& vector, int64_t first, int64_t count) {
  return vector.defined() ? vector.narrow(0, first, count) : vector;
}

std::tuple<at::Tensor, at::Tensor> aspp_branches_cpu(
    const at::Tensor& input,                // [N, C, H, W]
    at::TensorList weights,                 // each [K_b, C, R, S]
    const std::optional<at::Tensor>& bias,  // [channels of y]
    at::IntArrayRef dilations, std::string_view activation, std::string_view reduction,
    bool statistics,
    const std::optional<at::Tensor>& scale) {  // [channels of y]
  const Branches branches = branches_of(input, weights, dilations, reduction);
  const at::ScalarType wide = accumulation_type(input.scalar_type());
  Epilogue epilogue;
  epilogue.scale = dilated_cpu::per_channel(scale, "scale", branches.channels, wide);
  epilogue.bias = dilated_cpu::per_channel(bias, "bias", branches.channels, wide);
  epilogue.activation = parse_activation(activation);
  TORCH_CHECK(!statistics || epilogue.activation == Activation::kNone,
              "fastseg: expected activation 'none' with statistics, but got '",
              std::string(activation), "'");
  const int64_t sizes[] = {input.size(0), branches.channels, input.size(2), input.size(3)};
  const at::Tensor y = at::empty(
      sizes, input.options().memory_format(conv_memory_format(input, branches.all[0].weight)));
  if (y.numel() > 0) {
    const at::Tensor x = dilated_cpu::with_adjacent_channels(input);
    if (!branches.sums) {
      int64_t first = 0;
      for (const Branch& branch : branches.all) {
        const int64_t K = branch.shape.K;
        const Epilogue own{slice(epilogue.scale, first, K), slice(epilogue.bias, first, K),
                           epilogue.activation};
        dilated_cpu::forward_into(branch, x, own, false, y.narrow(1, first, K));
        first += K;
      }
    } else if (y.scalar_type() == wide && y.stride(1) == 1) {
      dilated_cpu::forward_sum_into(branches.all, x, epilogue, y);
    } else {
      // Sums wait in the result, which has to be as wide as they are.
      std::vector<Branch> widened = branches.all;
      for (Branch& branch : widened) branch.weight = branch.weight.to(wide);
      const at::Tensor sum =
          at::empty(sizes, y.options().dtype(wide).memory_format(at::MemoryFormat::ChannelsLast));
      dilated_cpu::forward_sum_into(widened, x.to(wide), epilogue, sum);
      y.copy_(sum);
    }
  }
  return {y, statistics ? channel_sums(y) : at::empty({0}, input.options().dtype(at::kDouble))};
}

std::tuple<at::Tensor, std::vector<at::Tensor>> aspp_branches_backward_cpu(
    const at::Tensor& grad_output,  // [N, channels of y, H, W]
    const at::Tensor& input,        // [N, C, H, W]
    at::TensorList weights,         // each [K_b, C, R, S]
    at::IntArrayRef dilations, std::string_view reduction, bool needs_input, bool needs_weights) {
  const Branches branches = branches_of(input, weights, dilations, reduction);
  const int64_t sizes[] = {input.size(0), branches.channels, input.size(2), input.size(3)};
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(sizes) &&
                  grad_output.scalar_type() == input.scalar_type() &&
                  grad_output.device() == input.device(),
              "fastseg: expected grad_output of size ", at::IntArrayRef(sizes), ", ",
              input.scalar_type(), " on ", input.device(), ", but got ", grad_output.sizes(), ", ",
              grad_output.scalar_type(), " on ", grad_output.device());
  const at::ScalarType wide = accumulation_type(input.scalar_type());
  at::Tensor grad_input = at::empty({0}, input.options());
  std::vector<at::Tensor> grad_weights;
  if (needs_weights) {
    for (const at::Tensor& weight : weights) grad_weights.push_back(at::empty_like(weight));
  }
  if (needs_input) {
    grad_input =
        at::empty(input.sizes(),
                  input.options().memory_format(conv_memory_format(input, branches.all[0].weight)));
  }
  if (input.numel() == 0) {
    for (at::Tensor& grad : grad_weights) grad.zero_();
    return {grad_input, grad_weights};
  }

  const at::Tensor gy = dilated_cpu::with_adjacent_channels(grad_output);
  const auto grad_of = [&](size_t b, int64_t first) {
    return branches.sums ? gy : gy.narrow(1, first, branches.all[b].shape.K);
  };
  if (needs_input) {
    // Branches add up in the result, or in a wider one.
    const bool direct = grad_input.scalar_type() == wide && grad_input.stride(1) == 1;
    const at::Tensor sum =
        direct
            ? grad_input
            : at::empty(input.sizes(),
                        input.options().dtype(wide).memory_format(at::MemoryFormat::ChannelsLast));
    int64_t first = 0;
    for (size_t b = 0; b < branches.all.size(); ++b) {
      Branch branch = branches.all[b];
      branch.weight = branch.weight.to(wide);
      dilated_cpu::grad_input_into(branch, grad_of(b, first).to(wide), b > 0, sum);
      first += branch.shape.K;
    }
    if (!direct) grad_input.copy_(sum);
  }
  if (needs_weights) {
    const at::Tensor x = dilated_cpu::with_adjacent_channels(input);
    int64_t first = 0;
    for (size_t b = 0; b < branches.all.size(); ++b) {
      const Branch& branch = branches.all[b];
      grad_weights[b].copy_(dilated_cpu::grad_weight(branch.shape, grad_of(b, first), x));
      first += branch.shape.K;
    }
  }
  return {grad_input, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastseg, CPU, library) {
  library.impl("aspp_branches.cpu", &aspp_branches_cpu);
  library.impl("aspp_branches_backward.cpu", &aspp_branches_backward_cpu);
}

}  // namespace fastseg
