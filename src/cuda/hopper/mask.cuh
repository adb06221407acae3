// cuda/hopper/mask.cuh: hides the keys that a row does not see, in the blocks where that is not all or nothing.
#pragma once

#include "cuda/common/sequence.cuh"
#include "cuda/hopper/scheduler.cuh"

namespace onepass::cuda::hopper {

// Visible keys [begin, end) of a row of the sequence.
ONEPASS_DEVICE int visible_begin(const Problem& problem, const Tile& tile, int row) {
  if (problem.window_left == kUnbounded) return tile.key_begin;
  return max(tile.key_begin, row + tile.diagonal - static_cast<int>(problem.window_left));
}
ONEPASS_DEVICE int visible_end(const Problem& problem, const Tile& tile, int row) {
  if (problem.window_right == kUnbounded) return tile.key_end;
  return min(tile.key_end, row + tile.diagonal + static_cast<int>(problem.window_right) + 1);
}

// Hides what the lane's rows, lane_row and lane_row + 8, do not see of the block's first kKeys keys, which begin at key
// `start`. Both edges in one pass: ptxas serializes wgmma (C7511) in some tile shapes when there are two.
template <int kKeys, int R>
ONEPASS_DEVICE void mask_block(float (&s)[R], const Problem& problem, const Tile& tile, int lane_row, int start) {
  const int lane_start = start + threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane_row + 8 * r;
    const int begin = visible_begin(problem, tile, row) - lane_start,
              end = visible_end(problem, tile, row) - lane_start;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + e;
        if (column < begin || column >= end) s[4 * j + 2 * r + e] = -kInfinity;
      }
    }
  }
}

}  // namespace onepass::cuda::hopper
