// The operators of the segmentation head, fastseg::upsample_*.cuda: checks, allocation, launch. The
// schemas are defined in fastseg/ops/head/op.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "csrc/common/torch_conv.h"
#include "csrc/common/torch_device.h"
#include "csrc/head/head.h"

namespace fastseg {
namespace {

using Scales = std::optional<at::ArrayRef<double>>;

// The resize of `input` [N, C, H, W] to `size` (P, Q), whose low-resolution side has `dtype`.
HeadProblem head_problem(at::IntArrayRef input, at::IntArrayRef size, const Scales& scales,
                         bool align_corners, const at::Tensor& tensor, at::MemoryFormat format,
                         const DeviceScope& device) {
  TORCH_CHECK(input.size() == 4 && size.size() == 2,
              "fastseg: expected a 4-D input and 2 output sizes, but got ", input, " and ", size);
  TORCH_CHECK(!scales.has_value() || scales->size() == 2,
              "fastseg: expected 2 scale factors, but got ", scales->size());
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() / 2;
  for (const int64_t extent : {input[1], input[2], input[3], size[0], size[1]}) {
    TORCH_CHECK(extent > 0 && extent <= kMax, "fastseg: expected sizes from 1 to ", kMax,
                ", but got an input of ", input, " and an output of ", size);
  }
  const auto axis = [&](int dim) {
    const double scale = scales.has_value() ? (*scales)[dim] : 0.0;
    return sample_axis(input[2 + dim], size[dim], scale, align_corners);
  };
  HeadProblem problem{};
  problem.N = input[0], problem.C = input[1];
  problem.rows = axis(0), problem.columns = axis(1);
  problem.dtype = data_type(tensor);
  problem.channels_last = format == at::MemoryFormat::ChannelsLast;
  problem.multiprocessors = device.multiprocessors();
  problem.force_index64 = force_index64();
  return problem;
}

Strides3 pixel_strides(const at::Tensor& tensor) {
  return {stride_of(tensor, 0), stride_of(tensor, 1), stride_of(tensor, 2)};
}

at::ScalarType accumulator_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor empty_bytes(int64_t bytes, const at::Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

// ---- Resize ----

at::Tensor upsample_bilinear2d(const at::Tensor& input,  // [N, C, H, W]
                               at::IntArrayRef size, Scales scales, bool align_corners) {
  const DeviceScope device(input);
  const at::MemoryFormat format = input.suggest_memory_format();
  ResizeForwardArgs args{};
  args.problem = head_problem(input.sizes(), size, scales, align_corners, input, format, device);

  const at::Tensor x = with_neighbours(input, format);
  const at::Tensor output = at::empty({input.size(0), input.size(1), size[0], size[1]},
                                      input.options().memory_format(format));

  if (output.numel() == 0) return output;

  args.input = x.const_data_ptr(), args.input_strides = strides_of(x);
  args.output = output.mutable_data_ptr();
  resize_forward(args, device.stream());
  return output;
}

at::Tensor upsample_bilinear2d_backward(const at::Tensor& grad_output,  // [N, C, P, Q]
                                        at::IntArrayRef input_size, Scales scales,
                                        bool align_corners) {
  TORCH_CHECK(grad_output.dim() == 4 && input_size.size() == 4 &&
                  grad_output.sizes().slice(0, 2) == input_size.slice(0, 2),
              "fastseg: expected grad_output of as many images and channels as an input of ",
              input_size, ", but got ", grad_output.sizes());
  const DeviceScope device(grad_output);
  const at::MemoryFormat format = grad_output.suggest_memory_format();
  ResizeBackwardArgs args{};
  args.problem = head_problem(input_size, grad_output.sizes().slice(2), scales, align_corners,
                              grad_output, format, device);

  const at::Tensor grad_y = with_neighbours(grad_output, format);
  const at::Tensor grad_x = at::empty(input_size, grad_output.options().memory_format(format));

  if (grad_x.numel() == 0) return grad_x;

  args.grad_output = grad_y.const_data_ptr(), args.grad_output_strides = strides_of(grad_y);
  args.grad_input = grad_x.mutable_data_ptr(), args.grad_input_strides = strides_of(grad_x);
  resize_backward(args, device.stream());
  return grad_x;
}

// ---- Labels ----

at::Tensor upsample_argmax(const at::Tensor& logits,  // [N, C, H, W]
                           at::IntArrayRef size, bool align_corners, at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kLong || (dtype == at::kByte && logits.size(1) <= 256),
              "fastseg: expected labels in int64, or in uint8 for at most 256 classes, but got ",
              dtype, " for ", logits.size(1));
  const DeviceScope device(logits);
  ArgmaxArgs args{};
  args.problem = head_problem(logits.sizes(), size, std::nullopt, align_corners, logits,
                              logits.suggest_memory_format(), device);

  const at::Tensor labels =
      at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(dtype));

  if (labels.numel() == 0) return labels;

  args.logits = logits.const_data_ptr(), args.logits_strides = strides_of(logits);
  args.labels = labels.mutable_data_ptr(), args.byte_labels = dtype == at::kByte;
  head_argmax(args, device.stream());
  return labels;
}

// ---- Loss ----

void check_loss(const at::Tensor& logits, const at::Tensor& target,
                const std::optional<at::Tensor>& weight) {
  TORCH_CHECK(logits.dim() == 4 && target.dim() == 3 && target.size(0) == logits.size(0) &&
                  target.scalar_type() == at::kLong && target.device() == logits.device(),
              "fastseg: expected a target [", logits.size(0), ", H, W] of int64 on ",
              logits.device(), ", but got ", target.sizes(), ", ", target.scalar_type(), " on ",
              target.device());
  if (weight.has_value()) {
    TORCH_CHECK(weight->dim() == 1 && weight->size(0) == logits.size(1) &&
                    weight->scalar_type() == logits.scalar_type() &&
                    weight->device() == logits.device(),
                "fastseg: expected weight of size [", logits.size(1), "], ", logits.scalar_type(),
                " on ", logits.device(), ", but got ", weight->sizes(), ", ", weight->scalar_type(),
                " on ", weight->device());
  }
}

LossReduction parse_reduction(std::string_view name) {
  if (name == "none") return LossReduction::kNone;
  if (name == "mean") return LossReduction::kMean;
  if (name == "sum") return LossReduction::kSum;
  TORCH_CHECK(false, "fastseg: expected reduction to be one of none, mean, sum, but got '",
              std::string(name), "'");
}

// The loss's arguments, and the weight that they point into.
struct Loss {
  HeadProblem problem;
  LossTarget target;
  at::Tensor weight;
};

Loss loss_of(const at::Tensor& logits, const at::Tensor& target,
             const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
             bool align_corners, const DeviceScope& device) {
  Loss loss{};
  loss.problem = head_problem(logits.sizes(), target.sizes().slice(1), std::nullopt, align_corners,
                              logits, logits.suggest_memory_format(), device);
  if (weight.has_value()) loss.weight = weight->contiguous();
  loss.target.target = target.const_data_ptr<int64_t>();
  loss.target.target_strides = pixel_strides(target);
  loss.target.weight = loss.weight.defined() ? loss.weight.const_data_ptr() : nullptr;
  loss.target.ignore_index = ignore_index, loss.target.label_smoothing = label_smoothing;
  return loss;
}

// [N, C, H, W] in the accumulator's dtype; `grad_losses` undefined for ones.
at::Tensor loss_gradient(const Loss& loss, const at::Tensor& logits, const at::Tensor& lse,
                         const at::Tensor& grad_losses, const DeviceScope& device) {
  const at::Tensor gradient =
      at::empty(logits.sizes(), logits.options()
                                    .dtype(accumulator_type(logits))
                                    .memory_format(logits.suggest_memory_format()));
  if (gradient.numel() == 0) return gradient;
  const at::Tensor workspace = empty_bytes(kWeightSumBytes, logits);
  CrossEntropyBackwardArgs args{};
  args.problem = loss.problem, args.target = loss.target;
  args.logits = logits.const_data_ptr(), args.logits_strides = strides_of(logits);
  args.lse = lse.const_data_ptr();
  if (grad_losses.defined()) {
    args.grad_losses = grad_losses.const_data_ptr();
    args.grad_losses_strides = pixel_strides(grad_losses);
  }
  args.gradient = gradient.mutable_data_ptr(), args.gradient_strides = strides_of(gradient);
  args.workspace = workspace.mutable_data_ptr();
  cross_entropy_backward(args, device.stream());
  return gradient;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> upsample_cross_entropy(
    const at::Tensor& logits,                 // [N, C, H, W]
    const at::Tensor& target,                 // [N, P, Q]
    const std::optional<at::Tensor>& weight,  // [C]
    int64_t ignore_index, double label_smoothing, bool align_corners, std::string_view reduction,
    bool with_gradient) {
  check_loss(logits, target, weight);
  const LossReduction parsed_reduction = parse_reduction(reduction);

  const DeviceScope device(logits);
  const Loss loss =
      loss_of(logits, target, weight, ignore_index, label_smoothing, align_corners, device);

  const at::TensorOptions options = logits.options().dtype(accumulator_type(logits));
  const bool none = parsed_reduction == LossReduction::kNone;
  const at::Tensor result = none ? at::empty(target.sizes(), options) : at::empty({}, options);
  const at::Tensor total_weight = at::empty({}, options);
  const at::Tensor offender = at::empty({}, target.options());
  const at::Tensor lse = with_gradient ? at::empty(target.sizes(), options) : at::Tensor();

  CrossEntropyArgs args{};
  args.problem = loss.problem, args.target = loss.target, args.reduction = parsed_reduction;
  args.logits = logits.const_data_ptr(), args.logits_strides = strides_of(logits);
  args.lse = with_gradient ? lse.mutable_data_ptr() : nullptr;
  (none ? args.losses : args.loss) = result.mutable_data_ptr();
  args.total_weight = total_weight.mutable_data_ptr();
  args.offender = offender.mutable_data_ptr<int64_t>();
  const at::Tensor workspace = empty_bytes(cross_entropy_workspace_bytes(args), logits);
  args.workspace = workspace.mutable_data_ptr();
  cross_entropy_forward(args, device.stream());
  const at::Tensor gradient = with_gradient ? loss_gradient(loss, logits, lse, at::Tensor(), device)
                                            : at::empty({0}, options);
  return {result, total_weight, gradient, offender};
}

at::Tensor upsample_cross_entropy_backward(const at::Tensor& grad_losses,            // [N, P, Q]
                                           const at::Tensor& logits,                 // [N, C, H, W]
                                           const at::Tensor& target,                 // [N, P, Q]
                                           const std::optional<at::Tensor>& weight,  // [C]
                                           int64_t ignore_index, double label_smoothing,
                                           bool align_corners) {
  check_loss(logits, target, weight);
  TORCH_CHECK(grad_losses.sizes() == target.sizes() && grad_losses.device() == logits.device(),
              "fastseg: expected grad_losses of size ", target.sizes(), " on ", logits.device(),
              ", but got ", grad_losses.sizes(), " on ", grad_losses.device());

  const DeviceScope device(logits);
  const Loss loss =
      loss_of(logits, target, weight, ignore_index, label_smoothing, align_corners, device);

  // What the first pass leaves besides lse is not wanted here.
  const at::TensorOptions options = logits.options().dtype(accumulator_type(logits));
  const at::Tensor lse = at::empty(target.sizes(), options);
  const at::Tensor total_weight = at::empty({}, options);
  const at::Tensor offender = at::empty({}, target.options());

  CrossEntropyArgs args{};
  args.problem = loss.problem, args.target = loss.target, args.reduction = LossReduction::kNone;
  args.logits = logits.const_data_ptr(), args.logits_strides = strides_of(logits);
  args.lse = lse.mutable_data_ptr();
  args.total_weight = total_weight.mutable_data_ptr();
  args.offender = offender.mutable_data_ptr<int64_t>();
  const at::Tensor workspace = empty_bytes(cross_entropy_workspace_bytes(args), logits);
  args.workspace = workspace.mutable_data_ptr();
  cross_entropy_forward(args, device.stream());
  return loss_gradient(loss, logits, lse, grad_losses.to(options.dtype()), device);
}

TORCH_LIBRARY_IMPL(fastseg, FASTSEG_DEVICE_KEY, m) {
  m.impl("upsample_bilinear2d.cuda", upsample_bilinear2d);
  m.impl("upsample_bilinear2d_backward.cuda", upsample_bilinear2d_backward);
  m.impl("upsample_argmax.cuda", upsample_argmax);
  m.impl("upsample_cross_entropy.cuda", upsample_cross_entropy);
  m.impl("upsample_cross_entropy_backward.cuda", upsample_cross_entropy_backward);
}

}  // namespace
}  // namespace fastseg
