// Backward walks: grad_input and grad_weight in one pass over grad_output and input, grad_bias with
// them. See depthwise.cuh for what a walk is.
//
//   grad_input[h, w]  = sum of grad_output[p, q] * weight[r, s]
//   grad_weight[r, s] = sum of grad_output[p, q] * input[h, w]
//   grad_bias         = sum of grad_output[p, q]
//
// over all p, q, r, s, h, w with h = p*stride - pad + r*dilation and w = q*stride - pad +
// s*dilation.
//
// The pairs (output pixel, tap) that reach an input pixel are the same in the first two lines. So a
// thread that owns the input pixel and holds the kReach x kReach grad_outputs around it in
// registers computes both, two products a pair. Three tensors are moved once (two read, one
// written), where separate kernels move five.
//
//     [ g ][ g ][ g ][ g ]  window[2], row u-2      Position u: window[0] arrives; the input rows
//     [ g ][ g ][ g ][ g ]  window[1], row u-1      t = STRIDE*u + e arrive, their grad_inputs are
//     [ g ][ g ][ g ][ g ]  window[0], row u        finished and stored. The sum of each tap stays
//               ^^^^^^^^^ the tile                  in a register for all walks of the block.
//
// At the end a block adds up the sums of its threads through shared memory and writes one partial
// sum a channel and tap; depthwise_backward_reduce adds those of all blocks. The order is fixed, so
// the result is the same bits every time. Walks are dealt to as many blocks as are resident, not
// blocks to walks: that keeps the partial sums small beside the tensors (1 % at 16x2048x33x33).
#pragma once

#include "csrc/common/reduce.cuh"
#include "csrc/depthwise/depthwise.cuh"

namespace fastseg {
namespace depthwise {

template <typename T, int VEC, int TAPS, int STRIDE>
struct BackwardTraits : WalkTraits<T, VEC, TAPS, STRIDE> {
  using Base = WalkTraits<T, VEC, TAPS, STRIDE>;

  // Of a tile, in outputs. Four where instructions are scarce, as in ForwardTraits.
  static constexpr int kColumns = sizeof(T) == 2 && VEC == 4 ? 4 : 2;
  static constexpr int kInputColumns = STRIDE * kColumns;             // their inputs
  static constexpr int kOutputColumns = kColumns + Base::kReach - 1;  // what reaches those
  static constexpr int kHaloRows = Base::kReach - 1;
  // The grad_output that grad_bias counts at position u: u - kLag, so that with symmetric padding
  // walks need to visit no more than the input.
  static constexpr int kLag = (TAPS - 1) / 2 / STRIDE;

  static constexpr int kSums = (Base::kTaps + 1) * VEC;  // taps, and the bias as the last
  static constexpr int kSumBytes = block_sum_elements(kSums, Base::kMaxThreads, 1) *
                                   static_cast<int>(sizeof(typename Base::Acc));
  static constexpr int kSharedBytes =
      Base::kWeightBytes > kSumBytes ? Base::kWeightBytes : kSumBytes;
  // Blocks a multiprocessor holds: 128, 168 or 255 registers a thread.
  static constexpr int kMinBlocks =
      Base::kWeightRegisters <= 18 && static_cast<int>(sizeof(T)) * VEC * STRIDE <= 8 ? 4
      : Base::kWeightRegisters <= 25                                                  ? 3
                                                                                      : 2;

  static_assert(kLag < Base::kReach);
  static_assert(kSharedBytes <= static_cast<int>(kDefaultSharedBytes));
};

struct BackwardParams {
  Walks walks;
  int H, W, K, P, Q;
  int input_rows;  // H, or 0 when the input is not needed
  bool has_bias;   // whether grad_bias is wanted
  int pad_top, pad_left, dilation_h, dilation_w;
  const void* grad_output;  // [N, K, P, Q]
  Strides4 grad_output_strides;
  int64_t grad_output_row_step, grad_output_column_step;  // one dilation further, in elements
  const void* input;                                      // [N, K, H, W]
  Strides4 input_strides;
  int64_t input_row_step, input_column_step;
  const void* weight;  // [K, 1, TAPS, TAPS]
  FilterStrides weight_strides;
  void* grad_input;  // [N, K, H, W] or nullptr
  Strides4 grad_input_strides;
  int64_t grad_input_row_step, grad_input_column_step;
  void* partial;  // [workers, kTaps + 1, K], or nullptr when only grad_input is wanted
};

// Adds up `sums` [taps + 1, VEC] of the block's threads and writes them to its row of the partial
// sums. Every thread of the block has to call this.
template <int VEC, typename Acc, int SUMS>
__device__ __forceinline__ void store_partial(const BackwardParams& params, const Role& role,
                                              Acc (&sums)[SUMS], Acc* shared) {
  const Walks& walks = params.walks;
  block_sum(sums, shared, role.group, walks.groups, role.lane, walks.lanes);
  if (role.group > 0 || role.channel >= params.K) return;
  Acc* const partial = static_cast<Acc*>(params.partial) +
                       static_cast<int64_t>(role.worker) * (SUMS / VEC) * params.K + role.channel;
#pragma unroll
  for (int tap = 0; tap < SUMS / VEC; ++tap) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      partial[tap * static_cast<int64_t>(params.K) + v] = sums[tap * VEC + v];
    }
  }
}

template <typename T, int VEC, int TAPS, int STRIDE>
__global__ void __launch_bounds__(BackwardTraits<T, VEC, TAPS, STRIDE>::kMaxThreads,
                                  BackwardTraits<T, VEC, TAPS, STRIDE>::kMinBlocks)
    depthwise_backward_walk(const __grid_constant__ BackwardParams params) {
  using Traits = BackwardTraits<T, VEC, TAPS, STRIDE>;
  using Acc = typename Traits::Acc;
  constexpr int kColumns = Traits::kColumns, kInputColumns = Traits::kInputColumns;
  constexpr int kOutputColumns = Traits::kOutputColumns;
  constexpr int kReach = Traits::kReach, kLag = Traits::kLag, kTaps = Traits::kTaps;

  FASTSEG_DYNAMIC_SHARED(shared);
  const Walks& walks = params.walks;
  const Role role = role_of_thread<VEC>(walks);

  Acc weights[TAPS][TAPS][VEC];
  load_weights<T, VEC, TAPS>(static_cast<const T*>(params.weight), params.weight_strides,
                             role.first_channel, params.K, role.lane, walks.lanes,
                             reinterpret_cast<Acc*>(shared), weights);
  const T* const grad_output = static_cast<const T*>(params.grad_output) +
                               role.channel * params.grad_output_strides.c;  // [N, P, Q]
  const T* const input =
      static_cast<const T*>(params.input) + role.channel * params.input_strides.c;  // [N, H, W]
  T* const grad_input =
      static_cast<T*>(params.grad_input) + role.channel * params.grad_input_strides.c;

  Acc sums[Traits::kSums] = {};  // [kTaps + 1, VEC]

  const int items = role.channel < params.K ? walks.items : 0;
  for (int item = role.worker * walks.groups + role.group; item < items;
       item += walks.workers * walks.groups) {
    const Walk walk = locate_walk(walks, kColumns, item);
    const int rows = walk.row_last - walk.row_first;
    // The oldest row of the first window and the leftmost column of all windows.
    const int p0 = walk.row_phase + (walk.row_first - (kReach - 1)) * params.dilation_h;
    const int q0 = walk.column_phase + (walk.column_first - (kReach - 1)) * params.dilation_w;
    // Row t of the walk's input is h0 + t * dilation_h, column j is w0 + j * dilation_w.
    const int h0 = STRIDE * (walk.row_phase + walk.row_first * params.dilation_h) - params.pad_top;
    const int w0 =
        STRIDE * (walk.column_phase + walk.column_first * params.dilation_w) - params.pad_left;
    bool output_inside[kOutputColumns], input_inside[kInputColumns];
    bool all_inside = true;
#pragma unroll
    for (int g = 0; g < kOutputColumns; ++g) {
      output_inside[g] = inside(q0 + g * params.dilation_w, params.Q);
      all_inside = all_inside && output_inside[g];
    }
#pragma unroll
    for (int j = 0; j < kInputColumns; ++j) {
      input_inside[j] = inside(w0 + j * params.dilation_w, params.W);
      all_inside = all_inside && input_inside[j];
    }

    const T* const first_grad_output = grad_output + walk.image * params.grad_output_strides.n +
                                       p0 * params.grad_output_strides.h +
                                       q0 * params.grad_output_strides.w;
    const T* const first_input = input + walk.image * params.input_strides.n +
                                 h0 * params.input_strides.h + w0 * params.input_strides.w;
    T* const first_grad_input = grad_input + walk.image * params.grad_input_strides.n +
                                h0 * params.grad_input_strides.h + w0 * params.grad_input_strides.w;

    // GUARDED: some column of the tile or of its halo is outside, and has to be skipped.
    const auto walk_down = [&](auto guarded) {
      constexpr bool GUARDED = decltype(guarded)::value;
      const T* grad_output_source = first_grad_output;
      const auto fetch_grad_output = [&](int p) {
        Row<T, VEC, kOutputColumns> row = {};
        if (inside(p, params.P)) {
#pragma unroll
          for (int g = 0; g < kOutputColumns; ++g) {
            if (GUARDED && !output_inside[g]) continue;
            row.columns[g] =
                load_pack<T, VEC>(grad_output_source + g * params.grad_output_column_step);
          }
        }
        grad_output_source += params.grad_output_row_step;
        return row;
      };
      const T* input_source = first_input;
      const auto fetch_input = [&](int h) {
        Row<T, VEC, kInputColumns> row = {};
        if (inside(h, params.input_rows)) {
#pragma unroll
          for (int j = 0; j < kInputColumns; ++j) {
            if (GUARDED && !input_inside[j]) continue;
            row.columns[j] = load_pack<T, VEC>(input_source + j * params.input_column_step);
          }
        }
        input_source += params.input_row_step;
        return row;
      };

      int p = p0, h = h0;
      Row<T, VEC, kOutputColumns> window[kReach];
#pragma unroll
      for (int i = kReach - 1; i > 0; --i) {
        window[i] = fetch_grad_output(p);
        p += params.dilation_h;
      }
      Row<T, VEC, kOutputColumns> next_grad_output = fetch_grad_output(p);
      Row<T, VEC, kInputColumns> next_input[STRIDE];
#pragma unroll
      for (int e = 0; e < STRIDE; ++e) next_input[e] = fetch_input(h + e * params.dilation_h);

      T* target = first_grad_input;
#pragma unroll 1  // moving the packed window costs less than the registers that unrolling takes
      for (int u = 0; u < rows; ++u) {
        window[0] = next_grad_output;
        next_grad_output = fetch_grad_output(p + params.dilation_h);

#pragma unroll
        for (int e = 0; e < STRIDE; ++e) {
          Acc x[kInputColumns][VEC];
#pragma unroll
          for (int j = 0; j < kInputColumns; ++j) widen(next_input[e].columns[j], x[j]);
          next_input[e] = fetch_input(h + STRIDE * params.dilation_h);

          if (inside(h, params.H)) {
            Acc grad_x[kInputColumns][VEC] = {};
#pragma unroll
            for (int i = kReach - 1; i >= 0; --i) {
              const int r = e + STRIDE * i;
              if (r >= TAPS || !inside(p - i * params.dilation_h, params.P)) continue;
#pragma unroll
              for (int g = 0; g < kOutputColumns; ++g) {
                if (GUARDED && !output_inside[g]) continue;
                Acc grad_y[VEC];
                widen(window[i].columns[g], grad_y);
#pragma unroll
                for (int j = 0; j < kInputColumns; ++j) {
                  // Input column j = STRIDE*o + f of the tile sees grad_output column g through tap
                  // s.
                  const int s = j % STRIDE + STRIDE * (j / STRIDE + kReach - 1 - g);
                  if (s < 0 || s >= TAPS || (GUARDED && !input_inside[j])) continue;
#pragma unroll
                  for (int v = 0; v < VEC; ++v) {
                    Acc& sum = sums[(r * TAPS + s) * VEC + v];
                    grad_x[j][v] = multiply_add(grad_y[v], weights[r][s][v], grad_x[j][v]);
                    sum = multiply_add(grad_y[v], x[j][v], sum);
                  }
                }
              }
            }
            if (params.grad_input != nullptr) {
#pragma unroll
              for (int j = 0; j < kInputColumns; ++j) {
                if (GUARDED && !input_inside[j]) continue;
                store_pack(target + j * params.grad_input_column_step, narrow<T, VEC>(grad_x[j]));
              }
            }
          }
          target += params.grad_input_row_step;
          h += params.dilation_h;
        }

        if (params.has_bias && inside(p - kLag * params.dilation_h, params.P)) {
#pragma unroll
          for (int o = 0; o < kColumns; ++o) {
            const int g = o + kReach - 1 - kLag;
            if (GUARDED && !output_inside[g]) continue;
            Acc grad_y[VEC];
            widen(window[kLag].columns[g], grad_y);
#pragma unroll
            for (int v = 0; v < VEC; ++v) sums[kTaps * VEC + v] += grad_y[v];
          }
        }
        p += params.dilation_h;
#pragma unroll
        for (int i = kReach - 1; i > 0; --i) window[i] = window[i - 1];
      }
    };
    if (all_inside) {
      walk_down(std::false_type());
    } else {
      walk_down(std::true_type());
    }
  }

  if (params.partial == nullptr) return;
  store_partial<VEC>(params, role, sums, reinterpret_cast<Acc*>(shared));
}

// ---- The second stage of the sums ----

struct ReduceParams {
  const void* partial;  // [rows, taps + 1, K], the row of the bias last
  int64_t rows, taps, K, S;
  int64_t first_column, last_column;  // of [taps + 1, K], those that are wanted
  void* grad_weight;                  // [K, 1, R, S]
  FilterStrides grad_weight_strides;
  void* grad_bias;  // [K]
};

template <typename T>
__global__ void __launch_bounds__(kReduceRows* kReduceColumns)
    depthwise_backward_reduce(const __grid_constant__ ReduceParams params) {
  using Acc = Accumulator<T>;
  FASTSEG_DYNAMIC_SHARED(shared);
  const int block_row = thread_id_x() / kReduceColumns;
  const int block_column = thread_id_x() - block_row * kReduceColumns;
  const int64_t column = params.first_column + block_id_x() * kReduceColumns + block_column;
  const bool wanted = column < params.last_column;

  const Acc sum = column_sum(static_cast<const Acc*>(params.partial) + column,
                             wanted ? params.rows : 0, (params.taps + 1) * params.K, block_row,
                             block_column, reinterpret_cast<Acc*>(shared));
  if (!wanted || block_row > 0) return;
  const int64_t tap = column / params.K, k = column - tap * params.K;
  if (tap == params.taps) {
    static_cast<T*>(params.grad_bias)[k] = narrow<T>(sum);
  } else {
    const int64_t r = tap / params.S, s = tap - r * params.S;
    static_cast<T*>(
        params.grad_weight)[k * params.grad_weight_strides.k + r * params.grad_weight_strides.r +
                            s * params.grad_weight_strides.s] = narrow<T>(sum);
  }
}

}  // namespace depthwise
}  // namespace fastseg
