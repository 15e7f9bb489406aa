// Copies from global to shared memory that run while the thread goes on computing (cp.async, from
// sm_80). Issue some, commit them as a group, and wait before anybody reads them:
//
//     cp_async_16(&tile[stage][i], &x[o]);  // 16 bytes; both addresses multiples of 16
//     cp_async_commit();                    // closes a group of copies, also an empty one
//     cp_async_wait<1>();                   // all groups but the newest 1 have landed ...
//     __syncthreads();                      // ... and after a barrier, everybody's have
//
// Compiled with -DFASTSEG_HOST the destination holds NaN from the issue until the wait.
#pragma once

#ifdef FASTSEG_HOST
#include "csrc/host/cuda_on_cpu.h"
#endif

namespace fastseg {

#ifdef FASTSEG_HOST

inline void cp_async_16(void* shared, const void* global, host::Place place = host::Place::here()) {
  host::async_copy(shared, global, 16, 16, place);
}

// Zeros if not `valid`; `global` is not read then.
inline void cp_async_16_or_zero(void* shared, const void* global, bool valid,
                                host::Place place = host::Place::here()) {
  host::async_copy(shared, global, 16, valid ? 16 : 0, place);
}

inline void cp_async_commit() { host::async_commit(); }

template <int kPendingGroups>
void cp_async_wait() {
  static_assert(kPendingGroups >= 0);
  host::async_wait(kPendingGroups);
}

#else

__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// Zeros if not `valid`; `global` is not read then.
__device__ __forceinline__ void cp_async_16_or_zero(void* shared, const void* global, bool valid) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPendingGroups>
__device__ __forceinline__ void cp_async_wait() {
  static_assert(kPendingGroups >= 0);
  asm volatile("cp.async.wait_group %0;" ::"n"(kPendingGroups) : "memory");
}

#endif

}  // namespace fastseg
