// Runs one kernel launch on the CPU: what cuda_on_cpu.h and the .cuh files of csrc/common need from
// the scheduler. Kernels do not use this header themselves.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <string>

#pragma GCC visibility push(hidden)

// CUDA's variables of these names. The scheduler sets them whenever it enters a thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace fastseg::host {

// A place in a source file. As the default argument `Place place = Place::here()` it is the
// caller's place.
struct Place {
  const char* file;
  int line;
  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return Place{file, line};
  }
};

// The limits of an H100/H200 (compute capability 9.0).
constexpr int kWarpSize = 32;
constexpr int kMaxThreadsPerBlock = 1024;
constexpr size_t kMaxSharedBytesPerBlock = 227 << 10;

// Calls body(argument) once for every thread of the grid, one block after another. Throws
// std::runtime_error when the threads of a block misuse a barrier, a warp operation or the like;
// what body throws comes out as it is. `kernel` only names the launch in messages.
void run(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
         void (*body)(const void* argument), const void* argument);

// "fastseg::some_kernel<float, 3>(float*)" from a kernel's address.
std::string kernel_name(const void* kernel);

// ---- Called by threads of the running block ----

// The block's dynamic shared memory: exactly as many bytes as the launch asked for.
unsigned char* dynamic_shared();

// The block's static shared memory for the variable that `key` stands for.
void* static_shared(const void* key, size_t bytes, size_t alignment, Place place);

// Something that threads do together: nobody goes on before all have arrived, and all have to
// arrive at the same place. The last one to arrive calls `complete` for everybody, with the parts
// of all members in thread order (nullptr where a thread has exited or never existed).
using Complete = void (*)(void* const* parts);

// Members: the lanes in `mask`. With `all_lanes`, exited lanes are an error too (mma.sync).
void meet_in_warp(const char* operation, uint32_t mask, void* part, Complete complete, Place place,
                  bool all_lanes = false);

// Members: every thread of the block that has not exited.
void meet_in_block(const char* operation, void* part, Complete complete, Place place);

// How many threads the running block has, exited ones included: the length of a block's `parts`.
int block_threads();

// cp.async: the copy happens at the wait, and until then the destination is poisoned.
void async_copy(void* shared, const void* global, size_t bytes, size_t source_bytes, Place place);
void async_commit();
void async_wait(int groups_still_pending);

// Ends the launch with an error that names the running thread.
[[noreturn]] void fail(const std::string& message, Place place);

}  // namespace fastseg::host

#pragma GCC visibility pop
