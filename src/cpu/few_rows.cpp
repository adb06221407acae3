#include "cpu/few_rows.h"

#include <algorithm>
#include <vector>

#include "core/cache_problem.h"
#include "cpu/cached.h"

namespace onepass::cpu {
namespace {

constexpr std::int64_t kFewRows = 8;     // of one key/value head
constexpr std::int64_t kManyKeys = 128;  // below, planning costs more than it gives
// Keys are split by the shape alone, so that threads do not change results. Short parts also keep long sums accurate:
// the decode kernel adds weights and weighted values in different orders.
constexpr std::int64_t kKeysPerPart = 512;

}  // namespace

bool has_few_rows(const Problem& problem) {
  const bool counts_from_the_end = !problem.top_left || problem.seqlen_q == problem.seqlen_k;
  const bool known = !problem.ragged() && !problem.bias && problem.dropout_p == 0 && problem.key_end == nullptr;
  return known && counts_from_the_end && problem.seqlen_q * problem.group_size() <= kFewRows &&
         problem.seqlen_k >= kManyKeys;
}

void forward_few_rows(const Problem& problem, const ExecutionContext& context) {
  std::vector<std::int32_t> seqlens(static_cast<std::size_t>(problem.batch),
                                    static_cast<std::int32_t>(problem.seqlen_k));
  CachedProblem cached_problem;
  cached_problem.attention = problem;
  cached_problem.num_splits = (problem.seqlen_k + kKeysPerPart - 1) / kKeysPerPart;
  KVStorage& cache = cached_problem.cache;
  cache.dtype = problem.dtype;
  cache.batch = cache.num_blocks = problem.batch;
  cache.num_heads_kv = problem.num_heads_kv;
  cache.head_dim = problem.head_dim;
  cache.head_dim_v = problem.head_dim_v;
  cache.block_tokens = problem.seqlen_k;
  cache.group_channels = std::max(problem.head_dim, problem.head_dim_v);
  cache.k = problem.k;
  cache.v = problem.v;
  cache.seqlens = seqlens.data();
  cache.first_key = problem.key_begin;
  cached(cached_problem, context);
}

}  // namespace onepass::cpu
