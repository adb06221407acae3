// cuda/portable/total_attention.h: the sum over queries of the attention weights, from the log-sum-exp.
#pragma once

#include "core/problem.h"
#include "onepass/execution.h"

namespace onepass::cuda {

// Tile of one block: kKeys keys of one head against kQueries queries a step.
template <bool kFloat, int kHeadDim>
struct TotalAttentionTile {
  static constexpr int kWarps = kFloat && kHeadDim > 128 ? 2 : 4;
  static constexpr int kKeys = 16 * kWarps;
  static constexpr int kQueries = kFloat ? 32 : kHeadDim > 128 ? 32 : 64;

  static constexpr int shared_bytes() {
    return (kKeys + kQueries) * (kFloat ? (kHeadDim + 4) * 4 : kHeadDim * 2) + kQueries * 4;
  }
};

struct TotalAttentionArguments {
  Problem problem;
  int group_size;
  int key_tiles;
  bool vectorized_q, vectorized_k;
  bool add;  // to what stands in total_attention
};

struct TotalAttentionKernel {
  void (*kernel)(TotalAttentionArguments);
  int keys, threads, shared_bytes;
};

// Instantiated in total_attention_<dim>.cu.
template <int kHeadDim>
TotalAttentionKernel total_attention_kernel_for(DType dtype);

// Writes problem.total_attention, or adds to it; reads problem.lse, which the forward pass has written on the same
// stream.
void sum_columns(const Problem& problem, const ExecutionContext& context, bool add = false);

}  // namespace onepass::cuda
