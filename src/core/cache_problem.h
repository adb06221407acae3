// core/cache_problem.h: what append_kv and cached_attention are lowered to. A contiguous cache is a paged one with one
// block for each sequence.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "core/sequence.h"
#include "onepass/kv_cache.h"

namespace onepass {

// Scale of channel d of (block, head, token): data[block·… + head·… + token·… + d / group_channels]. Dimensions that
// share a scale have stride 0; group_channels is at least the head dim unless channels have scales of their own.
struct CacheScale {
  float* data = nullptr;  // null: 1
  std::int64_t block_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;

  explicit operator bool() const { return data != nullptr; }
  float* at(std::int64_t block, std::int64_t head, std::int64_t token) const {
    return data + block * block_stride + head * head_stride + token * token_stride;
  }
};

// Where a token lies.
struct Slot {
  std::int64_t block, offset;
};

struct KVStorage {
  DType dtype = DType::kFloat32;
  std::int64_t batch = 0, num_heads_kv = 0, head_dim = 0, head_dim_v = 0;
  std::int64_t num_blocks = 0;    // rows of a contiguous cache, pages of a paged one
  std::int64_t block_tokens = 0;  // capacity, or page_size
  Operand k, v;                   // batch_stride: from block to block
  ScaleGranularity granularity = ScaleGranularity::kNone;
  std::int64_t group_channels = 0;
  CacheScale k_scale, v_scale;
  const std::int32_t* page_table = nullptr;  // null: contiguous
  std::int64_t page_table_stride = 0, max_pages = 0;
  std::int32_t* seqlens = nullptr;            // (batch), on the cache's device like all indices here
  const std::int32_t* first_key = nullptr;    // null: 0
  const std::int32_t* batch_index = nullptr;  // null: b
  const std::int32_t* cu_seqlens = nullptr;   // one packed block: token t of sequence b lies at cu_seqlens[b] + t

  bool paged() const { return page_table != nullptr; }
  std::int64_t capacity() const { return paged() ? max_pages * block_tokens : block_tokens; }

  // Host side, of indices that have been checked.
  std::int64_t start(std::int64_t b) const { return first_key ? std::max<std::int64_t>(first_key[b], 0) : 0; }
  Slot slot(std::int64_t b, std::int64_t token) const {
    if (cu_seqlens != nullptr) return {0, cu_seqlens[b] + token};
    if (!paged()) return {batch_index ? batch_index[b] : b, token};
    return {page_table[b * page_table_stride + token / block_tokens], token % block_tokens};
  }
};

// Tokens that an append adds to each sequence: rows [first(b), first(b) + count(b)) of the new tensors.
struct NewTokens {
  std::int64_t each = 0;                     // dense: tokens of every row
  const std::int32_t* counts = nullptr;      // dense: how many of them count; null: all
  const std::int32_t* cu_seqlens = nullptr;  // packed

  std::int64_t first(std::int64_t b) const { return cu_seqlens ? cu_seqlens[b] : 0; }
  std::int64_t count(std::int64_t b) const {
    if (cu_seqlens) return cu_seqlens[b + 1] - cu_seqlens[b];
    return counts ? counts[b] : each;
  }
};

struct RotaryTable {
  const void* cos = nullptr;  // null: no rotary embedding
  const void* sin = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t cos_stride = 0, sin_stride = 0;  // from position to position
  std::int64_t max_positions = 0, pairs = 0;
  bool interleaved = false;

  explicit operator bool() const { return cos != nullptr; }
};

struct AppendProblem {
  const char* operation = "append_kv";  // for messages
  Device device = {};
  DType dtype = DType::kFloat32;  // of k_new and v_new
  KVStorage cache;
  NewTokens tokens;
  std::int64_t max_new = 0;    // no sequence gets more
  std::int64_t total_new = 0;  // rows of the new tensors over all sequences
  Operand k_new, v_new;        // packed: batch stride 0
  RotaryTable rotary;          // of k_new
  bool advance = true;         // then add the counts to cache.seqlens
};

struct CachedProblem {
  // q, out, lse, mask and score. k and v are null; seqlen_k bounds the longest sequence; ragged by cu_seqlens_q alone.
  Problem attention;
  KVStorage cache;
  NewTokens pending;   // stored already but not yet counted in cache.seqlens
  RotaryTable rotary;  // of q
  std::int64_t num_splits = 0;
  std::int64_t keys_per_part = 0;  // > 0: instead, as many parts as leave each at most this many keys
  double prob_threshold = 0.0;
};

// Bounds of one sequence (host side): like sequence_of(Problem), with the cache's length.
inline Sequence sequence_of(const CachedProblem& problem, std::int64_t b) {
  const Problem& p = problem.attention;
  Sequence s;
  s.seqlen_q = p.seqlen_q;
  if (p.ragged()) {
    s.query_start = p.cu_seqlens_q[b];
    s.seqlen_q = p.cu_seqlens_q[b + 1] - s.query_start;
  }
  s.seqlen_k = problem.cache.seqlens[b] + problem.pending.count(b);
  s.key_begin = std::min(problem.cache.start(b), s.seqlen_k);
  s.key_end = p.key_end ? std::clamp<std::int64_t>(p.key_end[b], 0, s.seqlen_k) : s.seqlen_k;
  s.diagonal = p.top_left ? 0 : s.seqlen_k - s.seqlen_q;
  return s;
}

}  // namespace onepass
