// Numbers the elements of four 8 x 8 matrices in shared memory and shows which of them
// load_matrices gives to each lane.
#include "csrc/common/launch.cuh"
#include "csrc/common/mma.cuh"

namespace fastseg {
namespace {

// y [32, 4, 2]: the two elements of each register of each lane.
template <bool TURN>
__global__ void show_lanes(int* y) {
  FASTSEG_SHARED(uint16_t, matrices, [4][8][8]);
  const int lane = lane_id();
  for (int i = lane; i < 256; i += 32) {
    matrices[i / 64][i / 8 % 8][i % 8] = static_cast<uint16_t>(i);
  }
  __syncwarp();
  uint32_t reg[4];
  load_matrices<TURN>(reg, matrices[lane / 8][lane % 8]);
  for (int i = 0; i < 4; ++i) {
    y[8 * lane + 2 * i] = static_cast<int>(reg[i] & 0xffff);
    y[8 * lane + 2 * i + 1] = static_cast<int>(reg[i] >> 16);
  }
}

}  // namespace
}  // namespace fastseg

extern "C" void run(int turn, int* y) {
  using namespace fastseg;
  launch(turn ? show_lanes<true> : show_lanes<false>, grid_size(1), dim3(32), 0, nullptr, y);
}
