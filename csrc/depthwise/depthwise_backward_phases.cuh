// Backward over short phases, see depthwise_phases.cuh: grad_input and the same partial sums of
// grad_weight and grad_bias as from walks (depthwise_backward.cuh), for the same second stage.
#pragma once

#include "csrc/depthwise/depthwise_backward.cuh"
#include "csrc/depthwise/depthwise_phases.cuh"

namespace fastseg {
namespace depthwise {

template <typename T, int VEC, int TILE>
__global__ void __launch_bounds__(PhaseTraits<T, VEC, TILE>::kMaxThreads,
                                  PhaseTraits<T, VEC, TILE>::kBackwardBlocks)
    depthwise_backward_phases(const __grid_constant__ BackwardParams params) {
  using Traits = PhaseTraits<T, VEC, TILE>;
  using Acc = typename Traits::Acc;
  constexpr int kTaps = Traits::kTaps;

  FASTSEG_DYNAMIC_SHARED(shared);
  const Walks& walks = params.walks;
  const Role role = role_of_thread<VEC>(walks);

  Acc weights[3][3][VEC];
  load_weights<T, VEC, 3>(static_cast<const T*>(params.weight), params.weight_strides,
                          role.first_channel, params.K, role.lane, walks.lanes,
                          reinterpret_cast<Acc*>(shared), weights);
  const T* const grad_output =
      static_cast<const T*>(params.grad_output) + role.channel;               // [N, H, W]
  const T* const input = static_cast<const T*>(params.input) + role.channel;  // [N, H, W]
  T* const grad_input = static_cast<T*>(params.grad_input) + role.channel;    // [N, H, W]

  Acc sums[(kTaps + 1) * VEC] = {};

  const int items = role.channel < params.K ? walks.items : 0;
  for (int item = role.worker * walks.groups + role.group; item < items;
       item += walks.workers * walks.groups) {
    const Phase phase = locate_phase<TILE>(params, item);
    const T* const grad_source = grad_output + offset_of(phase, params.grad_output_strides);
    const T* const source = input + offset_of(phase, params.input_strides);
    T* const target = grad_input + offset_of(phase, params.grad_input_strides);

    with_counts<TILE>(phase, [&](auto rows, auto columns) {
      constexpr int ROWS = decltype(rows)::value, COLUMNS = decltype(columns)::value;
      const auto grad_y = load_tile<T, VEC, ROWS, COLUMNS>(grad_source, params.grad_output_row_step,
                                                           params.grad_output_column_step);
      Tile<T, VEC, ROWS, COLUMNS> x = {};
      if (params.input_rows > 0) {
        x = load_tile<T, VEC, ROWS, COLUMNS>(source, params.input_row_step,
                                             params.input_column_step);
      }
#pragma unroll
      for (int i = 0; i < ROWS * COLUMNS; ++i) {
        Acc value[VEC], grad_x[VEC] = {};
        widen(x.at[i], value);
#pragma unroll
        for (int o = 0; o < ROWS * COLUMNS; ++o) {
          const int r = tap_between(i / COLUMNS, o / COLUMNS);
          const int s = tap_between(i % COLUMNS, o % COLUMNS);
          if (!is_tap(r) || !is_tap(s)) continue;
          Acc grad[VEC];
          widen(grad_y.at[o], grad);
#pragma unroll
          for (int v = 0; v < VEC; ++v) {
            Acc& sum = sums[(r * 3 + s) * VEC + v];
            grad_x[v] = multiply_add(grad[v], weights[r][s][v], grad_x[v]);
            sum = multiply_add(grad[v], value[v], sum);
          }
        }
        if (params.grad_input != nullptr) {
          store_whole(target + i / COLUMNS * params.grad_input_row_step +
                          i % COLUMNS * params.grad_input_column_step,
                      narrow<T, VEC>(grad_x));
        }
      }
      if (params.has_bias) {
#pragma unroll
        for (int o = 0; o < ROWS * COLUMNS; ++o) {
          Acc grad[VEC];
          widen(grad_y.at[o], grad);
#pragma unroll
          for (int v = 0; v < VEC; ++v) sums[kTaps * VEC + v] += grad[v];
        }
      }
    });
  }
  store_partial<VEC>(params, role, sums, reinterpret_cast<Acc*>(shared));
}

}  // namespace depthwise
}  // namespace fastseg
