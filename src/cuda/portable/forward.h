// cuda/portable/forward.h: what the host and the forward kernels agree on.
#pragma once

#include "core/problem.h"

namespace onepass::cuda {

// Tile of one block of the forward kernel. Shared memory stays within the 99 KB of sm_86 and sm_89.
// float16, bfloat16: 32 query rows a warp up to head_dim 128, so that a K or V fragment feeds two mma; 16 beyond, where
// the output alone takes 96 registers or more. float32: small tiles, its products are FFMA.
template <bool kFloat, int kHeadDim, bool kTerms>
struct ForwardTile {
  static constexpr int kWarps = kFloat && kHeadDim > 128 ? 2 : 4;
  static constexpr int kQueries = kFloat ? 16 * kWarps : kHeadDim <= 128 ? 128 : 64;
  static constexpr int kKeys = kFloat ? (kHeadDim > 128 ? 16 : 32) : kTerms && kHeadDim > 64 ? 32 : 64;
  static constexpr bool kQueriesInRegisters = !kFloat && !kTerms && kHeadDim <= 64;
  static constexpr int kBlocksPerMultiprocessor = kFloat ? 1 : 2;

  static constexpr int shared_bytes() {
    const int row = kFloat ? (kHeadDim + 4) * 4 : kHeadDim * 2;
    return (kQueries + 2 * kKeys) * row + (kFloat ? kQueries * (kKeys + 4) * 4 : 0);
  }
};

// Operands whose rows can be moved 16 bytes at a time.
struct VectorizedForward {
  bool q, k, v, out;
};

struct ForwardArguments {
  Problem problem;
  int group_size;       // query heads of one key head
  int row_tiles;        // of the longest sequence
  int heads_per_group;  // (batch, head) planes that are worked on together
  bool last_rows_first;
  VectorizedForward vectorized;
  float scale_log2;  // of the scores that the softmax sees: log2(e), times softmax_scale where no term intervenes
  bool resume;       // out and lse hold the attention over other keys, which this call continues
};

struct ForwardKernel {
  void (*kernel)(ForwardArguments);
  int queries;  // rows of a tile
  int threads;
  int shared_bytes;
  bool has_terms;  // of logits; otherwise scale_log2 carries softmax_scale
};

// The kernel for operands padded to kHeadDim. Each head dim is instantiated in a file of its own, forward_<dim>.cu.
template <int kHeadDim>
ForwardKernel forward_kernel_for(DType dtype, bool terms);

}  // namespace onepass::cuda
