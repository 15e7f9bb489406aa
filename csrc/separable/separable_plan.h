// What a launch of separable convolutions covers, and in which tiles. Plain arithmetic on the host,
// the same on every machine with the same number of multiprocessors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "csrc/common/divider.h"
#include "csrc/dilated/dilated_plan.h"
#include "csrc/separable/separable.h"

namespace fastseg {
namespace separable {

using dilated::to_int;

// ---- Branches, as kernels receive them ----

// So many of them fit into a kernel's parameters; more take several launches.
constexpr int kMaxBranches = 8;

struct BranchParams {
  const void* filter;  // [channels, filter_rows, filter_columns], or nullptr: z is x
  int filter_rows, filter_columns;
  int pad_top, pad_left;
  int dilation_h, dilation_w;
  int64_t row_step, column_step;  // from tap to tap of the input, in elements
  const void* scale;              // [channels] or nullptr, and
  const void* bias;               // [channels] or nullptr, of z

  const void* weight;   // [columns, channels]
  int64_t weight_line;  // from column to column
  int columns;
  int first_column_tile;  // of those of the launch
  int first_channel;      // of the target
  bool target_vectors;    // whether 16 bytes of its channels can be stored at once
};

struct SeparableParams {
  BranchParams branches[kMaxBranches];  // the most expensive first, lest one of them start last
  int branch_count;
  int column_tiles;  // of all branches
  int images;
  Divider rows, columns;  // of the target
  int H, W;
  int channels;        // of z
  Divider multiplier;  // of them for one of the input's
  int stride_h, stride_w;
  const void* input;
  Strides4 input_strides;
  Activation depthwise_activation;
  bool wide_depthwise_bias;
  int target_channels;  // of all branches of all launches
  const void* scale;    // [target_channels] or nullptr
  const void* bias;     // [target_channels] or nullptr
  bool wide_bias;
  Activation activation;
  void* target;
  Strides4 target_strides;
  void* statistics;  // [tiles of pixels, 2, target_channels] or nullptr
};

inline BranchParams branch_params(const SeparableArgs& args, const SeparableBranch& branch) {
  BranchParams params{};
  params.filter = branch.depthwise_weight;
  if (params.filter != nullptr) {
    params.filter_rows = to_int(branch.R), params.filter_columns = to_int(branch.S);
    to_int(branch.R * branch.S * dilated::kChunkBytes);
    params.pad_top = to_int(branch.pad_top), params.pad_left = to_int(branch.pad_left);
    params.dilation_h = to_int(branch.dilation_h), params.dilation_w = to_int(branch.dilation_w);
    // What the last tap of the last pixel reads is counted as well, also if it lies in the padding.
    to_int((args.P - 1) * args.stride_h + (branch.R - 1) * branch.dilation_h);
    to_int((args.Q - 1) * args.stride_w + (branch.S - 1) * branch.dilation_w);
    params.row_step = branch.dilation_h * args.input_strides.h;
    params.column_step = branch.dilation_w * args.input_strides.w;
    params.scale = branch.depthwise_scale, params.bias = branch.depthwise_bias;
  }
  params.weight = branch.weight, params.weight_line = branch.weight_strides.n;
  params.columns = to_int(branch.K), params.first_channel = to_int(branch.first_channel);
  const int64_t bytes = size_of(args.dtype);
  const auto* const first =
      static_cast<const char*>(args.output) + branch.first_channel * args.output_strides.c * bytes;
  params.target_vectors = args.output_strides.c == 1 &&
                          dilated::holds_chunks(first, args.output_strides, branch.K, args.dtype);
  return params;
}

// Everything but the branches.
inline SeparableParams separable_params(const SeparableArgs& args) {
  SeparableParams params{};
  params.images = to_int(args.N);
  params.rows = Divider(to_int(args.P)), params.columns = Divider(to_int(args.Q));
  params.H = to_int(args.H), params.W = to_int(args.W);
  params.channels = to_int(args.C * args.multiplier);
  params.multiplier = Divider(to_int(args.multiplier));
  params.stride_h = to_int(args.stride_h), params.stride_w = to_int(args.stride_w);
  params.input = args.input, params.input_strides = args.input_strides;
  params.depthwise_activation = args.depthwise_activation;
  params.wide_depthwise_bias = args.wide_depthwise_bias;
  params.target_channels = to_int(args.output_channels);
  params.scale = args.scale, params.bias = args.bias, params.wide_bias = args.wide_bias;
  params.activation = args.activation;
  params.target = args.output, params.target_strides = args.output_strides;
  params.statistics = args.statistics;
  return params;
}

// Those with the most taps first.
inline std::vector<SeparableBranch> in_launch_order(const SeparableArgs& args) {
  std::vector<SeparableBranch> branches(args.branches, args.branches + args.branch_count);
  const auto taps = [](const SeparableBranch& branch) {
    return branch.depthwise_weight == nullptr ? 0 : branch.R * branch.S;
  };
  std::stable_sort(
      branches.begin(), branches.end(),
      [&](const SeparableBranch& a, const SeparableBranch& b) { return taps(a) > taps(b); });
  return branches;
}

// ---- Tiles ----

// Whether x, weights and what belongs to z's channels can be moved in chunks of 16 bytes.
inline bool moves_chunks(const SeparableArgs& args) {
  if (args.multiplier != 1 ||
      !dilated::holds_chunks(args.input, args.input_strides, args.C, args.dtype)) {
    return false;
  }
  const auto holds = [&](const SeparableBranch& branch) {
    return dilated::holds_chunks(branch.weight, branch.weight_strides, args.C, args.dtype) &&
           dilated::is_aligned(branch.depthwise_scale, 16) &&
           dilated::is_aligned(branch.depthwise_bias, 16);
  };
  return std::all_of(args.branches, args.branches + args.branch_count, holds);
}

// What a tap costs for one element of z, in products of the matrix product: in a cycle a
// multiprocessor does about 1400 products of halves on its tensor cores, half as many of TF32, and
// 50 taps, partly at the same time. An estimate, as those of kTileCosts are.
inline int64_t tap_cost(const SeparableArgs& args) {
  if (size_of(args.dtype) == 2) return 24;
  return args.tf32 ? 12 : 2;
}

// Seconds times something that all tiles share. Narrow tiles make z more often.
inline double time_of(const SeparableArgs& args, const dilated::TileCost& cost) {
  const int64_t channels = args.C * args.multiplier;
  const int64_t tiles = ceil_div(args.N * args.P * args.Q, cost.rows);
  std::vector<dilated::Work> works;
  for (int64_t i = 0; i < args.branch_count; ++i) {
    const SeparableBranch& branch = args.branches[i];
    const int64_t taps = branch.depthwise_weight == nullptr ? 0 : branch.R * branch.S;
    works.push_back({tiles * ceil_div(branch.K, cost.columns),
                     channels + channels * taps * tap_cost(args) / cost.columns});
  }
  return dilated::time_of(works, cost, args.multiprocessors);
}

inline int choose_tile(const std::vector<dilated::TileCost>& costs, const SeparableArgs& args) {
  DilatedProblem problem{};
  problem.shared_bytes = args.shared_bytes, problem.forced = args.forced;
  return dilated::choose_tile(costs, problem,
                              [&](const dilated::TileCost& cost) { return time_of(args, cost); });
}

}  // namespace separable
}  // namespace fastseg
