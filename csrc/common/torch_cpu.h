// What the torch side of every CPU operator shares: from a tensor's dtype to the type that kernels
// are compiled for, and memory of a thread. Included by <family>_cpu.cpp only.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "csrc/common/simd.h"

namespace fastseg {

// function(S{}) for the storage type S that `type` stands for.
template <class Function>
auto with_storage(at::ScalarType type, const Function& function) {
  switch (type) {
    case at::kFloat:
      return function(float{});
    case at::kDouble:
      return function(double{});
    case at::kHalf:
      return function(Half{});
    case at::kBFloat16:
      return function(BFloat16{});
    default:
      TORCH_CHECK(false, "fastseg: expected float64, float32, float16 or bfloat16, but got ", type);
  }
}

// What such elements are summed in.
inline at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Memory that a thread keeps between calls, one for each `Use`: at least `bytes`, aligned to 64;
// what an earlier call left in it is undefined.
template <class Use = void>
char* thread_scratch(int64_t bytes) {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    const int64_t rounded = (bytes + 63) / 64 * 64;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, rounded)));
    size = memory == nullptr ? 0 : rounded;
    TORCH_CHECK(memory != nullptr, "fastseg: could not allocate ", rounded,
                " bytes of scratch memory");
  }
  return memory.get();
}

// Runs task(i) for every i in [0, tasks) on at most `threads` threads; whoever is free takes the
// next.
template <class Task>
void run_tasks(int64_t tasks, int64_t threads, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(tasks, threads), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) task(i);
  });
}

// A thread is not woken for less than a million multiply-adds.
inline int64_t threads_for(int64_t products) {
  return std::clamp<int64_t>(products >> 20, 1, at::get_num_threads());
}

}  // namespace fastseg
