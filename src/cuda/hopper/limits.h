// cuda/hopper/limits.h: what every Hopper kernel asks of a problem, and the shapes of its operands as TMA sees them.
#pragma once

#include <algorithm>
#include <string>

#include "core/backend.h"
#include "cuda/device.h"
#include "cuda/hopper/tensor_map.h"
#include "cuda/portable/head_dims.h"

namespace onepass::cuda::hopper {

inline constexpr std::int64_t kMaxTokens = std::int64_t{1} << 28;  // positions and window sums stay within int32

inline OperandShape query_shape(const Problem& p, std::int64_t dim) {
  return {dim, p.ragged() ? p.total_q : p.seqlen_q, p.num_heads, p.ragged() ? 1 : p.batch};
}
inline OperandShape key_shape(const Problem& p, std::int64_t dim) {
  return {dim, p.ragged() ? p.total_k : p.seqlen_k, p.num_heads_kv, p.ragged() ? 1 : p.batch};
}

// The scores are more than softmax_scale·q·k; a scale too small to be divided by counts as a term.
inline bool has_score_terms(const Problem& p) {
  return p.softcap > 0.0 || p.alibi_slopes != nullptr || p.bias || !(p.softmax_scale > 1e-20f);
}

// Whether this build has kernels for the head dim.
template <int kHeadDim>
inline constexpr bool kCompiled = std::find(kHeadDims.begin(), kHeadDims.end(), kHeadDim) != kHeadDims.end();

[[noreturn]] inline void throw_no_kernel(const Problem& p, std::int64_t head_dim) {
  throw Error(ErrorCode::kUnsupported, std::string(p.operation) + ": head_dim: got " + std::to_string(head_dim) +
                                           "; need a head_dim with kernels in this build");
}

inline Unsupported rejects_head_dim(std::int64_t head_dim) {
  if (head_dim == 0) return "an empty dimension";
  if (head_dim > kHeadDims.back()) return "head_dim above " + std::to_string(kHeadDims.back());
  if (head_dim % 8 != 0) return "head_dim that is no multiple of 8";
  return std::nullopt;
}

// Device, dtype, sizes, and how q and k lie in memory.
inline Unsupported rejects_queries_and_keys(const Problem& p) {
  if (device_info(p.device.index).compute_capability != 90) return "a device that is not sm_90";
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return std::string(name_of(p.dtype)) + " tensors";
  if (auto reason = rejects_head_dim(p.head_dim)) return reason;
  if (p.batch == 0 || p.num_heads == 0) return "an empty dimension";
  if (p.total_q == 0 || p.total_k == 0 || p.seqlen_q == 0 || p.seqlen_k == 0) return "an empty dimension";
  if (std::max({p.seqlen_q, p.seqlen_k, p.total_q / 4, p.total_k / 4}) > kMaxTokens) return "more than 2^28 tokens";
  if (auto reason = tma_rejects("q", p.q, query_shape(p, p.head_dim))) return reason;
  return tma_rejects("k", p.k, key_shape(p, p.head_dim));
}

// How v lies in memory, and the window, beyond what is asked of q and k.
inline Unsupported rejects_values_and_window(const Problem& p) {
  if (auto reason = rejects_head_dim(p.head_dim_v)) return reason;
  if (p.window_left > kMaxTokens || p.window_right > kMaxTokens) return "a window beyond 2^28";
  return tma_rejects("v", p.v, key_shape(p, p.head_dim_v));
}

// Tiles of `keys` keys of all sequences for each of `heads` heads; ragged: an upper bound.
inline std::int64_t count_key_tiles(const Problem& p, std::int64_t heads, int keys) {
  return heads * (p.ragged() ? p.total_k / keys + p.batch : p.batch * ((p.seqlen_k + keys - 1) / keys));
}

}  // namespace onepass::cuda::hopper
