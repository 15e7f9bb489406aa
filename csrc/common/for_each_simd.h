// Compiles the kernel header named by FASTSEG_KERNELS once per instruction set, into the namespaces
// fastseg::avx512, fastseg::avx2 (both on x86 only) and fastseg::plain. See csrc/common/simd.h for
// what such a header may do:
//
//   #define FASTSEG_KERNELS "csrc/family/family_cpu_kernels.h"
//   #include "csrc/common/for_each_simd.h"
//
// No include guard: that is the point.

#include "csrc/common/simd.h"

#if FASTSEG_SIMD_X86
#define FASTSEG_SIMD avx512
#define FASTSEG_SIMD_BYTES 64
FASTSEG_TARGET_AVX512
#include FASTSEG_KERNELS
FASTSEG_TARGET_END
#undef FASTSEG_SIMD
#undef FASTSEG_SIMD_BYTES
#undef FASTSEG_SIMD_INCLUDED

#define FASTSEG_SIMD avx2
#define FASTSEG_SIMD_BYTES 32
FASTSEG_TARGET_AVX2
#include FASTSEG_KERNELS
FASTSEG_TARGET_END
#undef FASTSEG_SIMD
#undef FASTSEG_SIMD_BYTES
#undef FASTSEG_SIMD_INCLUDED
#endif

#define FASTSEG_SIMD plain
#define FASTSEG_SIMD_BYTES 16
#include FASTSEG_KERNELS
#undef FASTSEG_SIMD
#undef FASTSEG_SIMD_BYTES
#undef FASTSEG_SIMD_INCLUDED
