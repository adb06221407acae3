// support/cache.h: a cache with random tokens for a few sequences, and what attention over it should give.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "support/case.h"
#include "support/cases.h"

namespace onepass::test {

struct CacheCase {
  std::string name;
  std::int64_t num_heads = 4, num_heads_kv = 2, head_dim = 64, head_dim_v = 0;  // 0: head_dim
  std::vector<std::int64_t> lengths = {70, 33, 128};                            // of each sequence, all tokens included
  std::vector<std::int64_t> queries = {1, 1, 1};                                // unequal: packed
  bool packed = false;                                                          // even when equal
  std::int64_t capacity = 160;
  std::int64_t page_size = 0;         // 0: contiguous
  std::optional<DType> storage = {};  // default: the dtype of q
  ScaleGranularity granularity = ScaleGranularity::kNone;
  std::int64_t scale_group = 0;
  bool token_major = false;  // storage (block, token, head, dim)
  bool batch_index = false;  // rows in another order, one left over
  std::vector<std::int32_t> first_key = {};
  bool causal = true;
  std::optional<std::int64_t> left = {}, right = {};
  double softcap = 0.0;
  AlibiKind alibi = AlibiKind::kNone;
  bool sinks = false;
  double magnitude = 1.0;
  std::int64_t rotary_pairs = 0;
  bool interleaved = false;
  bool append = false;  // the queries' keys are appended by cached_attention itself
  bool advance = true;
  std::int64_t num_splits = 0;
  double prob_threshold = 0.0;
};

void PrintTo(const CacheCase& definition, std::ostream* stream);
const std::vector<CacheCase>& cache_cases();

// A cache in memory, filled by append_kv on a backend.
class CacheInstance {
 public:
  CacheInstance(const CacheCase& definition, const Target& target, std::uint64_t seed = 1);

  CacheCase c;
  Target target;
  std::int64_t batch() const { return static_cast<std::int64_t>(c.lengths.size()); }
  DType storage() const { return c.storage.value_or(target.dtype); }
  std::int64_t blocks() const;
  std::int64_t block_tokens() const { return c.page_size ? c.page_size : c.capacity; }
  std::vector<std::int64_t> query_starts() const;
  bool packed() const;

  Tensor k, v, k_scale, v_scale, page_table, seqlens, first_key, batch_index;
  Tensor q, k_new, v_new, cu_seqlens, out, lse, sinks, slopes, cos, sin;
  Values keys, values;  // of all tokens, (batch, num_heads_kv, length, dim) one after the other, before quantization
  Values queries;       // (query of all sequences, num_heads, head_dim), before rotation

  KVCacheView view() const;
  CachedOptions options() const;
  // Writes tokens [from, to) of every sequence, given as fractions of their counts, in one call.
  void append(const std::vector<std::int64_t>& from, const std::vector<std::int64_t>& to, bool as_packed);
  void attend() { attend(target.context()); }
  void attend(const ExecutionContext& context);

  // What the cache holds for token t, by its own arithmetic on the stored bytes.
  Values stored_key(std::int64_t b, std::int64_t g, std::int64_t t) const;
  Values stored_value(std::int64_t b, std::int64_t g, std::int64_t t) const;
  // Key t as it should have been stored, before quantization: rotated.
  Values expected_key(std::int64_t b, std::int64_t g, std::int64_t t) const;
  Values rotated(Values row, std::int64_t position) const;

  // One sequence as a dense case of batch 1 over the stored keys and values.
  Instance sequence(std::int64_t b) const;
  // out (query of all sequences, num_heads, dim) and lse (query, num_heads), in order.
  Values loaded_out() const;
  Values loaded_lse() const;

 private:
  Values stored_row(const Tensor& tensor, const Tensor& scale, std::int64_t dim, std::int64_t b, std::int64_t g,
                    std::int64_t t) const;
  std::int64_t offset_of(std::int64_t b) const;  // of sequence b in `keys`, in tokens·heads
};

}  // namespace onepass::test
