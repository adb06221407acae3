// cuda/portable/backward.h: what the host and the backward kernels agree on.
//
// The pass is: statistics (delta = rowsum(dO∘O), LSE in log2 units), then one kernel in which keys stay and queries
// stream past: Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ are computed transposed, so that Pᵀ and dSᵀ are already the A operands of
// dV += Pᵀ·dO and dK += dSᵀ·Q; only dS passes through shared memory, for dQ += dS·K, which is summed over key tiles in
// float32 in global memory and converted at the end. At head_dim 128 a wider tile, whose P passes through shared memory
// too, reads a quarter less of it; it needs a device with 161 KB for a block. With `deterministic`, and for float32
// operands, dQ comes from a kernel of its own in which queries stay. The gradient of a bias has its own kernel too.
#pragma once

#include "core/problem.h"

namespace onepass::cuda {

// Which accumulators one pass of the key-stationary kernel holds. Beyond head_dim 128 both do not fit in registers.
enum class Pass { kBoth, kValue, kKey };

// Rows of statistics and of the dQ sums are padded to this for every sequence, so that no tile crosses two.
inline constexpr int kPadding = 64;

template <bool kFloat, int kHeadDim, bool kTerms, Pass kPass>
struct KeyTileShape {
  static constexpr int kWarps = kFloat                     ? (kHeadDim <= 128 || kPass == Pass::kValue ? 2 : 1)
                                : kHeadDim <= 64 && kTerms ? 8
                                                           : 4;
  // m16 tiles of a warp: a query fragment feeds as many products. Two where dK and dV leave the registers for it.
  static constexpr int kRowTiles = !kFloat && kHeadDim <= 64 && !kTerms ? 2 : 1;
  static constexpr int kKeys = 16 * kRowTiles * kWarps;
  static constexpr int kQueries = kFloat || kHeadDim > 128 ? 16 : 32;
  // Warps that divide the rows of dQ; the others divide its columns.
  static constexpr int kQueryWarps = kQueries / 16 < kWarps ? kQueries / 16 : kWarps;

  static constexpr bool kHoldsKey = kPass != Pass::kValue, kHoldsValue = kPass != Pass::kKey;
  static constexpr int kRowBytes = kFloat ? (kHeadDim + 4) * 4 : kHeadDim * 2;
  static constexpr int kScoreBytes = kKeys * (kFloat ? (kQueries + 4) * 4 : kQueries * 2);
  static constexpr int kScoreTiles = kFloat ? kHoldsKey + kHoldsValue : kHoldsKey;  // dS; in float32 also P
  static constexpr int kStages = 2;

  static constexpr int shared_bytes() {
    return kKeys * kRowBytes * (kHoldsKey ? 2 : 1) + kStages * (kQueries * (2 * kRowBytes + 8) + 16) +
           kScoreTiles * kScoreBytes;
  }
};

// Tile of the kernels in which queries stay: deterministic dQ, and the gradient of a bias.
template <bool kFloat, int kHeadDim>
struct QueryTileShape {
  static constexpr int kWarps = kFloat ? 2 : 4;
  static constexpr int kQueries = 16 * kWarps;
  static constexpr int kKeys = kFloat ? (kHeadDim > 128 ? 8 : 32) : kHeadDim > 128 ? 32 : 64;

  static constexpr int shared_bytes() {
    return 2 * (kQueries + kKeys) * (kFloat ? (kHeadDim + 4) * 4 : kHeadDim * 2) +
           (kFloat ? kQueries * (kKeys + 4) * 4 : 0);
  }
};

// Rows of one block of the statistics kernel. Where an LSE of a block exceeds what 2^(c·s − c·lse) by one FMA can take
// (kFusedLimit), and for float32, its LSEs are in natural units and the difference comes first.
template <bool kFloat>
inline constexpr int kStatisticsRows = kFloat ? 32 : 64;

inline constexpr std::int64_t kCounterBytes = 256;

struct RowStatistics {
  float lse;  // in log2 units, or natural ones (below); +inf for a row without a visible key: its weights come out as 0
  float delta;
};

struct VectorizedBackward {
  bool q, k, v, out, dout, dq, dk, dv;
};

struct BackwardArguments {
  BackwardProblem problem;
  int group_size;
  int tiles;             // of keys (or queries) of the longest sequence
  int planes_per_group;  // planes that are worked on together
  VectorizedBackward vectorized;
  float scale_log2;           // as in the forward pass
  RowStatistics* statistics;  // (num_heads, padded_rows)
  std::int32_t* natural;      // (num_heads, padded_rows / kStatisticsRows): whether a block's LSEs are in natural units
  float* dq_sums;             // (num_heads, padded_rows, kHeadDim) in fragment order; null: dQ is computed elsewhere
  std::int64_t padded_rows;   // of all sequences
  void* counter;              // memory for another backend's kernels, kCounterBytes
  bool add;                   // dV and dbias are added to what stands there: gradients of other keys' logits
};

struct BackwardKernel {
  void (*kernel)(BackwardArguments);
  int rows;  // keys or queries of a tile
  int threads;
  int shared_bytes;
  bool has_terms;
};

// The kernels for operands padded to kHeadDim; instantiated in backward_<dim>.cu.
template <int kHeadDim>
struct BackwardKernels {
  static BackwardKernel key_pass(DType dtype, bool terms, Pass pass);
  // Both accumulators, plain logits, 16-bit operands; no kernel where the head dim has none.
  static BackwardKernel wide_key_pass(DType dtype);
  static BackwardKernel query_pass(DType dtype);
  static BackwardKernel bias_gradient(DType dtype);
  static int bias_keys(DType dtype);  // keys of a tile of bias_gradient
  static BackwardKernel row_statistics(DType dtype);
  static BackwardKernel convert_dq(DType dtype, bool terms, bool wide);  // 16-bit operands, after either pass
};

}  // namespace onepass::cuda
