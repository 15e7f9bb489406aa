// The one place where kernels are launched, for CUDA and for csrc/host alike:
//
//     launch(some_kernel<float, 3>, grid_size(blocks, planes), dim3(256), shared_bytes, stream, x,
//     y, P);
//
// Inside a kernel, shared memory is declared by one of two macros:
//
//     FASTSEG_SHARED(float, tile, [32][33]);  // __shared__ float tile[32][33];
//     FASTSEG_DYNAMIC_SHARED(bytes);          // unsigned char* bytes: as many as launch() was told
//
// Both begin at a multiple of 16 bytes. A type with a comma in it needs a name of its own (`using`)
// before it can go into FASTSEG_SHARED.
#pragma once

#include <cxxabi.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#ifdef FASTSEG_HOST
#include "csrc/host/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>

#define FASTSEG_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define FASTSEG_DYNAMIC_SHARED(name)                                      \
  extern __shared__ __align__(16) unsigned char fastseg_dynamic_shared[]; \
  unsigned char* const name = fastseg_dynamic_shared
#endif

namespace fastseg {

constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGridYZ = 65535;
constexpr int kMaxThreadsPerBlock = 1024;
// More dynamic shared memory than this must be asked for.
constexpr size_t kDefaultSharedBytes = 48 << 10;

// A grid from 64-bit sizes, which dim3 would silently cut to 32.
inline dim3 grid_size(int64_t x, int64_t y = 1, int64_t z = 1) {
  if (x < 1 || x > kMaxGridX || y < 1 || y > kMaxGridYZ || z < 1 || z > kMaxGridYZ) {
    throw std::runtime_error(
        "fastseg: expected a grid from (1, 1, 1) to (2147483647, 65535, 65535), but got (" +
        std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")");
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

namespace launch_detail {

#ifdef FASTSEG_HOST

inline std::string kernel_name(const void* kernel) { return host::kernel_name(kernel); }

#else

inline std::string kernel_name(const void* kernel) {
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, kernel) != cudaSuccess || mangled == nullptr) return "a kernel";
  int status;
  char* readable = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  const std::string name = status == 0 ? readable : mangled;
  std::free(readable);
  return name;
}

#endif

inline std::string text(dim3 size) {
  return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " +
         std::to_string(size.z) + ")";
}

[[noreturn]] inline void throw_error(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                                     const std::string& reason) {
  throw std::runtime_error("fastseg: cannot launch " + kernel_name(kernel) + " with grid " +
                           text(grid) + ", block " + text(block) + " and " +
                           std::to_string(shared_bytes) +
                           " bytes of dynamic shared memory: " + reason);
}

// What can be said without asking the device; empty if nothing is wrong.
inline std::string reason_against(dim3 grid, dim3 block) {
  if (grid.x < 1 || grid.x > kMaxGridX || grid.y < 1 || grid.y > kMaxGridYZ || grid.z < 1 ||
      grid.z > kMaxGridYZ) {
    return "a grid goes from (1, 1, 1) to (2147483647, 65535, 65535)";
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      threads > kMaxThreadsPerBlock) {
    return "a block has 1 to 1024 threads, at most 64 of them in z";
  }
  return "";
}

}  // namespace launch_detail

// Throws std::runtime_error with a sentence when the launch is refused. `args` are converted to the
// kernel's parameter types, as in a call. On the host it runs the kernel to its end.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            cudaStream_t stream, Args... args) {
  static_assert((std::is_trivially_copyable_v<Params> && ...));
  const void* const address = reinterpret_cast<const void*>(kernel);
  const auto refuse = [&](const std::string& reason) {
    launch_detail::throw_error(address, grid, block, dynamic_shared_bytes, reason);
  };
  if (const std::string reason = launch_detail::reason_against(grid, block); !reason.empty()) {
    refuse(reason);
  }

  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  } call{kernel, {static_cast<Params>(args)...}};
#ifdef FASTSEG_HOST
  static_cast<void>(stream);
  if (dynamic_shared_bytes > host::kMaxSharedBytesPerBlock) {
    refuse("a block has at most " + std::to_string(host::kMaxSharedBytesPerBlock) + " bytes");
  }
  const auto call_kernel = [](const void* pointer) {
    const Call& call = *static_cast<const Call*>(pointer);
    std::apply(call.kernel, call.params);
  };
  host::run(address, grid, block, dynamic_shared_bytes, call_kernel, &call);
#else
  cudaError_t error = cudaSuccess;
  if (dynamic_shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(dynamic_shared_bytes));
  }
  if (error == cudaSuccess) {
    const auto launch_kernel = [&](Params&... params) {
      void* pointers[] = {static_cast<void*>(&params)..., nullptr};
      return cudaLaunchKernel(address, grid, block, pointers, dynamic_shared_bytes, stream);
    };
    error = std::apply(launch_kernel, call.params);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // forgets it, lest it be reported again as somebody else's
    refuse(cudaGetErrorString(error));
  }
#endif
}

}  // namespace fastseg
