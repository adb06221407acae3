#include "support/cache_oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "support/naive.h"

namespace onepass::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The rows of a dense instance of batch 1 in the order of CacheInstance::loaded_out and loaded_lse.
void append_rows(const Instance& in, const Results& results, Values& out, Values& lse) {
  for (std::int64_t i = 0; i < in.c.seqlen_q; ++i) {
    for (std::int64_t h = 0; h < in.c.num_heads; ++h) {
      const auto row = results.out.begin() + in.query_row(0, h, i) * in.c.head_dim_v;
      out.insert(out.end(), row, row + in.c.head_dim_v);
      lse.push_back(results.lse[in.lse_at(0, h, i)]);
    }
  }
}

// out without the values whose weight relative to the row's largest is at most `threshold`.
Values pruned(const Instance& in, double threshold, const Results& exact) {
  Values out = exact.out;
  for (std::int64_t h = 0; h < in.c.num_heads; ++h) {
    const std::int64_t g = h / (in.c.num_heads / in.c.num_heads_kv);
    for (std::int64_t i = 0; i < in.c.seqlen_q; ++i) {
      Values logits(in.c.seqlen_k, -kInfinity);
      for (std::int64_t j = 0; j < in.c.seqlen_k; ++j) {
        if (!in.visible(0, i, j)) continue;
        double dot = 0;
        for (std::int64_t d = 0; d < in.c.head_dim; ++d) {
          dot += in.q[in.query_row(0, h, i) * in.c.head_dim + d] * in.k[in.key_row(0, g, j) * in.c.head_dim + d];
        }
        logits[j] = dot * in.scale();
      }
      const double largest = *std::max_element(logits.begin(), logits.end()), lse = exact.lse[in.lse_at(0, h, i)];
      for (std::int64_t d = 0; d < in.c.head_dim_v; ++d) {
        double& sum = out[in.query_row(0, h, i) * in.c.head_dim_v + d] = 0;
        for (std::int64_t j = 0; j < in.c.seqlen_k; ++j) {
          if (std::exp(logits[j] - largest) <= threshold) continue;
          sum += std::exp(logits[j] - lse) * in.v[in.key_row(0, g, j) * in.c.head_dim_v + d];
        }
      }
    }
  }
  return out;
}

}  // namespace

Expected expected(const CacheInstance& cache) {
  Expected e;
  for (std::int64_t b = 0; b < cache.batch(); ++b) {
    const Instance dense = cache.sequence(b);
    Results want = oracle(dense, /*with_backward=*/false), yardstick = naive(dense, cache.target.dtype);
    if (cache.c.prob_threshold > 0) {
      const Values kept = pruned(dense, cache.c.prob_threshold, want);
      for (std::size_t i = 0; i < kept.size(); ++i) yardstick.out[i] += kept[i] - want.out[i];
      want.out = kept;
    }
    append_rows(dense, want, e.out, e.lse);
    append_rows(dense, yardstick, e.naive_out, e.naive_lse);
  }
  return e;
}

}  // namespace onepass::test
