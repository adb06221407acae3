// api/kv_cache.h: a KVCacheView and new tokens for it → KVStorage and AppendProblem, checked.
#pragma once

#include "api/lower.h"
#include "core/cache_problem.h"

namespace onepass::api {

// Shapes, dtypes and strides. What index tensors hold is checked by check_sequences, once the new tokens are known.
KVStorage lower_cache(const char* operation, const KVCacheView& cache);

// cos and sin beside tokens of `dtype`; an empty table when not given.
RotaryTable lower_rotary(const char* operation, const Rotary& rotary, Device device, DType dtype,
                         std::int64_t head_dim);

// New tokens: dense (B, G, S, dim) or, with cu_seqlens given, packed (total, G, dim). k_new is not checked against
// the contents of index tensors: check_sequences does.
struct NewTensors {
  Named k, v;
  Named cu_seqlens;  // names in messages differ between append_kv and cached_attention
  Named counts;
};
AppendProblem lower_append(const char* operation, const KVCacheView& view, const KVStorage& cache,
                           const NewTensors& tensors, const Rotary& rotary, bool advance);

// Host indices (on CUDA the kernels check): lengths after the append fit the capacity and the rotary table, every page
// and row that is read or written exists, and no two sequences write to the same one. Returns the longest sequence.
std::int64_t check_sequences(const char* operation, const KVStorage& cache, const NewTokens& tokens,
                             const RotaryTable& rotary);

}  // namespace onepass::api
