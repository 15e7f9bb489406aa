// Forward over short phases, see depthwise_phases.cuh.
#pragma once

#include "csrc/depthwise/depthwise_forward.cuh"
#include "csrc/depthwise/depthwise_phases.cuh"

namespace fastseg {
namespace depthwise {

template <typename T, int VEC, int TILE>
__global__ void __launch_bounds__(PhaseTraits<T, VEC, TILE>::kMaxThreads,
                                  PhaseTraits<T, VEC, TILE>::kForwardBlocks)
    depthwise_forward_phases(const __grid_constant__ ForwardParams params) {
  using Traits = PhaseTraits<T, VEC, TILE>;
  using Acc = typename Traits::Acc;

  FASTSEG_DYNAMIC_SHARED(shared);
  const Walks& walks = params.walks;
  const Role role = role_of_thread<VEC>(walks);

  Acc weights[3][3][VEC];
  load_weights<T, VEC, 3>(static_cast<const T*>(params.weight), params.weight_strides,
                          role.first_channel, params.K, role.lane, walks.lanes,
                          reinterpret_cast<Acc*>(shared), weights);
  if (role.channel >= params.K) return;
  Acc bias[VEC] = {};
  if (params.bias != nullptr) {
    widen(load_pack<T, VEC>(static_cast<const T*>(params.bias) + role.channel), bias);
  }
  const T* const input = static_cast<const T*>(params.input) + role.channel;  // [N, H, W]
  T* const output = static_cast<T*>(params.output) + role.channel;            // [N, H, W]

  for (int item = role.worker * walks.groups + role.group; item < walks.items;
       item += walks.workers * walks.groups) {
    const Phase phase = locate_phase<TILE>(params, item);
    const T* const source = input + offset_of(phase, params.input_strides);
    T* const target = output + offset_of(phase, params.output_strides);

    with_counts<TILE>(phase, [&](auto rows, auto columns) {
      constexpr int ROWS = decltype(rows)::value, COLUMNS = decltype(columns)::value;
      const auto x =
          load_tile<T, VEC, ROWS, COLUMNS>(source, params.input_row_step, params.input_column_step);
      Acc sums[ROWS * COLUMNS][VEC] = {};
#pragma unroll
      for (int i = 0; i < ROWS * COLUMNS; ++i) {
        Acc value[VEC];
        widen(x.at[i], value);
#pragma unroll
        for (int o = 0; o < ROWS * COLUMNS; ++o) {
          const int r = tap_between(i / COLUMNS, o / COLUMNS);
          const int s = tap_between(i % COLUMNS, o % COLUMNS);
          if (!is_tap(r) || !is_tap(s)) continue;
#pragma unroll
          for (int v = 0; v < VEC; ++v) {
            sums[o][v] = multiply_add(value[v], weights[r][s][v], sums[o][v]);
          }
        }
      }
      if (params.bias != nullptr) {
#pragma unroll
        for (int o = 0; o < ROWS * COLUMNS; ++o) {
#pragma unroll
          for (int v = 0; v < VEC; ++v) sums[o][v] += bias[v];
        }
      }
      activate(params.activation, sums);
#pragma unroll
      for (int o = 0; o < ROWS * COLUMNS; ++o) {
        store_whole(
            target + o / COLUMNS * params.output_row_step + o % COLUMNS * params.output_column_step,
            narrow<T, VEC>(sums[o]));
      }
    });
  }
}

}  // namespace depthwise
}  // namespace fastseg
