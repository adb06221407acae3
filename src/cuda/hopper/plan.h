// cuda/hopper/plan.h: what the host decides for one forward launch beyond the problem itself.
#pragma once

namespace onepass::cuda::hopper {

struct Plan {
  int tiles = 0;           // row tiles × heads × splits; ragged: an upper bound
  int* counter = nullptr;  // zero at launch; tiles beyond the first of each CTA are drawn from it
  int splits = 1;          // parts of each row tile's keys, merged by a second kernel
  bool heavy_first = false;
  int section_keys = 0;  // keys of all heads of a section together
  bool tma_store = false;

  // splits > 1: float32 partial results, (split, batch, head, query[, head_dim_v]); ragged: (split, head, total_q …).
  float* partial_out = nullptr;
  float* partial_lse = nullptr;
};

}  // namespace onepass::cuda::hopper
