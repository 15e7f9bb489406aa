// The Python module fastseg._C: facts of the build. Importing it registers the C++ operators, whose
// registrations are static objects of the other files in this library.
#include <torch/extension.h>

#include "csrc/common/simd.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Build facts of fastseg; importing this module registers its C++ operators.";
#ifdef FASTSEG_WITH_CUDA
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
  module.attr("torch_version") = TORCH_VERSION;
  module.def("cpu_capability", &fastseg::cpu_capability,
             "The instruction set the CPU kernels use: avx512, avx2 or plain.");
}
