// cuda/hopper/sequence_cursor.cuh: which sequence of a ragged batch a tile belongs to, found by a warp.
#pragma once

#include "cuda/common/scalar.cuh"

namespace onepass::cuda::hopper {

// Sequences in the order given; the cursor only moves forward because a CTA draws rising numbers.
class SequenceCursor {
 public:
  // Calls use(b, i) for tile number `number`, which is tile i of sequence b, where every sequence b < batch has
  // tiles_of(b) tiles; false when there is no such tile. Run by a whole warp.
  template <class TilesOf, class Use>
  ONEPASS_DEVICE bool find(int number, int batch, const TilesOf& tiles_of, const Use& use) {
    const int lane = threadIdx.x % 32;
    while (sequence_ < batch) {
      int tiles = 0;
      if (sequence_ + lane < batch) tiles = tiles_of(sequence_ + lane);
      int through = tiles;  // inclusive prefix sum
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, through, step);
        if (lane >= step) through += other;
      }
      const unsigned beyond = __ballot_sync(~0u, before_ + through > number);
      if (beyond != 0) {
        const int found = __ffs(static_cast<int>(beyond)) - 1;
        const int start = before_ + __shfl_sync(~0u, through - tiles, found);
        use(sequence_ + found, number - start);
        return true;
      }
      before_ += __shfl_sync(~0u, through, 31);
      sequence_ += 32;
    }
    return false;
  }
  // Tiles of all sequences, once there was no such tile.
  ONEPASS_DEVICE int total() const { return before_; }

 private:
  int sequence_ = 0, before_ = 0;  // the first of the 32 sequences in view, and the tiles before it
};

}  // namespace onepass::cuda::hopper
