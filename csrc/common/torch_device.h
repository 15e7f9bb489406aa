// Where the CUDA operators of a family run. Compiled with -DFASTSEG_HOST, the same operators take
// CPU tensors and csrc/host runs their kernels: everything in the torch-side glue that differs is
// here.
#pragma once

#include <ATen/ATen.h>

#include <cstdlib>
#include <cstring>

#include "csrc/common/dtype_switch.h"

#ifdef FASTSEG_HOST
#include "csrc/host/cuda_on_cpu.h"
#define FASTSEG_DEVICE_KEY CPU
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#define FASTSEG_DEVICE_KEY CUDA
#endif

namespace fastseg {

// Makes a tensor's device the current one for as long as this lives.
class DeviceScope {
 public:
#ifdef FASTSEG_HOST
  explicit DeviceScope(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  // So few that small tests, too, give one block several walks.
  int multiprocessors() const { return 2; }
  int shared_bytes_per_block() const { return host::kMaxSharedBytesPerBlock; }
#else
  explicit DeviceScope(const at::Tensor& tensor) : guard_(tensor.device()) {}
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int shared_bytes_per_block() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

 private:
  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, guard_.current_device().index()));
    return value;
  }

  c10::cuda::CUDAGuard guard_;
#endif
};

inline DataType data_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DataType::kFloat32;
    case at::kHalf:
      return DataType::kFloat16;
    case at::kBFloat16:
      return DataType::kBFloat16;
    case at::kDouble:
      return DataType::kFloat64;
    default:
      TORCH_CHECK(false, "fastseg: expected float32, float16, bfloat16 or float64, but got ",
                  tensor.scalar_type());
  }
}

// Tests set FASTSEG_FORCE_INDEX64=1 to take the path for huge tensors with small ones.
inline bool force_index64() {
  const char* value = std::getenv("FASTSEG_FORCE_INDEX64");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

}  // namespace fastseg
