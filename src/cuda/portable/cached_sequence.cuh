// cuda/portable/cached_sequence.cuh: bounds of a cached sequence, and where its tokens lie (device side of
// core/cache_problem.h). Lengths, pages and rows come from device memory: what is out of range is clamped or skipped.
#pragma once

#include "core/cache_problem.h"
#include "cuda/common/sequence.cuh"
#include "cuda/portable/decode.h"
#include "cuda/portable/decode_ptx.cuh"

namespace onepass::cuda {

ONEPASS_DEVICE int new_tokens(const NewTokens& tokens, int batch) {
  if (tokens.cu_seqlens != nullptr) return max(tokens.cu_seqlens[batch + 1] - tokens.cu_seqlens[batch], 0);
  const int each = static_cast<int>(tokens.each);
  return tokens.counts != nullptr ? min(max(tokens.counts[batch], 0), each) : each;
}

// kPlain: dense queries and nothing pending; may also be called before wait_for_previous_grid(), for a guess.
template <bool kPlain = false>
ONEPASS_DEVICE DeviceSequence cached_sequence(const DecodeArguments& a, int batch) {
  DeviceSequence s;
  s.query_start = s.key_start = 0;
  s.seqlen_q = a.seqlen_q;
  const auto index = [&](const std::int32_t* indices) { return kPlain ? load_index(indices + batch) : indices[batch]; };
  s.seqlen_k = min(max(index(a.seqlens), 0), a.capacity);
  if constexpr (!kPlain) {
    const Problem& p = a.problem.attention;
    if (p.cu_seqlens_q != nullptr) {
      const Span queries = ragged_span(p.cu_seqlens_q, batch, p.seqlen_q, p.total_q);
      s.query_start = queries.start;
      s.seqlen_q = queries.size;
    }
    s.seqlen_k = min(s.seqlen_k + min(new_tokens(a.problem.pending, batch), a.capacity), a.capacity);
  }
  s.key_begin = a.first_key != nullptr ? min(max(index(a.first_key), 0), s.seqlen_k) : 0;
  s.key_end = s.seqlen_k;
  s.diagonal = s.seqlen_k - s.seqlen_q;
  return s;
}

// The keys that a query sees, and those of queries [first, last].
ONEPASS_DEVICE Range visible_keys(const DecodeArguments& a, const DeviceSequence& s, int query) {
  const int center = query + s.diagonal;
  return {min(max(s.key_begin, center - a.window_left), s.seqlen_k),
          max(min(s.key_end, center + a.window_right + 1), 0)};
}
ONEPASS_DEVICE TileKeys tile_keys(const DecodeArguments& a, const DeviceSequence& s, int first, int last) {
  const Range of_first = visible_keys(a, s, first), of_last = visible_keys(a, s, last);
  return {{of_first.begin, of_last.end}, {of_last.begin, of_first.end}};
}

// Position that rotary embeddings give to query i; a query before the first valid key sees nothing.
ONEPASS_DEVICE int rotary_position(const RotaryTable& table, const KVStorage& cache, const DeviceSequence& sequence,
                                   int batch, int query) {
  const int start = cache.first_key != nullptr ? max(cache.first_key[batch], 0) : 0;
  return clamp_to(std::int64_t{query} + sequence.diagonal - start, 0, table.max_positions - 1);
}

// Block −1: nowhere.
struct TokenSlot {
  int block, offset;
};

ONEPASS_DEVICE TokenSlot slot_of(const KVStorage& cache, const Divider& block_tokens, int batch, int token) {
  TokenSlot slot{batch, token};
  if (cache.page_table != nullptr) {
    const int page = block_tokens(token);
    slot = {cache.page_table[batch * cache.page_table_stride + page],
            token - page * static_cast<int>(cache.block_tokens)};
  } else if (cache.batch_index != nullptr) {
    slot.block = cache.batch_index[batch];
  }
  if (slot.block < 0 || slot.block >= cache.num_blocks) slot.block = -1;
  return slot;
}

ONEPASS_DEVICE std::int64_t offset_in(const Operand& operand, TokenSlot slot, int head) {
  return slot.block * operand.batch_stride + head * operand.head_stride + slot.offset * operand.token_stride;
}
ONEPASS_DEVICE std::int64_t offset_in(const CacheScale& scale, TokenSlot slot, int head) {
  return slot.block * scale.block_stride + head * scale.head_stride + slot.offset * scale.token_stride;
}

}  // namespace onepass::cuda
