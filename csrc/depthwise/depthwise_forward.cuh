// Forward walks. See depthwise.cuh for the picture.
//
// At step u the thread reads the STRIDE input rows t = STRIDE*u + e of its phase; row e reaches the
// output rows u - i through the filter rows r = e + STRIDE*i:
//
//   TAPS 3, STRIDE 1                      TAPS 3, STRIDE 2
//     row u -> sums[0] (output u,   r=0)    row 2u   -> sums[0] (output u,   r=0)
//              sums[1] (output u-1, r=1)                sums[1] (output u-1, r=2): finished, stored
//              sums[2] (output u-2, r=2)    row 2u+1 -> sums[0] (output u,   r=1)
//
// Bytes per output element: itself, and STRIDE*STRIDE inputs. L2 sees (kInputColumns / kColumns) x
// (rows + halo) / rows of the input where L1 does not catch the neighbour's columns.
#pragma once

#include "csrc/common/activation.cuh"
#include "csrc/depthwise/depthwise.cuh"

namespace fastseg {
namespace depthwise {

template <typename T, int VEC, int TAPS, int STRIDE>
struct ForwardTraits : WalkTraits<T, VEC, TAPS, STRIDE> {
  using Base = WalkTraits<T, VEC, TAPS, STRIDE>;

  // Four columns where instructions are scarce, so that 6 loads and conversions serve 4 outputs.
  static constexpr int kColumns = sizeof(T) == 2 && VEC == 4 && STRIDE == 1 ? 4 : 2;
  static constexpr int kInputColumns = STRIDE * (kColumns - 1) + TAPS;
  static constexpr int kPrefetch = STRIDE == 1 && sizeof(T) < 8 ? 2 : 1;  // rows in flight
  static constexpr int kHaloRows = Base::kReach - 1;
  // Blocks a multiprocessor holds: 72, 128, 168 or 255 registers a thread.
  static constexpr int kMinBlocks = Base::kWeightRegisters <= 9    ? 7
                                    : Base::kWeightRegisters <= 25 ? 4
                                    : Base::kWeightRegisters <= 50 ? 3
                                                                   : 2;
};

struct ForwardParams {
  Walks walks;
  int H, W, K;
  int pad_top, pad_left, dilation_h, dilation_w;
  int rows, longer_row_phases;  // P = rows * dilation_h + longer_row_phases: one more row each
  int columns, longer_column_phases;  // of a phase, likewise
  Divider multiplier;
  Activation activation;
  const void* input;  // [N, C, H, W]
  Strides4 input_strides;
  int64_t input_row_step, input_column_step;  // one dilation further, in elements
  const void* weight;                         // [K, 1, TAPS, TAPS]
  FilterStrides weight_strides;
  const void* bias;  // [K] or nullptr
  void* output;      // [N, K, P, Q]
  Strides4 output_strides;
  int64_t output_row_step, output_column_step;
};

template <typename T, int VEC, int TAPS, int STRIDE>
__global__ void __launch_bounds__(ForwardTraits<T, VEC, TAPS, STRIDE>::kMaxThreads,
                                  ForwardTraits<T, VEC, TAPS, STRIDE>::kMinBlocks)
    depthwise_forward_walk(const __grid_constant__ ForwardParams params) {
  using Traits = ForwardTraits<T, VEC, TAPS, STRIDE>;
  using Acc = typename Traits::Acc;
  constexpr int kColumns = Traits::kColumns, kInputColumns = Traits::kInputColumns;
  constexpr int kReach = Traits::kReach, kPrefetch = Traits::kPrefetch;

  FASTSEG_DYNAMIC_SHARED(shared);
  const Walks& walks = params.walks;
  const Role role = role_of_thread<VEC>(walks);

  Acc weights[TAPS][TAPS][VEC];
  load_weights<T, VEC, TAPS>(static_cast<const T*>(params.weight), params.weight_strides,
                             role.first_channel, params.K, role.lane, walks.lanes,
                             reinterpret_cast<Acc*>(shared), weights);
  if (role.channel >= params.K) return;
  Acc bias[VEC] = {};
  if (params.bias != nullptr) {
    widen(load_pack<T, VEC>(static_cast<const T*>(params.bias) + role.channel), bias);
  }
  const T* const input =
      static_cast<const T*>(params.input) +
      params.multiplier.quotient(role.channel) * params.input_strides.c;  // [N, H, W]
  T* const output =
      static_cast<T*>(params.output) + role.channel * params.output_strides.c;  // [N, P, Q]

  for (int item = role.worker * walks.groups + role.group; item < walks.items;
       item += walks.workers * walks.groups) {
    const Walk walk = locate_walk(walks, kColumns, item);
    const int p0 = walk.row_phase + walk.row_first * params.dilation_h;
    const int q0 = walk.column_phase + walk.column_first * params.dilation_w;
    const int h0 = STRIDE * p0 - params.pad_top, w0 = STRIDE * q0 - params.pad_left;
    const int rows = min(walk.row_last, params.rows + (walk.row_phase < params.longer_row_phases)) -
                     walk.row_first;
    const int columns =
        min(params.columns + (walk.column_phase < params.longer_column_phases) - walk.column_first,
            kColumns);
    if (rows <= 0 || columns <= 0) continue;

    // Row t of the walk's input is h0 + t * dilation_h, column j is w0 + j * dilation_w. What lies
    // behind the last output's last tap counts as outside.
    const int h_end = max(0, min(params.H, h0 + (STRIDE * (rows - 1) + TAPS) * params.dilation_h));
    const int w_end =
        max(0, min(params.W, w0 + (STRIDE * (columns - 1) + TAPS) * params.dilation_w));
    bool column_inside[kInputColumns];
    bool all_inside = columns == kColumns;
#pragma unroll
    for (int j = 0; j < kInputColumns; ++j) {
      column_inside[j] = inside(w0 + j * params.dilation_w, w_end);
      all_inside = all_inside && column_inside[j];
    }
    // Steps whose rows all lie above the image only hand on the sums, which are all alike yet.
    int first_step = 0, first_h = h0;
    while (first_step < kReach - 1 && first_h + (STRIDE - 1) * params.dilation_h < 0) {
      first_h += STRIDE * params.dilation_h;
      ++first_step;
    }
    const T* const first_input = input + walk.image * params.input_strides.n +
                                 first_h * params.input_strides.h + w0 * params.input_strides.w;
    T* const first_output = output + walk.image * params.output_strides.n +
                            p0 * params.output_strides.h + q0 * params.output_strides.w;

    // GUARDED: some column of the tile or of its halo is outside, and has to be skipped.
    const auto walk_down = [&](auto guarded) {
      constexpr bool GUARDED = decltype(guarded)::value;
      const T* source = first_input;
      const auto fetch = [&](int h) {
        Row<T, VEC, kInputColumns> row = {};
        if (inside(h, h_end)) {
#pragma unroll
          for (int j = 0; j < kInputColumns; ++j) {
            if (GUARDED && !column_inside[j]) continue;
            row.columns[j] = load_pack<T, VEC>(source + j * params.input_column_step);
          }
        }
        source += params.input_row_step;
        return row;
      };
      Row<T, VEC, kInputColumns> fetched[kPrefetch + 1];
#pragma unroll
      for (int i = 0; i < kPrefetch; ++i) fetched[i] = fetch(first_h + i * params.dilation_h);

      // sums[i] belongs to output row u - i.
      Acc sums[kReach][kColumns][VEC] = {};
      T* target = first_output;
      int h = first_h;
#pragma unroll kReach  // so that sums and rows change roles, not registers
      for (int u = first_step; u < rows + kReach - 1; ++u) {
#pragma unroll
        for (int e = 0; e < STRIDE; ++e) {
          fetched[kPrefetch] = fetch(h + kPrefetch * params.dilation_h);
          if (inside(h, h_end)) {
#pragma unroll
            for (int j = 0; j < kInputColumns; ++j) {
              if (GUARDED && !column_inside[j]) continue;
              Acc x[VEC];
              widen(fetched[0].columns[j], x);
#pragma unroll
              for (int i = 0; i < kReach; ++i) {
                const int r = e + STRIDE * i;
#pragma unroll
                for (int o = 0; o < kColumns; ++o) {
                  const int s = j - STRIDE * o;
                  if (r >= TAPS || s < 0 || s >= TAPS) continue;
#pragma unroll
                  for (int v = 0; v < VEC; ++v) {
                    sums[i][o][v] = multiply_add(x[v], weights[r][s][v], sums[i][o][v]);
                  }
                }
              }
            }
          }
          h += params.dilation_h;
#pragma unroll
          for (int i = 0; i < kPrefetch; ++i) fetched[i] = fetched[i + 1];
        }

        if (u >= kReach - 1) {
          if (params.bias != nullptr) {
#pragma unroll
            for (int o = 0; o < kColumns; ++o) {
#pragma unroll
              for (int v = 0; v < VEC; ++v) sums[kReach - 1][o][v] += bias[v];
            }
          }
          activate(params.activation, sums[kReach - 1]);
#pragma unroll
          for (int o = 0; o < kColumns; ++o) {
            if (GUARDED && o >= columns) continue;
            store_pack(target + o * params.output_column_step, narrow<T, VEC>(sums[kReach - 1][o]));
          }
          target += params.output_row_step;
        }
#pragma unroll
        for (int i = kReach - 1; i >= 0; --i) {
#pragma unroll
          for (int o = 0; o < kColumns; ++o) {
#pragma unroll
            for (int v = 0; v < VEC; ++v) sums[i][o][v] = i == 0 ? Acc(0) : sums[i - 1][o][v];
          }
        }
      }
    };
    if (all_inside) {
      walk_down(std::false_type());
    } else {
      walk_down(std::true_type());
    }
  }
}

}  // namespace depthwise
}  // namespace fastseg
