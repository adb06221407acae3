// cuda/hopper/warpgroup.cuh: a thread's place in its consumer warpgroup, which has 64 rows of a tile: each warp 16 of
// them, each lane two, 8 apart (wgmma.cuh).
#pragma once

#include "cuda/hopper/ptx.cuh"

namespace onepass::cuda::hopper {

struct Warpgroup {
  int index;  // among the consumers

  ONEPASS_DEVICE static int warp() { return threadIdx.x % 128 / 32; }
  ONEPASS_DEVICE static int lane() { return threadIdx.x % 32; }
  ONEPASS_DEVICE static bool leader() { return threadIdx.x % 128 == 0; }

  // First rows of the warpgroup, the warp and the lane in a tile that begins at tile_row.
  ONEPASS_DEVICE int row(int tile_row) const { return tile_row + 64 * index; }
  ONEPASS_DEVICE int warp_row(int tile_row) const { return row(tile_row) + 16 * warp(); }
  ONEPASS_DEVICE int lane_row(int tile_row) const { return warp_row(tile_row) + lane() / 4; }

  ONEPASS_DEVICE void sync() const { named_barrier_sync(1 + index, 128); }
};

}  // namespace onepass::cuda::hopper
