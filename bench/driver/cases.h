// driver/cases.h: one measured call, its bytes and its arithmetic.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "onepass/onepass.h"

namespace onepass::bench {

enum class Kind {
  kPrefill,  // attention() of dense tensors
  kDecode,   // cached_attention(), the same number of queries for every sequence
  kHybrid,   // cached_attention(), some sequences with a chunk of queries and the others with one
};

struct Case {
  Kind kind = Kind::kPrefill;
  std::int64_t batch = 1, num_heads = 8, num_heads_kv = 8, head_dim = 64;
  std::int64_t seqlen_q = 1;  // of the sequences that prefill
  std::int64_t seqlen_k = 1024;
  std::int64_t prefill_fraction = 100;  // percent of the sequences, the first ones
  DType query_dtype = DType::kFloat32;
  DType dtype = DType::kFloat32;  // of the storage
  ScaleGranularity scale = ScaleGranularity::kNone;
  std::int64_t scale_group = 0;
  bool causal = true, alibi = false;
  std::optional<std::int64_t> window;  // keys that a query sees, itself counted
  std::int64_t page_size = 0;          // 0: contiguous
  std::int64_t num_splits = 0;

  std::int64_t prefills() const { return (batch * prefill_fraction + 50) / 100; }
  std::int64_t decodes() const { return batch - prefills(); }
  std::int64_t total_q() const { return prefills() * seqlen_q + decodes(); }

  double kv_bytes() const;  // stored for the keys and values, scales included
  double flops() const;     // 4·D for each visible pair of query and key
};

const char* name_of(Kind kind);

// Bytes of scales for one head of a token, K's and V's.
double scale_bytes(const Case& c);

}  // namespace onepass::bench
