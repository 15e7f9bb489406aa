// Division by a number known on the host only, as one multiplication and one shift on the device.
#pragma once

#include <cstdint>

#include "csrc/common/launch.cuh"

namespace fastseg {

// For 0 <= dividend < 2^31 and 1 <= divisor < 2^31. With 2^shift >= divisor > 2^(shift - 1) and
// multiplier = floor(2^32 * (2^shift - divisor) / divisor) + 1, the quotient is
// (dividend * (2^32 + multiplier)) >> (32 + shift), exactly.
struct Divider {
  uint32_t multiplier = 1, shift = 0;
  int divisor = 1;

  Divider() = default;
  explicit Divider(int d) : divisor(d) {
    while ((uint64_t{1} << shift) < static_cast<uint64_t>(d)) ++shift;
    const uint64_t wanted = (uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1;
    multiplier = static_cast<uint32_t>(wanted);
  }

  __device__ __forceinline__ int quotient(int dividend) const {
    const uint32_t n = static_cast<uint32_t>(dividend);
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> 32);
    return static_cast<int>((high + n) >> shift);
  }
};

}  // namespace fastseg
