// Memory that a thread keeps between calls. For .cpp files with torch headers.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace fastseg {

// At least `bytes`, aligned to 64; what an earlier call left in it is undefined.
inline char* thread_scratch(int64_t bytes) {
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

}  // namespace fastseg
