// The Python module fastseg._C: facts of the build, and the planners that run on the host.
// Importing it registers the C++ operators, whose registrations are static objects of the other
// files in this library.
#include <torch/extension.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/common/conv_shape.h"
#include "csrc/common/simd.h"
#include "csrc/dilated/rectangles.h"
#include "csrc/dilated/winograd_cpu_plan.h"

namespace {

using Pair = std::array<int64_t, 2>;
// (index, period, count, step, [(source, weight), ...])
using PySpan =
    std::tuple<int64_t, int64_t, int64_t, int64_t, std::vector<std::pair<int64_t, int64_t>>>;

PySpan to_python(const fastseg::dilated::Span& span) {
  std::vector<std::pair<int64_t, int64_t>> taps;
  for (const fastseg::Tap& tap : span.taps) taps.emplace_back(tap.source, tap.weight);
  return {span.index, span.period, span.count, span.step, taps};
}

std::vector<std::pair<PySpan, PySpan>> live_rectangles(const std::string& targets, Pair input,
                                                       Pair output, Pair kernel, Pair stride,
                                                       std::array<int64_t, 4> padding,
                                                       Pair dilation) {
  if (targets != "outputs" && targets != "inputs") {
    throw std::invalid_argument("expected targets to be 'outputs' or 'inputs', but got '" +
                                targets + "'");
  }
  for (const Pair& sizes : {input, output, kernel, stride, dilation}) {
    if (sizes[0] < 1 || sizes[1] < 1) {
      throw std::invalid_argument("expected positive sizes, strides and dilations");
    }
  }
  const fastseg::ConvShape shape{1,         1,          input[0],   input[1],    1,
                                 output[0], output[1],  kernel[0],  kernel[1],   stride[0],
                                 stride[1], padding[0], padding[2], dilation[0], dilation[1]};
  const auto rectangles = targets == "outputs" ? fastseg::dilated::output_rectangles(shape)
                                               : fastseg::dilated::input_rectangles(shape);
  std::vector<std::pair<PySpan, PySpan>> found;
  for (const auto& r : rectangles) found.emplace_back(to_python(r.rows), to_python(r.columns));
  return found;
}

std::optional<std::pair<const char*, const char*>> winograd_forms(
    int64_t images, int64_t channels, int64_t outputs, Pair input, Pair output, Pair kernel,
    Pair stride, std::array<int64_t, 4> padding, Pair dilation) {
  const fastseg::ConvShape shape{images,    channels,   input[0],   input[1],    outputs,
                                 output[0], output[1],  kernel[0],  kernel[1],   stride[0],
                                 stride[1], padding[0], padding[2], dilation[0], dilation[1]};
  const auto forms = fastseg::winograd::forms_that_pay(shape);
  if (!forms) return std::nullopt;
  return std::pair(name_of(forms->rows), name_of(forms->columns));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Build facts and planners of fastseg; importing it registers its C++ operators.";
#ifdef FASTSEG_WITH_CUDA
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
  module.attr("torch_version") = TORCH_VERSION;
  module.def("cpu_capability", &fastseg::cpu_capability,
             "The instruction set the CPU kernels use: avx512, avx2 or plain.");
  module.def("live_rectangles", &live_rectangles, "See fastseg.ops.live_taps.rectangles.",
             pybind11::arg("targets"), pybind11::arg("input"), pybind11::arg("output"),
             pybind11::arg("kernel"), pybind11::arg("stride"), pybind11::arg("padding"),
             pybind11::arg("dilation"));
  module.def(
      "winograd_forms", &winograd_forms,
      "By which forms of Winograd's algorithm, of rows and of columns, the CPU kernels convolve "
      "float32 tensors of these sizes; None where they multiply with every tap.",
      pybind11::arg("images"), pybind11::arg("channels"), pybind11::arg("outputs"),
      pybind11::arg("input"), pybind11::arg("output"), pybind11::arg("kernel"),
      pybind11::arg("stride"), pybind11::arg("padding"), pybind11::arg("dilation"));
}
