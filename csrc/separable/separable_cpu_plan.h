// How a depthwise-separable convolution on the CPU is cut: into bands of rows, whose intermediate
// stays in a second-level cache, and into blocks of channels. Free of torch headers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "csrc/common/live_taps.h"
#include "csrc/depthwise/depthwise_cpu_plan.h"

namespace fastseg {
namespace separable_cpu {

// Neighbouring blocks of the depthwise call, and the channels of the intermediate that they give.
struct DepthBlock {
  int64_t first, last;     // depthwise blocks
  int64_t channel, depth;  // of the intermediate
};

// One separable convolution. The pointwise weight is packed, block after block, see product.h.
struct Call {
  depthwise_cpu::Call depthwise;
  std::vector<DepthBlock> blocks;
  int64_t P, Q, K, depth;  // depth: of the intermediate
  const void* weight;      // [K][depth], rows `weight_stride` apart
  int64_t weight_stride;
  void* panels;  // in the accumulation type
  depthwise_cpu::Image target;
  bool direct;        // sums are built up in the target itself
  const void* scale;  // [K] in the accumulation type, or nullptr
  const void* bias;   // likewise
  Activation activation;
  int64_t bands, block_columns;

  int64_t deepest() const {
    int64_t most = 0;
    for (const DepthBlock& block : blocks) most = std::max(most, block.depth);
    return most;
  }
  int64_t band_rows() const { return ceil_div(P, bands); }
};

// What a band's intermediate may take of a second-level cache, and the panels beside it.
constexpr int64_t kIntermediateBytes = int64_t{512} << 10;
constexpr int64_t kPanelBytes = int64_t{256} << 10;
// Products that are summed up in registers, at most: deep blocks bring sums to memory less often.
constexpr int64_t kDepth = 512;

// Cuts the channels and the rows. `threads`: how many bands should be ready at a time; results do
// not depend on it.
inline void cut(int64_t item, int64_t panel_columns, int64_t threads, Call* call) {
  const depthwise_cpu::Call& depthwise = call->depthwise;
  const int64_t m = depthwise.multiplier;
  const int64_t wanted = ceil_div(call->depth, ceil_div(call->depth, kDepth));
  DepthBlock block{0, 0, 0, 0};
  for (int64_t i = 0; i < depthwise.block_count(); ++i) {
    block.depth += depthwise.blocks[i].channels * m;
    block.last = i + 1;
    if (block.depth >= wanted || block.last == depthwise.block_count()) {
      call->blocks.push_back(block);
      block = {block.last, block.last, block.channel + block.depth, 0};
    }
  }
  const int64_t deepest = call->deepest();
  call->block_columns =
      std::min(round_up(call->K, panel_columns),
               std::max(panel_columns, kPanelBytes / (deepest * std::max<int64_t>(item, 4)) /
                                           panel_columns * panel_columns));
  const int64_t rows = std::max<int64_t>(1, kIntermediateBytes / (deepest * call->Q * item));
  // Every thread the same number of bands.
  const int64_t at_once = ceil_div(threads, depthwise.N);
  call->bands = std::min(call->P, round_up(ceil_div(call->P, rows), at_once));
}

}  // namespace separable_cpu
}  // namespace fastseg
