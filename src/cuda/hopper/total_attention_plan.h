// cuda/hopper/total_attention_plan.h: what the host decides for one launch of a total attention kernel, and the
// compiled kernels as it sees them.
#pragma once

#include <cuda.h>

#include "core/problem.h"
#include "cuda/hopper/key_tile_order.h"

namespace onepass::cuda::hopper {

struct TotalAttentionPlan {
  KeyTileOrder order;
  bool add = false;  // to what stands in total_attention
};

struct TotalAttentionKernel {
  void (*function)(CUtensorMap q, CUtensorMap k, Problem, TotalAttentionPlan);
  int keys;     // of a tile
  int queries;  // of a block
  int threads;
  int shared_memory;  // bytes
};

// Both dtypes of one head dim; with extra terms: softcap, ALiBi, bias.
struct TotalAttentionPair {
  TotalAttentionKernel float16, bfloat16;
  const TotalAttentionKernel& of(DType dtype) const { return dtype == DType::kFloat16 ? float16 : bfloat16; }
};

extern const TotalAttentionPair kTotalAttention64, kTotalAttention128, kTotalAttention256;
extern const TotalAttentionPair kTotalAttention64Terms, kTotalAttention128Terms, kTotalAttention256Terms;

}  // namespace onepass::cuda::hopper
