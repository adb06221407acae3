// cuda/hopper/backward_plan.h: what the host and the backward kernels agree on.
#pragma once

#include <cuda.h>

#include "cuda/hopper/key_tile_order.h"
#include "cuda/portable/backward.h"

namespace onepass::cuda::hopper {

struct BackwardMaps {
  CUtensorMap q, dout, k, v;
  CUtensorMap dk, dv;  // where stored by TMA
};

struct BackwardPlan {
  KeyTileOrder order;
  bool tma_store_dk = false, tma_store_dv = false;
};

struct BackwardKernel {
  void (*function)(BackwardMaps, BackwardArguments, BackwardPlan);
  void (*convert)(BackwardArguments);  // dQ from the sums: one block for 64 rows
  int keys;                            // of a tile
  int queries;                         // of a block
  int threads;
  int convert_threads;
  int shared_memory;  // bytes
};

// Both dtypes of one head dim.
struct BackwardPair {
  BackwardKernel float16, bfloat16;
  const BackwardKernel& of(DType dtype) const { return dtype == DType::kFloat16 ? float16 : bfloat16; }
};

extern const BackwardPair kBackward64, kBackward128;

}  // namespace onepass::cuda::hopper
