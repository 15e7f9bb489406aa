// Where this thread is, in signed integers: CUDA's own variables are unsigned 32-bit, whose
// products wrap silently. Block numbers are 64-bit, because they get multiplied by strides of
// tensors; what is bounded by the size of a block is an int.
#pragma once

#include <cstdint>

#ifdef FASTSEG_HOST
#include "csrc/host/cuda_on_cpu.h"
#endif

namespace fastseg {

__device__ __forceinline__ int64_t block_id_x() { return static_cast<int64_t>(blockIdx.x); }
__device__ __forceinline__ int64_t block_id_y() { return static_cast<int64_t>(blockIdx.y); }
__device__ __forceinline__ int64_t block_id_z() { return static_cast<int64_t>(blockIdx.z); }

__device__ __forceinline__ int64_t grid_size_x() { return static_cast<int64_t>(gridDim.x); }
__device__ __forceinline__ int64_t grid_size_y() { return static_cast<int64_t>(gridDim.y); }
__device__ __forceinline__ int64_t grid_size_z() { return static_cast<int64_t>(gridDim.z); }

__device__ __forceinline__ int thread_id_x() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int thread_id_y() { return static_cast<int>(threadIdx.y); }
__device__ __forceinline__ int thread_id_z() { return static_cast<int>(threadIdx.z); }

__device__ __forceinline__ int block_size_x() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int block_size_y() { return static_cast<int>(blockDim.y); }
__device__ __forceinline__ int block_size_z() { return static_cast<int>(blockDim.z); }

// x fastest, as CUDA forms warps.
__device__ __forceinline__ int thread_id_in_block() {
  return thread_id_x() + block_size_x() * (thread_id_y() + block_size_y() * thread_id_z());
}
__device__ __forceinline__ int lane_id() { return thread_id_in_block() % 32; }
__device__ __forceinline__ int warp_id() { return thread_id_in_block() / 32; }

}  // namespace fastseg
