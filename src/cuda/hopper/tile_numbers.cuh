// cuda/hopper/tile_numbers.cuh: the numbers of the tiles that a CTA works on: its own index, then what it draws.
#pragma once

#include <climits>

#include "cuda/common/ticket.cuh"
#include "cuda/hopper/tile_counter.h"

namespace onepass::cuda::hopper {

// Run by a whole warp; every lane gets the same number. A CTA draws until it gets a number without a tile, and not
// again: as many numbers are drawn as there are tiles.
class TileNumbers {
 public:
  ONEPASS_DEVICE explicit TileNumbers(const TileCounter& counter) : counter_(counter) {}

  // Draws the next number; nobody waits for it before it is asked for.
  ONEPASS_DEVICE void draw() {
    if (counter_.count == nullptr) {
      drawn_ = INT_MAX - gridDim.x;
    } else if (threadIdx.x % 32 == 0) {
      if (first_ && counter_.ticket != 0) claim_counter(counter_.count, load_counter(counter_.count), counter_.ticket);
      drawn_ = static_cast<int>(atomicAdd(reinterpret_cast<unsigned long long*>(counter_.count), 1) - counter_.ticket);
    }
    first_ = false;
  }
  ONEPASS_DEVICE int number() const { return static_cast<int>(gridDim.x) + __shfl_sync(~0u, drawn_, 0); }

  // There is no tile of this number, but `tiles` before it. Whoever has drawn the last number leaves the counter as
  // the next run of a graph needs it.
  ONEPASS_DEVICE void end(int tiles) const {
    if (counter_.count == nullptr || threadIdx.x % 32 != 0 || drawn_ != tiles - 1) return;
    *counter_.count = counter_.ticket;
  }

 private:
  const TileCounter& counter_;
  int drawn_ = static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x);  // in lane 0, beyond the CTAs' first ones
  bool first_ = true;
};

}  // namespace onepass::cuda::hopper
