// Depthwise-separable convolution on the CPU, compiled once per instruction set: see
// csrc/common/simd.h.
//
//     z[n, c, p, q] = dact(bias_d[c] + sum over live taps of dw[c, r, s] * x[n, c / m, ...])
//     y[n, k, p, q] = act(bias[k] + scale[k] * sum over c of pw[k, c] * z[n, c, p, q])
//
// A task is a band of rows of one image. For one block of channels after the other it lets the
// depthwise kernels (csrc/depthwise) write the band of z into scratch memory, which stays in the
// second-level cache, and multiplies it from there (csrc/common/product.h):
//
//     x rows --depthwise--> z [pixels of the band][<= ~512 channels] --product--> sums += z * panel
//
// z never goes to memory. The pointwise weight is packed before, once a call, into panels that all
// tasks read. Traffic: x once and the rows where bands meet twice, y once, the panels once a band
// from the last-level cache.

#include "csrc/common/product.h"
#include "csrc/depthwise/depthwise_cpu_kernels.h"
#include "csrc/separable/separable_cpu_plan.h"

namespace fastseg {
namespace FASTSEG_SIMD {

using separable_cpu::DepthBlock;

template <class T>
struct SeparableScratch {
  T* tile;     // [kTileRows][kTilePitch], for rows that have to be widened
  T* sums;     // [pixels][K], where they cannot wait in the target
  char* z;     // [pixels][pitch]
  char* rest;  // the depthwise kernels'
  int64_t bytes;
};

// Rows of z are a cache line further apart than they are long: never 4 KB.
template <class S>
inline int64_t pitch_of(int64_t depth) {
  constexpr int64_t kLine = 64 / sizeof(S);
  return (depth + kLine - 1) / kLine * kLine + kLine;
}

template <class S>
inline auto separable_scratch(const separable_cpu::Call& call, char* base) {
  using T = typename Accumulator<S>::type;
  Arena arena{base};
  const int64_t pixels = call.band_rows() * call.Q;
  SeparableScratch<T> scratch;
  scratch.tile = arena.take<T>(kTileRows * kTilePitch<T>);
  scratch.sums = arena.take<T>(call.direct ? 0 : pixels * call.K);
  scratch.z = reinterpret_cast<char*>(arena.take<S>(pixels * pitch_of<S>(call.deepest())));
  scratch.rest = base == nullptr ? nullptr : base + arena.used;
  scratch.bytes = arena.used + Scratch<T>(call.depthwise, nullptr).bytes;
  return scratch;
}

template <class S>
int64_t separable_scratch_bytes(const separable_cpu::Call& call) {
  return separable_scratch<S>(call, nullptr).bytes;
}

// Elements of all panels.
template <class S>
int64_t separable_panels(const separable_cpu::Call& call) {
  return packed_size<typename Accumulator<S>::type>(call.K, call.depth);
}

// The panels of columns [k, ...) of one block lie behind those of the blocks before it.
template <class S, class T>
inline T* panels_of(const separable_cpu::Call& call, const DepthBlock& block, int64_t k) {
  return static_cast<T*>(call.panels) + packed_size<T>(call.K, block.channel) + k * block.depth;
}

// Packs the pointwise weight of block `index`.
template <class S>
void pack_separable(const separable_cpu::Call& call, int64_t index) {
  using T = typename Accumulator<S>::type;
  const DepthBlock& block = call.blocks.data()[index];
  pack_panels(static_cast<const S*>(call.weight) + block.channel, call.weight_stride, 1, call.K,
              block.depth, panels_of<S, T>(call, block, 0), 0, block.depth);
}

// sums [pixels][..] (+)= z * panels, all columns.
template <class S, class T>
inline void multiply_band(const separable_cpu::Call& call, const DepthBlock& block, const S* z,
                          int64_t pitch, int64_t pixels, T* sums, int64_t sums_pitch,
                          const Finish<T>* finish, T* tile) {
  // Tiles of equal height: three of 11 rows rather than two of 14 and one of 5.
  const int64_t tiles = (pixels + kTileRows - 1) / kTileRows;
  for (int64_t k = 0; k < call.K; k += call.block_columns) {
    const int64_t columns = call.K - k < call.block_columns ? call.K - k : call.block_columns;
    const T* panels = panels_of<S, T>(call, block, k);
    Finish<T> rest = finish == nullptr ? Finish<T>{} : *finish;
    if (rest.scale != nullptr) rest.scale += k;
    if (rest.bias != nullptr) rest.bias += k;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t begin = pixels * i / tiles, end = pixels * (i + 1) / tiles;
      T* targets[kTileRows];
      for (int64_t row = begin; row < end; ++row) {
        targets[row - begin] = sums + row * sums_pitch + k;
      }
      const T* from = tile;
      int64_t from_pitch = kTilePitch<T>;
      if constexpr (std::is_same_v<S, T>) {
        from = z + begin * pitch;
        from_pitch = pitch;
      } else {
        fill_tile(z + begin * pitch, pitch, 1, end - begin, block.depth, tile);
      }
      multiply_tile(from, from_pitch, static_cast<int>(end - begin), panels, block.depth, targets,
                    columns, block.channel == 0, finish == nullptr ? nullptr : &rest);
    }
  }
}

// Band `index` of [N][bands].
template <class S>
void run_separable(const separable_cpu::Call& call, int64_t index, char* buffer) {
  using T = typename Accumulator<S>::type;
  const SeparableScratch<T> scratch = separable_scratch<S>(call, buffer);
  const Scratch<T> depthwise(call.depthwise, scratch.rest);
  const int64_t image = index / call.bands, band = index % call.bands;
  const int64_t begin = call.P * band / call.bands, end = call.P * (band + 1) / call.bands;
  const int64_t pixels = (end - begin) * call.Q;
  S* z = reinterpret_cast<S*>(scratch.z);
  S* y = static_cast<S*>(call.target.data) + image * call.target.stride_n +
         begin * call.target.stride_h;
  const Finish<T> finish = {static_cast<const T*>(call.scale), static_cast<const T*>(call.bias),
                            call.activation};
  T* sums = scratch.sums;
  int64_t sums_pitch = call.K;
  if constexpr (std::is_same_v<S, T>) {
    if (call.direct) sums = y, sums_pitch = call.target.stride_w;
  }

  for (const DepthBlock& block : call.blocks) {
    const int64_t pitch = pitch_of<S>(block.depth);
    const Image into = {z, 0, 1, call.Q * pitch, pitch};
    for (int64_t i = block.first; i < block.last; ++i) {
      const Block& own = call.depthwise.blocks.data()[i];
      if (own.direct_source) {
        Task<S, S, S>(call.depthwise, depthwise, own, image, begin, end, into, block.channel)
            .forward();
      } else {
        Task<S, T, T>(call.depthwise, depthwise, own, image, begin, end, into, block.channel)
            .forward();
      }
    }
    const bool last = block.channel + block.depth == call.depth;
    multiply_band(call, block, z, pitch, pixels, sums, sums_pitch,
                  last && call.direct ? &finish : nullptr, scratch.tile);
  }
  for (int64_t row = 0; row < end - begin && !call.direct; ++row) {
    finish_pixels(sums + row * call.Q * sums_pitch, sums_pitch, call.Q, call.K, finish,
                  y + row * call.target.stride_h, call.target.stride_c, call.target.stride_w);
  }
}

}  // namespace FASTSEG_SIMD
}  // namespace fastseg
