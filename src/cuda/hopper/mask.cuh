// cuda/hopper/mask.cuh: hides the keys that a row does not see, in the blocks where that is not all or nothing.
#pragma once

#include "cuda/common/sequence.cuh"
#include "cuda/hopper/scheduler.cuh"

namespace onepass::cuda::hopper {

// Of the columns 8j + e (e = 0, 1) of a lane, bits 2j + e of those below `end`.
ONEPASS_DEVICE std::uint32_t columns_below(int end) {
  const int count = min(max(end, 0) / 8 * 2 + min(max(end, 0) % 8, 2), 32);
  return count == 32 ? ~0u : (1u << count) - 1;
}

// Hides what the lane's rows, lane_row and lane_row + 8, do not see of the block's kKeys keys, which begin at key
// `start`.
template <int kKeys, int R>
ONEPASS_DEVICE void mask_block(float (&s)[R], const Window& window, const Tile& tile, int lane_row, int start) {
  static_assert(kKeys <= 128, "a bit for each column of a lane");
  const int lane_start = start + threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane_row + 8 * r;
    const std::uint32_t visible = columns_below(visible_end(window, tile, row) - lane_start) &
                                  ~columns_below(visible_begin(window, tile, row) - lane_start);
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      if ((visible >> i & 1) == 0) s[4 * (i / 2) + 2 * r + i % 2] = -kInfinity;
    }
  }
}

}  // namespace onepass::cuda::hopper
