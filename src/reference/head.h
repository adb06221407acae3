// reference/head.h: mask, score and dropout of one (batch, query head), one (query, key) pair at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "core/philox.h"
#include "core/problem.h"
#include "core/sequence.h"
#include "reference/scalar.h"

namespace onepass::reference {

// What statistics (LSE, total attention) and gradients of bias and sinks are stored as.
template <class T>
using Statistic = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Score {
  double value;  // the logit
  double slope;  // d value / d (softmax_scale·q·k): 1 without softcap
};

template <class T>
class Head {
 public:
  // far: the second pair of piecewise attention, or null.
  Head(const Problem& problem, const FarPair* far, std::int64_t batch, std::int64_t head)
      : problem_(problem),
        far_(far),
        batch_(batch),
        head_(head),
        head_kv_(head / problem.group_size()),
        sequence_(sequence_of(problem, batch)),
        scale_(std::is_same_v<T, double> ? problem.softmax_scale_f64 : double{problem.softmax_scale}) {}

  const Sequence& sequence() const { return sequence_; }
  KeyRange visible(std::int64_t i) const { return visible_keys(problem_, sequence_, i); }

  // Rows of the operands: query i and key j count from the sequence's first.
  T* query_row(const Operand& operand, std::int64_t i) const {
    return operand.row<T>(batch_, head_, sequence_.query_start + i);
  }
  T* key_row(const Operand& operand, std::int64_t j) const {
    return operand.row<T>(batch_, head_kv_, sequence_.key_start + j);
  }
  Statistic<T>& query_statistic(const RowVector& vector, std::int64_t i) const {
    return vector.at<Statistic<T>>(batch_, head_, sequence_.query_start + i);
  }
  Statistic<T>& key_statistic(const RowVector& vector, std::int64_t j) const {
    return vector.at<Statistic<T>>(batch_, head_, sequence_.key_start + j);
  }

  // Whether the logit of (i, j) is that of the far pair.
  bool is_far(std::int64_t i, std::int64_t j) const {
    return far_ != nullptr && i + sequence_.diagonal - j >= far_->dist_threshold;
  }
  const T* scored_query(std::int64_t i, bool far) const { return query_row(far ? far_->q : problem_.q, i); }
  const T* scored_key(std::int64_t j, bool far) const { return key_row(far ? far_->k : problem_.k, j); }

  // softmax_scale·q·k → softcap → + ALiBi → + bias.
  Score score(std::int64_t i, std::int64_t j) const {
    const bool far = is_far(i, j);
    const T* q = scored_query(i, far);
    const T* k = scored_key(j, far);
    Score s{0.0, 1.0};
    for (std::int64_t d = 0; d < problem_.head_dim; ++d) s.value += to_double(q[d]) * to_double(k[d]);
    s.value *= scale_;
    if (problem_.softcap > 0) {
      const double t = std::tanh(s.value / problem_.softcap);
      s = {problem_.softcap * t, 1.0 - t * t};
    }
    if (problem_.alibi_slopes != nullptr) s.value += alibi(i, j);
    if (problem_.bias) s.value += bias(i, j);
    return s;
  }

  // 0 for a dropped weight, 1/(1 − p) for a survivor.
  double dropout_factor(std::int64_t i, std::int64_t j) const {
    if (problem_.dropout_p == 0.0) return 1.0;
    const auto plane = static_cast<std::uint32_t>(batch_ * problem_.num_heads + head_);
    const Philox4 bits = dropout_bits(problem_.dropout_seed, problem_.dropout_offset, plane,
                                      static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(j / 4));
    const bool kept = bits.word[j % 4] >= dropout_threshold(problem_.dropout_p);
    return kept ? 1.0 / (1.0 - problem_.dropout_p) : 0.0;
  }

  bool has_sink() const { return problem_.sinks != nullptr; }
  double sink() const { return load(problem_.sinks, problem_.sinks_dtype, head_); }

 private:
  double alibi(std::int64_t i, std::int64_t j) const {
    const double slope = problem_.alibi_slopes[batch_ * problem_.alibi_batch_stride + head_];
    const std::int64_t ahead = j - (i + sequence_.diagonal);
    if (ahead > 0 && problem_.alibi_zero_for_future) return 0.0;
    return -slope * static_cast<double>(std::abs(ahead));
  }

  double bias(std::int64_t i, std::int64_t j) const {
    const BiasOperand& b = problem_.bias;
    return load(b.data, b.dtype,
                batch_ * b.batch_stride + head_ * b.head_stride + i * b.query_stride + j * b.key_stride);
  }

  const Problem& problem_;
  const FarPair* far_;
  std::int64_t batch_, head_, head_kv_;
  Sequence sequence_;
  double scale_;
};

}  // namespace onepass::reference
