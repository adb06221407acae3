// cuda/hopper/plan.h: what the host decides for one forward launch beyond the problem itself.
#pragma once

#include <cstdint>

#include "cuda/hopper/tile_counter.h"

namespace onepass::cuda::hopper {

struct Plan {
  int tiles = 0;  // row tiles × heads × splits; ragged: an upper bound
  TileCounter counter;
  int splits = 1;  // parts of each row tile's keys, merged by a second kernel
  bool heavy_first = false;
  int cached_keys = 0;  // of heads whose keys and values share the L2
  int wave_keys = 0;    // rows that all SMs work on at once
  bool tma_store = false;

  // Piecewise attention: keys i' − j ≥ dist_threshold belong to the far pair, so that either pair has a window of its
  // own, within the problem's.
  int dist_threshold = 0;
  std::int64_t near_left = 0, far_right = 0;

  // splits > 1: float32 partial results, (split, batch, head, query[, head_dim_v]); ragged: (split, head, total_q …).
  float* partial_out = nullptr;
  float* partial_lse = nullptr;
};

}  // namespace onepass::cuda::hopper
