// Small kernels for test_host_executor.py: correct ones, and the same with one planted bug each
// (`template <bool kBug>`). Comments "// line: NAME" mark lines that messages must name. One file
// over 500 lines, because it is built once for all tests.
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "csrc/common/async_copy.cuh"
#include "csrc/common/index.cuh"
#include "csrc/common/launch.cuh"
#include "csrc/common/mma.cuh"

namespace {

using fastseg::cp_async_16;
using fastseg::cp_async_16_or_zero;
using fastseg::cp_async_commit;
using fastseg::cp_async_wait;
using fastseg::launch;
using fastseg::thread_id_x;
using fastseg::thread_id_y;

constexpr unsigned kFullMask = 0xffffffff;

// A buffer of exactly this size, for AddressSanitizer; filled with 0, 1, 2, ...
template <typename T>
std::unique_ptr<T[]> counting(int size) {
  std::unique_ptr<T[]> buffer(new T[size]);
  for (int i = 0; i < size; ++i) buffer[i] = static_cast<T>(i);
  return buffer;
}

}  // namespace

// ---- Barriers ----

// y[block] = sum of its blockDim.x numbers.
template <bool kBug>
__global__ void block_sum(const float* x, float* y) {
  FASTSEG_DYNAMIC_SHARED(bytes);
  float* const sums = reinterpret_cast<float*>(bytes);
  const int thread = thread_id_x();
  sums[thread] = x[fastseg::block_id_x() * fastseg::block_size_x() + thread];
  __syncthreads();
  for (int half = fastseg::block_size_x() / 2; half > 0; half /= 2) {
    if (thread < half) sums[thread] += sums[thread + half];
    if constexpr (!kBug) __syncthreads();
  }
  if (thread == 0) y[fastseg::block_id_x()] = sums[0];
}

template <bool kBug>
void run_block_sum(float* y) {
  const auto x = counting<float>(5 * 128);
  launch(block_sum<kBug>, dim3(5), dim3(128), 128 * sizeof(float), nullptr, x.get(), y);
}

// y[i] = i - 1, from the neighbour to the left, which in forward order has always been there
// before.
template <bool kBug>
__global__ void shift(float* y) {
  FASTSEG_SHARED(float, numbers, [64]);
  numbers[thread_id_x()] = static_cast<float>(thread_id_x());
  if constexpr (!kBug) __syncthreads();
  y[thread_id_x()] = thread_id_x() == 0 ? 0 : numbers[thread_id_x() - 1];
}

template <bool kBug>
void run_shift(float* y) {
  launch(shift<kBug>, dim3(1), dim3(64), 0, nullptr, y);
}

// y [columns, rows] = x [rows, columns] transposed, by tiles of 16 x 16.
template <bool kBug>
__global__ void transpose(const float* x, float* y, int rows, int columns) {
  FASTSEG_SHARED(float, tile, [16][17]);
  const int64_t row = fastseg::block_id_y() * 16, column = fastseg::block_id_x() * 16;
  if (row + thread_id_y() < rows && column + thread_id_x() < columns) {
    tile[thread_id_y()][thread_id_x()] =
        x[(row + thread_id_y()) * columns + column + thread_id_x()];
  }
  if constexpr (!kBug) __syncthreads();
  if (column + thread_id_y() < columns && row + thread_id_x() < rows) {
    y[(column + thread_id_y()) * rows + row + thread_id_x()] = tile[thread_id_x()][thread_id_y()];
  }
}

template <bool kBug>
void run_transpose(float* y) {
  const auto x = counting<float>(37 * 50);
  launch(transpose<kBug>, dim3(4, 3), dim3(16, 16), 0, nullptr, x.get(), y, 37, 50);
}

__global__ void divergent_barrier(float* y) {
  if (thread_id_x() % 2 == 0) {
    __syncthreads();  // line: even threads
  } else {
    __syncthreads();  // line: odd threads
  }
  y[thread_id_x()] = 1;
}

void run_divergent_barrier(float* y) {
  launch(divergent_barrier, dim3(2), dim3(64), 0, nullptr, y);
}

// Thread 0 leaves the loop one turn early.
__global__ void barrier_in_loop(float* y) {
  const int turns = thread_id_x() == 0 ? 2 : 3;
  for (int i = 0; i < turns; ++i) __syncthreads();  // line: loop barrier
  __syncthreads();                                  // line: barrier after loop
  y[thread_id_x()] = 1;
}

void run_barrier_in_loop(float* y) { launch(barrier_in_loop, dim3(1), dim3(40), 0, nullptr, y); }

// Threads from `kept` on exit at once; the others still meet, in the block and in the warp.
__global__ void early_exit(float* y, int kept) {
  if (thread_id_x() >= kept) return;
  FASTSEG_SHARED(int, numbers, [64]);
  numbers[thread_id_x()] = thread_id_x();
  __syncthreads();
  int sum = numbers[kept - 1 - thread_id_x()];
  __syncwarp();
  const unsigned lanes = __ballot_sync(kFullMask, 1);
  y[thread_id_x()] = static_cast<float>(sum * 100 + __popc(lanes));
}

void run_early_exit(float* y) { launch(early_exit, dim3(1), dim3(64), 0, nullptr, y, 40); }

// A thread that exits last, while others already wait for it.
__global__ void late_exit(float* y) {
  const bool leaves = thread_id_x() == 63;
  if (leaves) return;
  const unsigned lanes = __ballot_sync(kFullMask, 1);
  __syncthreads();
  y[thread_id_x()] = static_cast<float>(__popc(lanes));
}

void run_late_exit(float* y) { launch(late_exit, dim3(1), dim3(64), 0, nullptr, y); }

__global__ void block_votes(float* y) {
  const int thread = thread_id_x();
  const int count = __syncthreads_count(thread % 3 == 0);
  const int all = __syncthreads_and(thread < 70), not_all = __syncthreads_and(thread != 5);
  const int any = __syncthreads_or(thread == 69), none = __syncthreads_or(thread == 70);
  y[thread] = static_cast<float>(count * 10000 + all * 1000 + not_all * 100 + any * 10 + none);
}

void run_block_votes(float* y) { launch(block_votes, dim3(1), dim3(70), 0, nullptr, y); }

// ---- Warps ----

__global__ void warp_operations(float* y) {
  const int lane = fastseg::lane_id();
  float down = static_cast<float>(lane), butterfly = down;
  for (int step = 16; step > 0; step /= 2) down += __shfl_down_sync(kFullMask, down, step);
  for (int step = 1; step < 32; step *= 2) butterfly += __shfl_xor_sync(kFullMask, butterfly, step);
  const double up = __shfl_up_sync(kFullMask, static_cast<double>(lane), 3, 8);
  const int broadcast = __shfl_sync(kFullMask, lane, 5, 16);
  const int beyond = __shfl_xor_sync(kFullMask, lane, 8, 8);
  const unsigned odd = __ballot_sync(kFullMask, lane % 2);
  const int votes = __any_sync(kFullMask, lane == 7) * 8 + __any_sync(kFullMask, lane == 32) * 4 +
                    __all_sync(kFullMask, lane < 32) * 2 + __all_sync(kFullMask, lane != 7);
  unsigned half = 0;
  if (lane < 16) half = __ballot_sync(0x0000ffff, lane >= 8);
  float* const row = y + fastseg::thread_id_in_block() * 8;
  row[0] = __shfl_sync(kFullMask, down, 0);
  row[1] = butterfly;
  row[2] = static_cast<float>(up);
  row[3] = static_cast<float>(broadcast);
  row[4] = static_cast<float>(beyond);
  row[5] = odd == 0xaaaaaaaa;
  row[6] = static_cast<float>(votes);
  row[7] = static_cast<float>(half);
}

void run_warp_operations(float* y) {
  launch(warp_operations, dim3(1), dim3(8, 4, 2), 0, nullptr, y);
}

// Each warp turns 32 numbers round in shared memory.
template <bool kBug>
__global__ void turn_in_warp(float* y) {
  FASTSEG_SHARED(float, numbers, [64]);
  const int thread = thread_id_x(), first = thread / 32 * 32;
  numbers[thread] = static_cast<float>(thread);
  if constexpr (!kBug) __syncwarp();
  y[thread] = numbers[first + 31 - thread % 32];
}

template <bool kBug>
void run_turn_in_warp(float* y) {
  launch(turn_in_warp<kBug>, dim3(1), dim3(64), 0, nullptr, y);
}

__global__ void missing_lane(float* y) {
  float sum = 1;
  if (thread_id_x() % 32 != 31) {
    sum += __shfl_xor_sync(kFullMask, sum, 1);  // line: shuffle without lane 31
  }
  __syncthreads();  // line: barrier of lane 31
  y[thread_id_x()] = sum;
}

void run_missing_lane(float* y) { launch(missing_lane, dim3(1), dim3(64), 0, nullptr, y); }

__global__ void different_masks(float* y) {
  const int lane = thread_id_x();
  y[lane] = __shfl_sync(lane < 16 ? 0xffffffff : 0xffff0000, 1.0f, 16);
}

void run_different_masks(float* y) { launch(different_masks, dim3(1), dim3(32), 0, nullptr, y); }

__global__ void caller_outside_mask(float* y) {
  y[thread_id_x()] = __shfl_sync(0x7fffffff, 1.0f, 0);  // line: mask without lane 31
}

void run_caller_outside_mask(float* y) {
  launch(caller_outside_mask, dim3(1), dim3(32), 0, nullptr, y);
}

// Lanes from 20 on exit; y = the number of the next lane.
__global__ void value_of_exited_lane(float* y) {
  if (thread_id_x() >= 20) return;
  y[thread_id_x()] = __shfl_down_sync(kFullMask, static_cast<float>(thread_id_x()), 1);
}

void run_value_of_exited_lane(float* y) {
  launch(value_of_exited_lane, dim3(1), dim3(32), 0, nullptr, y);
}

// ---- Tensor cores ----

__device__ void convert(float value, __half& out) { out = __float2half_rn(value); }
__device__ void convert(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
__device__ void convert(float value, fastseg::tf32& out) { out = fastseg::to_tf32(value); }

// y [16, 8] = a [16, K] b + 1000, with b [8, K] stored transposed.
template <typename T, bool kBug>
__global__ void multiply_tile(const float* a, const float* b, float* y) {
  using Shape = fastseg::Mma<T>;
  FASTSEG_SHARED(T, tile_a, [16 * Shape::K]);
  FASTSEG_SHARED(T, tile_b, [8 * Shape::K]);
  const int lane = thread_id_x();
  for (int i = lane; i < 16 * Shape::K; i += 32) convert(a[i], tile_a[i]);
  for (int i = lane; i < 8 * Shape::K; i += 32) convert(b[i], tile_b[i]);
  __syncwarp();
  if (kBug && lane == 31) return;
  fastseg::FragmentA<T> fragment_a;
  fastseg::FragmentB<T> fragment_b;
  fastseg::FragmentD d{{1000, 1000, 1000, 1000}};
  fragment_a.load(tile_a, Shape::K);
  fragment_b.load(tile_b, Shape::K);
  fastseg::mma(d, fragment_a, fragment_b);  // line: mma
  for (int i = 0; i < 4; ++i) {
    y[Shape::d_row(lane, i) * 8 + Shape::d_column(lane, i)] = d.reg[i];
  }
}

template <typename T, bool kBug = false>
void run_multiply_tile(float* y) {
  constexpr int K = fastseg::Mma<T>::K;
  std::vector<float> a(16 * K), b(8 * K);
  for (int i = 0; i < 16 * K; ++i) a[i] = static_cast<float>(i * 7 % 19 - 9);
  for (int i = 0; i < 8 * K; ++i) b[i] = static_cast<float>(i * 5 % 23 - 11);
  launch(multiply_tile<T, kBug>, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(), y);
}

// The positions of the registers of every lane, to be compared with the tables of the PTX manual.
template <typename T>
void run_positions(float* y) {
  using Shape = fastseg::Mma<T>;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      *y++ = static_cast<float>(Shape::a_row(lane, i));
      *y++ = static_cast<float>(Shape::a_k(lane, i));
    }
    for (int i = 0; i < 2; ++i) {
      *y++ = static_cast<float>(Shape::b_k(lane, i));
      *y++ = static_cast<float>(Shape::b_column(lane));
    }
    for (int i = 0; i < 4; ++i) {
      *y++ = static_cast<float>(Shape::d_row(lane, i));
      *y++ = static_cast<float>(Shape::d_column(lane, i));
    }
  }
}

__global__ void round_to_tf32(const float* x, float* y) {
  y[thread_id_x()] = __uint_as_float(fastseg::to_tf32(x[thread_id_x()]).bits);
}

void run_round_to_tf32(float* y) {
  const float x[] = {
      1.0f,     -3.14159274f, 1.0f + 0x1p-11f, 1.0f + 0x1.8p-11f, 1.0f + 0x1p-12f, 1e30f,
      INFINITY, NAN};
  launch(round_to_tf32, dim3(1), dim3(8), 0, nullptr, x, y);
}

// ---- Asynchronous copies ----

enum class CopyBug {
  kNone,
  kNoWait,
  kWaitForTooFew,
  kNoCommit,
  kNoBarrierAfterWait,
  kNoBarrierBeforeReuse
};

// y[i] = sum over rows of x [rows, 128], read through two stages; each thread copies 16 bytes a row
// and adds up numbers that other threads copied.
template <CopyBug kBug>
__global__ void sum_rows(const float* x, float* y, int rows) {
  FASTSEG_DYNAMIC_SHARED(bytes);
  float (*const stages)[128] = reinterpret_cast<float (*)[128]>(bytes);
  const int thread = thread_id_x();
  const auto copy_row = [&](int row) {
    cp_async_16_or_zero(&stages[row % 2][thread * 4], &x[int64_t{row} * 128 + thread * 4],
                        row < rows);
    if constexpr (kBug != CopyBug::kNoCommit) cp_async_commit();
  };
  float acc[4] = {};
  copy_row(0);
  for (int row = 0; row < rows; ++row) {
    copy_row(row + 1);
    if constexpr (kBug == CopyBug::kWaitForTooFew) {
      cp_async_wait<2>();
    } else if constexpr (kBug != CopyBug::kNoWait) {
      cp_async_wait<1>();
    }
    if constexpr (kBug != CopyBug::kNoBarrierAfterWait) __syncthreads();
    for (int i = 0; i < 4; ++i) acc[i] += stages[row % 2][thread + 32 * i];
    if constexpr (kBug != CopyBug::kNoBarrierBeforeReuse) __syncthreads();
  }
  for (int i = 0; i < 4; ++i) y[thread + 32 * i] = acc[i];
}

template <CopyBug kBug>
void run_sum_rows(float* y) {
  const auto x = counting<float>(7 * 128);
  launch(sum_rows<kBug>, dim3(1), dim3(32), 2 * 128 * sizeof(float), nullptr, x.get(), y, 7);
}

__global__ void misaligned_copy(const float* x) {
  FASTSEG_SHARED(float, tile, [8]);
  cp_async_16(&tile[0], &x[1]);  // line: misaligned copy
}

void run_misaligned_copy(float*) {
  const auto x = counting<float>(8);
  launch(misaligned_copy, dim3(1), dim3(1), 0, nullptr, x.get());
}

// ---- Memory ----

// The second block must not find what the first one left.
__global__ void uninitialized_shared(float* y) {
  FASTSEG_SHARED(float, fixed, [4]);
  FASTSEG_DYNAMIC_SHARED(bytes);
  float* const dynamic = reinterpret_cast<float*>(bytes);
  y[fastseg::block_id_x() * 2] = fixed[1];
  y[fastseg::block_id_x() * 2 + 1] = dynamic[1];
  fixed[1] = dynamic[1] = 1;
}

void run_uninitialized_shared(float* y) {
  launch(uninitialized_shared, dim3(2), dim3(1), 4 * sizeof(float), nullptr, y);
}

// Each thread reads or writes one number at `shift` from its place.
__global__ void touch_global(float* x, float* y, int read_shift, int write_shift) {
  __syncthreads();
  y[thread_id_x() + write_shift] = x[thread_id_x() + read_shift];
}

void run_touch_global(int read_shift, int write_shift) {
  const auto x = counting<float>(33), y = counting<float>(33);
  launch(touch_global, dim3(1), dim3(33), 0, nullptr, x.get(), y.get(), read_shift, write_shift);
}

template <int kSize>
__global__ void touch_shared(float* y, int dynamic_index, int fixed_index) {
  FASTSEG_SHARED(float, fixed, [kSize]);
  FASTSEG_DYNAMIC_SHARED(bytes);
  float* const dynamic = reinterpret_cast<float*>(bytes);
  float* const start = fixed;
  dynamic[0] = start[0] = 1;
  __syncthreads();
  y[0] = dynamic[dynamic_index] + start[fixed_index];
}

void run_touch_shared(float* y, int dynamic_index, int fixed_index) {
  launch(touch_shared<9>, dim3(1), dim3(2), 7 * sizeof(float), nullptr, y, dynamic_index,
         fixed_index);
}

__global__ void copy_beyond_end(const float* x, float* y) {
  FASTSEG_SHARED(float, tile, [8]);
  cp_async_16(&tile[0], &x[4]);
  cp_async_commit();
  cp_async_wait<0>();
  y[0] = tile[0];
}

void run_copy_beyond_end(float* y) {
  const auto x = counting<float>(4);
  launch(copy_beyond_end, dim3(1), dim3(1), 0, nullptr, x.get(), y);
}

__global__ void misaligned_vector(const float* x, float4* y) {
  *y = *reinterpret_cast<const float4*>(&x[1]);
}

void run_misaligned_vector(float* y) {
  const auto x = counting<float>(8);
  launch(misaligned_vector, dim3(1), dim3(1), 0, nullptr, x.get(), reinterpret_cast<float4*>(y));
}

__global__ void signed_overflow(float* y, int rows) {
  y[0] = static_cast<float>(rows * static_cast<int>(fastseg::block_size_x()));
}

void run_signed_overflow(float* y) {
  launch(signed_overflow, dim3(1), dim3(2), 0, nullptr, y, 1 << 30);
}

// ---- Launches ----

__global__ void write_thread_number(float* y) {
  y[fastseg::block_id_x() * fastseg::block_size_x() + thread_id_x()] =
      static_cast<float>(thread_id_x());
}

void run_grid_too_large(float* y) {
  launch(write_thread_number, dim3(1, 65536), dim3(1), 0, nullptr, y);
}

void run_block_too_large(float* y) {
  launch(write_thread_number, dim3(1), dim3(1025), 0, nullptr, y);
}

void run_shared_too_large(float* y) {
  launch(write_thread_number, dim3(1), dim3(1), (227 << 10) + 1, nullptr, y);
}

void run_grid_size_too_large(float*) { fastseg::grid_size(int64_t{1} << 32); }

__global__ void trap() {
  if (thread_id_x() == 3) __trap();  // line: trap
  __syncthreads();
}

void run_trap(float*) { launch(trap, dim3(1), dim3(32), 0, nullptr); }

__global__ void throws() {
#ifdef FASTSEG_HOST
  if (thread_id_x() == 3) throw std::runtime_error("thrown in a kernel");
#endif
  __syncthreads();
}

void run_throws(float*) { launch(throws, dim3(1), dim3(32), 0, nullptr); }

// y = how many of `blocks` came before this one; y[blocks] must be 0 at first.
__global__ void order_of_blocks(float* y, int blocks) { y[fastseg::block_id_x()] = y[blocks]++; }

void run_order_of_blocks(float* y) {
  launch(order_of_blocks, dim3(50), dim3(1), 0, nullptr, y, 50);
}

// Every thread waits `barriers` times; for timing.
__global__ void many_barriers(float* y, int barriers) {
  for (int i = 0; i < barriers; ++i) __syncthreads();
  y[thread_id_x()] = 1;
}

// ---- For Python ----

namespace {

using Case = void (*)(float* y);

const std::map<std::string, Case> kCases = {
    {"block_sum", run_block_sum<false>},
    {"block_sum_without_barrier", run_block_sum<true>},
    {"shift", run_shift<false>},
    {"shift_without_barrier", run_shift<true>},
    {"transpose", run_transpose<false>},
    {"transpose_without_barrier", run_transpose<true>},
    {"divergent_barrier", run_divergent_barrier},
    {"barrier_in_loop", run_barrier_in_loop},
    {"early_exit", run_early_exit},
    {"late_exit", run_late_exit},
    {"block_votes", run_block_votes},
    {"warp_operations", run_warp_operations},
    {"turn_in_warp", run_turn_in_warp<false>},
    {"turn_in_warp_without_syncwarp", run_turn_in_warp<true>},
    {"missing_lane", run_missing_lane},
    {"different_masks", run_different_masks},
    {"caller_outside_mask", run_caller_outside_mask},
    {"value_of_exited_lane", run_value_of_exited_lane},
    {"multiply_fp16", run_multiply_tile<__half>},
    {"multiply_bf16", run_multiply_tile<__nv_bfloat16>},
    {"multiply_tf32", run_multiply_tile<fastseg::tf32>},
    {"multiply_without_lane", run_multiply_tile<__half, true>},
    {"positions_fp16", run_positions<__half>},
    {"positions_tf32", run_positions<fastseg::tf32>},
    {"round_to_tf32", run_round_to_tf32},
    {"sum_rows", run_sum_rows<CopyBug::kNone>},
    {"sum_rows_no_wait", run_sum_rows<CopyBug::kNoWait>},
    {"sum_rows_wait_for_too_few", run_sum_rows<CopyBug::kWaitForTooFew>},
    {"sum_rows_no_commit", run_sum_rows<CopyBug::kNoCommit>},
    {"sum_rows_no_barrier_after_wait", run_sum_rows<CopyBug::kNoBarrierAfterWait>},
    {"sum_rows_no_barrier_before_reuse", run_sum_rows<CopyBug::kNoBarrierBeforeReuse>},
    {"misaligned_copy", run_misaligned_copy},
    {"uninitialized_shared", run_uninitialized_shared},
    {"global_in_bounds", [](float*) { run_touch_global(0, 0); }},
    {"global_read_beyond_end", [](float*) { run_touch_global(1, 0); }},
    {"global_write_before_start", [](float*) { run_touch_global(0, -1); }},
    {"shared_in_bounds", [](float* y) { run_touch_shared(y, 0, 0); }},
    {"dynamic_shared_read_beyond_end", [](float* y) { run_touch_shared(y, 7, 0); }},
    {"static_shared_read_beyond_end", [](float* y) { run_touch_shared(y, 0, 9); }},
    {"copy_beyond_end", run_copy_beyond_end},
    {"misaligned_vector", run_misaligned_vector},
    {"signed_overflow", run_signed_overflow},
    {"grid_too_large", run_grid_too_large},
    {"block_too_large", run_block_too_large},
    {"shared_too_large", run_shared_too_large},
    {"grid_size_too_large", run_grid_size_too_large},
    {"trap", run_trap},
    {"throws", run_throws},
    {"order_of_blocks", run_order_of_blocks},
};

}  // namespace

// Runs a case; returns what it threw, or nullptr.
extern "C" const char* run_case(const char* name, float* y) {
  static std::string message;
  try {
    kCases.at(name)(y);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

extern "C" void run_many_barriers(float* y, int blocks, int threads, int barriers) {
  launch(many_barriers, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
         0, nullptr, y, barriers);
}
