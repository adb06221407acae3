#include "cpu/few_rows.h"

#include <algorithm>
#include <vector>

#include "core/cache_problem.h"
#include "cpu/cached.h"

namespace onepass::cpu {
namespace {

constexpr std::int64_t kFewRows = 8;     // of one key/value head
constexpr std::int64_t kManyKeys = 128;  // below, planning costs more than it gives
// A row's keys are split by their own number alone, so that neither threads nor other sequences change results. Short
// parts also keep long sums accurate: the decode kernel adds weights and weighted values in different orders.
constexpr std::int64_t kKeysPerPart = 512;

}  // namespace

bool has_few_rows(const Problem& problem) {
  return problem.seqlen_q * problem.group_size() <= kFewRows && problem.seqlen_k >= kManyKeys;
}

void forward_few_rows(const Problem& problem, const ExecutionContext& context) {
  std::vector<std::int32_t> seqlens(static_cast<std::size_t>(problem.batch));
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    seqlens[static_cast<std::size_t>(b)] = static_cast<std::int32_t>(sequence_of(problem, b).seqlen_k);
  }
  CachedProblem cached_problem;
  cached_problem.attention = problem;
  cached_problem.keys_per_part = kKeysPerPart;
  KVStorage& cache = cached_problem.cache;
  cache.dtype = problem.dtype;
  cache.batch = problem.batch;
  cache.num_blocks = problem.ragged() ? 1 : problem.batch;
  cache.num_heads_kv = problem.num_heads_kv;
  cache.head_dim = problem.head_dim;
  cache.head_dim_v = problem.head_dim_v;
  cache.block_tokens = problem.ragged() ? problem.total_k : problem.seqlen_k;
  cache.group_channels = std::max(problem.head_dim, problem.head_dim_v);
  cache.k = problem.k;
  cache.v = problem.v;
  cache.seqlens = seqlens.data();
  cache.first_key = problem.key_begin;
  cache.cu_seqlens = problem.cu_seqlens_k;
  cached(cached_problem, context);
}

}  // namespace onepass::cpu
