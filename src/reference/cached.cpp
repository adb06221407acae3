// reference/cached.cpp: dequantizes a sequence's keys and values of one head, then computes its rows as the formulas
// say.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/cache_problem.h"
#include "core/float8.h"
#include "core/parallel.h"
#include "reference/head.h"
#include "reference/reference.h"
#include "reference/rotary.h"

namespace onepass::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Keys [begin, end) of (sequence b, head g) as doubles, row j at j·dim; what lies before begin stays 0.
std::vector<double> dequantize(const KVStorage& cache, const Operand& stored, const CacheScale& scale, std::int64_t dim,
                               std::int64_t b, std::int64_t g, const Sequence& s) {
  std::vector<double> rows(s.seqlen_k * dim, 0.0);
  for (std::int64_t j = s.key_begin; j < s.key_end; ++j) {
    const Slot slot = cache.slot(b, j);
    with_cache_type(cache.dtype, [&](auto zero) {
      const auto* row = stored.row<decltype(zero)>(slot.block, g, slot.offset);
      for (std::int64_t d = 0; d < dim; ++d) rows[j * dim + d] = to_double(row[d]);
    });
    if (!scale) continue;
    const float* scales = scale.at(slot.block, g, slot.offset);
    for (std::int64_t d = 0; d < dim; ++d) rows[j * dim + d] *= scales[d / cache.group_channels];
  }
  return rows;
}

// One sequence and query head as a dense float64 problem of batch 1.
class CachedHead {
 public:
  CachedHead(const CachedProblem& problem, std::int64_t b, std::int64_t h)
      : p_(problem), b_(b), h_(h), g_(h / problem.attention.group_size()), s_(sequence_of(problem, b)) {
    const KVStorage& cache = p_.cache;
    k_ = dequantize(cache, cache.k, cache.k_scale, cache.head_dim, b, g_, s_);
    v_ = dequantize(cache, cache.v, cache.v_scale, cache.head_dim_v, b, g_, s_);
    q_.resize(s_.seqlen_q * cache.head_dim);
    for (std::int64_t i = 0; i < s_.seqlen_q; ++i) {
      double* row = &q_[i * cache.head_dim];
      with_float_type(p_.attention.dtype, [&](auto zero) {
        const auto* source = query<decltype(zero)>(p_.attention.q, i);
        std::transform(source, source + cache.head_dim, row, [](auto x) { return to_double(x); });
      });
      rotate(p_.rotary, i + s_.diagonal - cache.start(b), row);
    }
    key_begin_ = static_cast<std::int32_t>(s_.key_begin);
    dense_ = p_.attention;
    dense_.dtype = DType::kFloat64;
    dense_.batch = 1;
    dense_.cu_seqlens_q = nullptr;
    dense_.seqlen_q = s_.seqlen_q;
    dense_.seqlen_k = s_.seqlen_k;
    dense_.q = {q_.data(), 0, 0, cache.head_dim};
    dense_.k = {k_.data(), 0, 0, cache.head_dim};
    dense_.key_begin = &key_begin_;
    if (dense_.alibi_slopes != nullptr) dense_.alibi_slopes += b * dense_.alibi_batch_stride;
  }

  void run() const {
    const Head<double> head(dense_, nullptr, 0, h_);
    for (std::int64_t i = 0; i < s_.seqlen_q; ++i) row(head, i);
  }

 private:
  template <class T>
  T* query(const Operand& operand, std::int64_t i) const {
    return operand.row<T>(b_, h_, s_.query_start + i);
  }

  void row(const Head<double>& head, std::int64_t i) const {
    const KeyRange keys = head.visible(i);
    const std::int64_t dim = p_.cache.head_dim_v;
    std::vector<double> logits(s_.seqlen_k), out(dim, 0.0);
    double largest = -kInfinity;
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      logits[j] = head.score(i, j).value;
      if (logits[j] > largest || std::isnan(logits[j])) largest = logits[j];
    }
    double lse = -kInfinity;
    if (largest != -kInfinity) {
      const double reference = head.has_sink() ? std::max(largest, head.sink()) : largest;
      double denominator = head.has_sink() ? std::exp(head.sink() - reference) : 0.0;
      for (std::int64_t j = keys.begin; j < keys.end; ++j) denominator += std::exp(logits[j] - reference);
      lse = reference + std::log(denominator);
      for (std::int64_t j = keys.begin; j < keys.end; ++j) {
        if (std::exp(logits[j] - largest) <= p_.prob_threshold) continue;
        const double weight = std::exp(logits[j] - lse);
        for (std::int64_t d = 0; d < dim; ++d) out[d] += weight * v_[j * dim + d];
      }
    }
    with_float_type(p_.attention.dtype, [&](auto zero) {
      using T = decltype(zero);
      std::transform(out.begin(), out.end(), query<T>(p_.attention.out, i), [](double x) { return round_to<T>(x); });
      if (!p_.attention.lse) return;
      p_.attention.lse.at<Statistic<T>>(b_, h_, s_.query_start + i) = static_cast<Statistic<T>>(lse);
    });
  }

  const CachedProblem& p_;
  std::int64_t b_, h_, g_;
  Sequence s_;
  std::vector<double> k_, v_, q_;
  std::int32_t key_begin_;
  Problem dense_;
};

// Rows of packed queries behind the last sequence are empty ones.
void write_unowned(const Problem& problem) {
  const KeyRange queries = unowned_queries(problem);
  for (std::int64_t h = 0; h < problem.num_heads; ++h) {
    for (std::int64_t i = queries.begin; i < queries.end; ++i) {
      with_float_type(problem.dtype, [&](auto zero) {
        using T = decltype(zero);
        std::fill_n(problem.out.row<T>(0, h, i), problem.head_dim_v, T{});
        if (problem.lse) problem.lse.at<Statistic<T>>(0, h, i) = static_cast<Statistic<T>>(-kInfinity);
      });
    }
  }
}

}  // namespace

void cached(const CachedProblem& problem, const ExecutionContext& context) {
  const Problem& p = problem.attention;
  executor_of(context).run(p.batch * p.num_heads, [&](std::int64_t index) {
    CachedHead(problem, index / p.num_heads, index % p.num_heads).run();
  });
  write_unowned(p);
}

}  // namespace onepass::reference
