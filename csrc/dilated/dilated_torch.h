// What the operators of dense convolutions share on the torch side of the CUDA kernels: one
// convolution (dilated_cuda.cpp) and several of one image (csrc/aspp/aspp_cuda.cpp).
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <cstdio>
#include <cstdlib>
#include <optional>

#include "csrc/common/torch_conv.h"
#include "csrc/common/torch_device.h"
#include "csrc/dilated/dilated.h"

namespace fastseg {

inline ConvShape dilated_shape(const at::Tensor& input, const at::Tensor& weight,
                               at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation) {
  const ConvShape shape = conv_shape(input, weight, stride, padding, dilation);
  TORCH_CHECK(weight.size(1) == shape.C && shape.C > 0 && shape.R > 0 && shape.S > 0,
              "fastseg: expected a dense weight [K, ", shape.C, ", R, S] for an input of ", shape.C,
              " channels, but got ", weight.sizes());
  for (const int64_t count : {shape.N, shape.H, shape.W, shape.P, shape.Q}) {
    TORCH_CHECK(count < kMaxCount, "fastseg: expected less than ", kMaxCount,
                " images, rows and columns, but got ", count);
  }
  return shape;
}

// What sums of products of the tensor's elements are added up in.
inline at::ScalarType accumulator_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A bias of one number a channel, or where `of_images` also of each image.
inline void check_bias(const std::optional<at::Tensor>& bias, const at::Tensor& input,
                       int64_t channels, bool of_images) {
  if (!bias.has_value()) return;
  const at::ScalarType wide = accumulator_type(input), narrow = input.scalar_type();
  const bool fits = (bias->dim() == 1 && bias->size(0) == channels) ||
                    (of_images && bias->dim() == 2 && bias->size(0) == input.size(0) &&
                     bias->size(1) == channels);
  TORCH_CHECK(fits && (bias->scalar_type() == narrow || bias->scalar_type() == wide) &&
                  bias->device() == input.device(),
              "fastseg: expected bias of size [", channels, "]",
              of_images
                  ? " or [" + std::to_string(input.size(0)) + ", " + std::to_string(channels) + "]"
                  : "",
              ", ", narrow, " or ", wide, " on ", input.device(), ", but got ", bias->sizes(), ", ",
              bias->scalar_type(), " on ", bias->device());
}

inline void check_scale(const std::optional<at::Tensor>& scale, const at::Tensor& input,
                        int64_t channels) {
  if (!scale.has_value()) return;
  const at::ScalarType wide = accumulator_type(input);
  TORCH_CHECK(scale->dim() == 1 && scale->size(0) == channels && scale->scalar_type() == wide &&
                  scale->device() == input.device(),
              "fastseg: expected scale of size [", channels, "], ", wide, " on ", input.device(),
              ", but got ", scale->sizes(), ", ", scale->scalar_type(), " on ", scale->device());
}

// Tests set FASTSEG_FORCE_TILE=128x64 and FASTSEG_FORCE_SPLITS=3 to reach every variant of a
// kernel.
inline DilatedChoice forced_choice() {
  DilatedChoice choice{};
  if (const char* tile = std::getenv("FASTSEG_FORCE_TILE")) {
    TORCH_CHECK(std::sscanf(tile, "%dx%d", &choice.tile_rows, &choice.tile_columns) == 2,
                "fastseg: expected FASTSEG_FORCE_TILE to be like 128x64, but got ", tile);
  }
  if (const char* splits = std::getenv("FASTSEG_FORCE_SPLITS")) choice.splits = std::atoi(splits);
  return choice;
}

// Without the addresses of weights, which grad_weight does not need.
inline DilatedProblem dilated_problem(at::ArrayRef<ConvShape> shapes, bool summed,
                                      const at::Tensor& input, const DeviceScope& device) {
  DilatedProblem problem{};
  for (const ConvShape& shape : shapes) {
    problem.branches.push_back({shape, nullptr, {}, summed ? 0 : problem.outputs});
    problem.outputs = summed ? shape.K : problem.outputs + shape.K;
  }
  problem.summed = summed;
  problem.dtype = data_type(input);
  problem.tf32 =
      input.scalar_type() == at::kFloat && at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
  problem.multiprocessors = device.multiprocessors();
  problem.shared_bytes = device.shared_bytes_per_block();
  problem.forced = forced_choice();
  return problem;
}

// Adds the addresses of the weights. What is returned owns them.
[[nodiscard]] inline std::vector<at::Tensor> add_weights(DilatedProblem& problem,
                                                         at::TensorList weights) {
  std::vector<at::Tensor> owners;
  for (size_t i = 0; i < weights.size(); ++i) {
    owners.push_back(with_neighbours(weights[i], at::MemoryFormat::ChannelsLast));
    problem.branches[i].weight = owners[i].const_data_ptr();
    problem.branches[i].weight_strides = strides_of(owners[i]);
  }
  return owners;
}

// Computes `output` [N, outputs, P, Q], which has elements; returns its statistics, [2, outputs] in
// float64, where they are asked for.
inline at::Tensor run_dilated_forward(DilatedProblem problem, const at::Tensor& input,
                                      at::TensorList weights, const std::optional<at::Tensor>& bias,
                                      const std::optional<at::Tensor>& scale, Activation activation,
                                      bool statistics, const at::Tensor& output,
                                      const DeviceScope& device) {
  const std::vector<at::Tensor> owners = add_weights(problem, weights);
  const at::Tensor x = with_neighbours(input, at::MemoryFormat::ChannelsLast);
  const at::Tensor b = bias.has_value() ? bias->contiguous() : at::Tensor();
  const at::Tensor a = scale.has_value() ? scale->contiguous() : at::Tensor();
  DilatedForwardArgs args{};
  args.problem = problem;
  args.activation = activation;
  args.input = x.const_data_ptr(), args.input_strides = strides_of(x);
  args.scale = a.defined() ? a.const_data_ptr() : nullptr;
  args.bias = b.defined() ? b.const_data_ptr() : nullptr;
  args.wide_bias = b.defined() && b.scalar_type() == accumulator_type(input);
  args.bias_of_image = b.defined() && b.dim() == 2;
  args.output = output.mutable_data_ptr(), args.output_strides = strides_of(output);
  at::Tensor parts;
  if (statistics) {
    parts = at::zeros({dilated_statistics_rows(args), 2, problem.outputs},
                      input.options().dtype(accumulator_type(input)));
    args.statistics = parts.mutable_data_ptr();
  }
  dilated_forward(args, device.stream());
  return statistics ? at::sum(parts, {0}, /*keepdim=*/false, at::kDouble) : at::Tensor();
}

// Computes what is defined of grad_input and grad_weights; grad_output and input have elements.
inline void run_dilated_backward(DilatedProblem problem, const at::Tensor& grad_output,
                                 const at::Tensor& input, at::TensorList weights,
                                 const at::Tensor& grad_input, at::TensorList grad_weights,
                                 const DeviceScope& device) {
  if (!grad_input.defined() && grad_weights.empty()) return;
  const at::Tensor grad_y = with_neighbours(grad_output, at::MemoryFormat::ChannelsLast);
  if (grad_weights.size() > 0) {
    const at::Tensor x = with_neighbours(input, at::MemoryFormat::ChannelsLast);
    DilatedGradWeightArgs args{};
    args.problem = problem;
    args.grad_output = grad_y.const_data_ptr(), args.grad_output_strides = strides_of(grad_y);
    args.input = x.const_data_ptr(), args.input_strides = strides_of(x);
    for (const at::Tensor& gradient : grad_weights) {
      args.grad_weights.push_back({gradient.mutable_data_ptr(), strides_of(gradient)});
    }
    const at::Tensor workspace =
        at::empty({dilated_grad_weight_workspace_bytes(args)}, input.options().dtype(at::kByte));
    args.workspace = workspace.mutable_data_ptr();
    dilated_grad_weight(args, device.stream());
  }
  if (grad_input.defined()) {
    const std::vector<at::Tensor> owners = add_weights(problem, weights);
    DilatedGradInputArgs args{};
    args.problem = problem;
    args.grad_output = grad_y.const_data_ptr(), args.grad_output_strides = strides_of(grad_y);
    args.grad_input = grad_input.mutable_data_ptr();
    args.grad_input_strides = strides_of(grad_input);
    dilated_grad_input(args, device.stream());
  }
}

}  // namespace fastseg
