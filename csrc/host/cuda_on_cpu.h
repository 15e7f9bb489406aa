// Lets g++ compile fastseg's CUDA kernels and run them on the CPU, one OS thread, same result every
// time. For tests: what a GPU does silently wrong once in a thousand runs fails here at once, with
// line numbers, on a machine without a GPU. csrc/common/launch.cuh includes this header when it is
// compiled with -DFASTSEG_HOST; csrc/host/build.py knows the compiler flags.
//
// How it works. launch() runs the blocks of the grid one after another. Every CUDA thread is a
// fiber: a function with a stack of its own. A fiber runs until it has to wait for others, at a
// __syncthreads() or in a warp operation; then the scheduler (executor.cpp) enters the next one:
//
//     thread 0  ===|      ===|             = runs
//     thread 1     ===|      ===|          | waits for the others
//     thread 2        ===|      ===|       when all have arrived, they go on in the chosen order
//
// Threads that never wait share one fiber. A thread costs about 6 ns, and 40 to 70 ns more whenever
// it waits; three times that under the sanitizers.
//
// What it shows:
// - Barriers. All threads of a block that have not exited must meet the same __syncthreads(), that
//   is the same line; else the launch throws and names the lines where they wait.
// - Warp operations (__shfl_*_sync, __ballot_sync, __any_sync, __all_sync, __syncwarp, mma.sync).
//   All lanes of the mask that have not exited must meet at the same line with the same mask;
//   a caller outside its own mask is an error; a value from a lane that takes no part is poison.
//   (CUDA lets __syncwarp() on different lines match. Here it does not.)
// - Races. The environment variable FASTSEG_HOST_ORDER = forward | reverse | shuffled:SEED chooses
//   in which order blocks and threads start, and go on after they met. Correct kernels give the
//   same bits in every order; a missing barrier changes them in some order.
// - Reads of what nobody wrote. Shared memory is filled with poison, 0xFF in every byte, before
//   each block: NaN in every floating-point type.
// - Asynchronous copies (csrc/common/async_copy.cuh). The destination is poisoned when the copy is
//   issued and written only when the issuing thread waits for it.
// - Addresses out of bounds, misaligned vector accesses and signed overflow, when compiled with
//   AddressSanitizer and UndefinedBehaviorSanitizer. Every shared array is a heap block of its
//   exact size; the sanitizers are told of every change of stacks.
//
// What it does not show: memory order between threads (everything is sequentially consistent),
// anything about speed, bank conflicts or registers, and races that need two threads to alternate
// between two waits. Not there: atomics, __activemask(), cooperative groups, clusters, wgmma, TMA,
// half-precision arithmetic on pairs (convert to float), and waiting in a loop for another thread.
// assert() ends the process, as everywhere; __trap() throws out of launch().
#pragma once

#if defined(__CUDACC__)
#error "csrc/host/cuda_on_cpu.h replaces nvcc: compile with g++ -x c++ -DFASTSEG_HOST"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/host/executor.h"

// ---- Words of the language ----

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __launch_bounds__(...)
#define __grid_constant__
// g++ cannot tell where such a variable is, and so could neither poison nor guard it.
#define __shared__ _Pragma("GCC error \"declare shared memory by FASTSEG_SHARED, see launch.cuh\"")

constexpr int warpSize = fastseg::host::kWarpSize;

// FASTSEG_SHARED and FASTSEG_DYNAMIC_SHARED are explained in csrc/common/launch.cuh.
#define FASTSEG_SHARED(type, name, ...)                                            \
  using name##_shared_type = type __VA_ARGS__;                                     \
  static const char name##_shared_key = 0;                                         \
  name##_shared_type& name = *static_cast<name##_shared_type*>(                    \
      fastseg::host::static_shared(&name##_shared_key, sizeof(name##_shared_type), \
                                   alignof(name##_shared_type), fastseg::host::Place::here()))
#define FASTSEG_DYNAMIC_SHARED(name) unsigned char* const name = fastseg::host::dynamic_shared()

// ---- Barriers ----

namespace fastseg::host {

// The parts of a vote: a predicate goes in, one number for all members comes out.
struct Vote {
  int predicate;
  uint32_t result;
};

inline Vote& vote(void* part) { return *static_cast<Vote*>(part); }

inline int vote_in_block(const char* operation, int predicate, Complete complete, Place place) {
  Vote mine{predicate, 0};
  meet_in_block(operation, &mine, complete, place);
  return static_cast<int>(mine.result);
}

// Gives every member of the block count(how many there are, how many of their predicates hold).
template <typename Count>
void complete_block_vote(void* const* parts, Count count) {
  int members = 0, votes = 0;
  for (int i = 0; i < block_threads(); ++i) {
    if (parts[i] == nullptr) continue;
    ++members;
    votes += vote(parts[i]).predicate != 0;
  }
  for (int i = 0; i < block_threads(); ++i) {
    if (parts[i] != nullptr) vote(parts[i]).result = count(members, votes);
  }
}

// Bit i of `votes` is the predicate of lane i, of `members` whether it takes part.
template <typename Count>
void complete_warp_vote(void* const* parts, Count count) {
  uint32_t members = 0, votes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (parts[lane] == nullptr) continue;
    members |= uint32_t{1} << lane;
    if (vote(parts[lane]).predicate != 0) votes |= uint32_t{1} << lane;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (parts[lane] != nullptr) vote(parts[lane]).result = count(members, votes);
  }
}

inline uint32_t vote_in_warp(const char* operation, uint32_t mask, int predicate, Complete complete,
                             Place place) {
  Vote mine{predicate, 0};
  meet_in_warp(operation, mask, &mine, complete, place);
  return mine.result;
}

}  // namespace fastseg::host

inline void __syncthreads(fastseg::host::Place place = fastseg::host::Place::here()) {
  fastseg::host::meet_in_block("__syncthreads", nullptr, [](void* const*) {}, place);
}

inline int __syncthreads_count(int predicate,
                               fastseg::host::Place place = fastseg::host::Place::here()) {
  return fastseg::host::vote_in_block(
      "__syncthreads_count", predicate,
      [](void* const* parts) {
        fastseg::host::complete_block_vote(parts, [](int, int votes) { return votes; });
      },
      place);
}

inline int __syncthreads_and(int predicate,
                             fastseg::host::Place place = fastseg::host::Place::here()) {
  return fastseg::host::vote_in_block(
      "__syncthreads_and", predicate,
      [](void* const* parts) {
        fastseg::host::complete_block_vote(parts,
                                           [](int members, int votes) { return votes == members; });
      },
      place);
}

inline int __syncthreads_or(int predicate,
                            fastseg::host::Place place = fastseg::host::Place::here()) {
  return fastseg::host::vote_in_block(
      "__syncthreads_or", predicate,
      [](void* const* parts) {
        fastseg::host::complete_block_vote(parts, [](int, int votes) { return votes != 0; });
      },
      place);
}

inline void __threadfence_block() {}
inline void __threadfence() {}

// ---- Warp operations ----

inline void __syncwarp(unsigned mask = 0xffffffff,
                       fastseg::host::Place place = fastseg::host::Place::here()) {
  fastseg::host::meet_in_warp("__syncwarp", mask, nullptr, [](void* const*) {}, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              fastseg::host::Place place = fastseg::host::Place::here()) {
  return fastseg::host::vote_in_warp(
      "__ballot_sync", mask, predicate,
      [](void* const* parts) {
        fastseg::host::complete_warp_vote(parts, [](uint32_t, uint32_t votes) { return votes; });
      },
      place);
}

inline int __any_sync(unsigned mask, int predicate,
                      fastseg::host::Place place = fastseg::host::Place::here()) {
  return static_cast<int>(fastseg::host::vote_in_warp(
      "__any_sync", mask, predicate,
      [](void* const* parts) {
        fastseg::host::complete_warp_vote(parts,
                                          [](uint32_t, uint32_t votes) { return votes != 0; });
      },
      place));
}

inline int __all_sync(unsigned mask, int predicate,
                      fastseg::host::Place place = fastseg::host::Place::here()) {
  return static_cast<int>(fastseg::host::vote_in_warp(
      "__all_sync", mask, predicate,
      [](void* const* parts) {
        fastseg::host::complete_warp_vote(
            parts, [](uint32_t members, uint32_t votes) { return votes == members; });
      },
      place));
}

namespace fastseg::host {

inline int lane_of_running_thread() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) %
                          kWarpSize);
}

// The value of `source_lane`; poison, if that lane takes no part.
template <typename T>
T shuffle(const char* operation, uint32_t mask, T value, int source_lane, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  struct Part {
    T value, result;
    int source_lane;
  } mine{value, value, source_lane};
  meet_in_warp(
      operation, mask, &mine,
      [](void* const* parts) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
          if (parts[lane] == nullptr) continue;
          Part& part = *static_cast<Part*>(parts[lane]);
          const Part* source = static_cast<const Part*>(parts[part.source_lane]);
          if (source != nullptr) {
            part.result = source->value;
          } else {
            std::memset(static_cast<void*>(&part.result), 0xFF, sizeof(T));
          }
        }
      },
      place);
  return mine.result;
}

// Shuffles work within sections of `width` lanes; the first lane of the caller's section.
inline int section(int lane, int width, const char* operation, Place place) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail(std::string(operation) + ": width must be a power of two up to 32, but is " +
             std::to_string(width),
         place);
  }
  return lane & ~(width - 1);
}

}  // namespace fastseg::host

template <typename T>
T __shfl_sync(unsigned mask, T value, int source_lane, int width = warpSize,
              fastseg::host::Place place = fastseg::host::Place::here()) {
  const int lane = fastseg::host::lane_of_running_thread();
  const int first = fastseg::host::section(lane, width, "__shfl_sync", place);
  return fastseg::host::shuffle("__shfl_sync", mask, value, first + (source_lane & (width - 1)),
                                place);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 fastseg::host::Place place = fastseg::host::Place::here()) {
  const int lane = fastseg::host::lane_of_running_thread();
  const int first = fastseg::host::section(lane, width, "__shfl_up_sync", place);
  const int64_t source = lane - int64_t{delta};
  return fastseg::host::shuffle("__shfl_up_sync", mask, value,
                                source < first ? lane : static_cast<int>(source), place);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   fastseg::host::Place place = fastseg::host::Place::here()) {
  const int lane = fastseg::host::lane_of_running_thread();
  const int first = fastseg::host::section(lane, width, "__shfl_down_sync", place);
  const int64_t source = lane + int64_t{delta};
  return fastseg::host::shuffle("__shfl_down_sync", mask, value,
                                source >= first + width ? lane : static_cast<int>(source), place);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  fastseg::host::Place place = fastseg::host::Place::here()) {
  const int lane = fastseg::host::lane_of_running_thread();
  const int first = fastseg::host::section(lane, width, "__shfl_xor_sync", place);
  const int source = lane ^ (lane_mask & (warpSize - 1));
  return fastseg::host::shuffle("__shfl_xor_sync", mask, value,
                                source >= first + width ? lane : source, place);
}

[[noreturn]] inline void __trap(fastseg::host::Place place = fastseg::host::Place::here()) {
  fastseg::host::fail("__trap", place);
}

// ---- Loads and stores with cache hints: plain ones here ----

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

// ---- Arithmetic ----

// As in CUDA: of a NaN and a number, the number; of two integers, their common type.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
template <typename A, typename B,
          typename = std::enable_if_t<std::is_integral_v<A> && std::is_integral_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B,
          typename = std::enable_if_t<std::is_integral_v<A> && std::is_integral_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// The fast approximations are exact here. (Macros, because glibc declares some of these names.)
#define __expf(x) (::expf(x))
#define __logf(x) (::logf(x))
#define __fdividef(x, y) (static_cast<float>(x) / static_cast<float>(y))
#define rsqrtf(x) (1.0f / ::sqrtf(x))
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

namespace fastseg::host {

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace fastseg::host

inline int __float_as_int(float x) { return fastseg::host::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return fastseg::host::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return fastseg::host::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return fastseg::host::bits_as<float>(x); }
