#include "support/naive.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/philox.h"
#include "reference/scalar.h"

namespace onepass::test {
namespace {

template <class T>
class Naive {
  using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using Matrix = std::vector<Accumulator>;  // (seqlen_q, seqlen_k) of one head

  static constexpr Accumulator kInfinity = std::numeric_limits<Accumulator>::infinity();

  // Through the dtype and back.
  static Accumulator round(Accumulator x) { return to_float(reference::round_to<T>(x)); }

  static void add(double& sum, Accumulator x) { sum = static_cast<Accumulator>(sum) + x; }

 public:
  explicit Naive(const Instance& instance) : in(instance), c(instance.c) {
    results.out.assign(in.dout.size(), 0.0);
    results.lse.assign(in.dout.size() / c.head_dim_v, -std::numeric_limits<double>::infinity());
    results.total.assign(in.v.size() / c.head_dim_v / std::max<std::int64_t>(c.num_heads_kv, 1) * c.num_heads, 0.0);
    results.dq.assign(in.q.size(), 0.0);
    results.dk.assign(in.k.size(), 0.0);
    results.dv.assign(in.v.size(), 0.0);
    results.dq2.assign(in.q2.size(), 0.0);
    results.dk2.assign(in.k2.size(), 0.0);
    results.dbias.assign(in.bias.size(), 0.0);
    results.dsinks.assign(in.sinks.size(), 0.0);
  }

  Results run() {
    for (std::int64_t b = 0; b < c.batch; ++b) {
      for (std::int64_t h = 0; h < c.num_heads; ++h) head(b, h);
    }
    for (Values* values : {&results.dk, &results.dv, &results.dk2}) {  // sums over the heads of a group
      for (double& x : *values) x = to_float(reference::round_to<T>(x));
    }
    return std::move(results);
  }

 private:
  void head(std::int64_t b, std::int64_t h) {
    rows = in.length_q(b);
    columns = in.length_k(b);
    batch = b;
    query_head = h;
    key_head = h / (c.num_heads / c.num_heads_kv);
    scores();
    softmax();
    multiply_values();
    gradients();
  }

  const double* query(const Values& values, std::int64_t i, std::int64_t dim) const {
    return values.data() + in.query_row(batch, query_head, i) * dim;
  }
  std::int64_t key(std::int64_t j) const { return in.key_row(batch, key_head, j); }

  void scores() {
    s.assign(rows * columns, -kInfinity);
    capped.assign(rows * columns, 0);
    const auto scale = static_cast<Accumulator>(in.scale()), cap = static_cast<Accumulator>(c.softcap);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        if (!in.visible(batch, i, j)) continue;
        Accumulator x = 0;
        const bool far = in.is_far(batch, i, j);
        const double* q = query(far ? in.q2 : in.q, i, c.head_dim);
        const double* k = (far ? in.k2 : in.k).data() + key(j) * c.head_dim;
        for (std::int64_t d = 0; d < c.head_dim; ++d) x += Accumulator(q[d]) * Accumulator(k[d]);
        x = round(round(x) * scale);
        if (cap > 0) {
          capped[i * columns + j] = round(std::tanh(round(x / cap)));
          x = round(cap * capped[i * columns + j]);
        }
        if (c.alibi != AlibiKind::kNone) x = round(x + Accumulator(in.alibi(batch, query_head, i, j)));
        if (!c.bias.empty()) x = round(x + Accumulator(in.bias[in.bias_at(batch, query_head, i, j)]));
        s[i * columns + j] = x;
      }
    }
  }

  void softmax() {
    p.assign(rows * columns, 0);
    sink_weight.assign(rows, 0);
    for (std::int64_t i = 0; i < rows; ++i) {
      const Accumulator* row = s.data() + i * columns;
      const Accumulator largest_key = columns > 0 ? *std::max_element(row, row + columns) : -kInfinity;
      if (largest_key == -kInfinity) continue;
      const Accumulator sink = c.sinks ? Accumulator(in.sinks[query_head]) : -kInfinity;
      const Accumulator largest = std::max(largest_key, sink);
      Accumulator sum = c.sinks ? std::exp(sink - largest) : 0;
      for (std::int64_t j = 0; j < columns; ++j) sum += std::exp(row[j] - largest);
      for (std::int64_t j = 0; j < columns; ++j) p[i * columns + j] = round(std::exp(row[j] - largest) / sum);
      if (c.sinks) sink_weight[i] = round(std::exp(sink - largest) / sum);
      results.lse[in.lse_at(batch, query_head, i)] = largest + std::log(sum);
      for (std::int64_t j = 0; j < columns; ++j) {
        add(results.total[in.total_at(batch, query_head, j)], p[i * columns + j]);
      }
    }
  }

  Accumulator dropout(std::int64_t i, std::int64_t j) const {
    if (c.dropout == 0) return 1;
    const Philox4 bits = dropout_bits(kDropoutSeed, kDropoutOffset, batch * c.num_heads + query_head, i, j / 4);
    return bits.word[j % 4] < dropout_threshold(c.dropout) ? 0 : 1 / Accumulator(1 - c.dropout);
  }

  void multiply_values() {
    Matrix sums(c.head_dim_v);
    for (std::int64_t i = 0; i < rows; ++i) {
      std::fill(sums.begin(), sums.end(), Accumulator(0));
      for (std::int64_t j = 0; j < columns; ++j) {
        if (!in.visible(batch, i, j)) continue;
        const Accumulator weight = round(p[i * columns + j] * dropout(i, j));
        const double* v = in.v.data() + key(j) * c.head_dim_v;
        for (std::int64_t d = 0; d < c.head_dim_v; ++d) sums[d] += weight * Accumulator(v[d]);
      }
      double* out = results.out.data() + in.query_row(batch, query_head, i) * c.head_dim_v;
      for (std::int64_t d = 0; d < c.head_dim_v; ++d) out[d] = round(sums[d]);
    }
  }

  void gradients() {
    const auto scale = static_cast<Accumulator>(in.scale());
    Matrix dp(columns), dq(c.head_dim), dq2(c.head_dim);
    for (std::int64_t i = 0; i < rows; ++i) {
      const double* dout = query(in.dout, i, c.head_dim_v);
      Accumulator delta = 0;
      for (std::int64_t j = 0; j < columns; ++j) {
        if (!in.visible(batch, i, j)) continue;
        const Accumulator weight = round(p[i * columns + j] * dropout(i, j));
        Accumulator sum = 0;
        for (std::int64_t d = 0; d < c.head_dim_v; ++d) {
          sum += Accumulator(dout[d]) * Accumulator(in.v[key(j) * c.head_dim_v + d]);
          add(results.dv[key(j) * c.head_dim_v + d], weight * Accumulator(dout[d]));
        }
        dp[j] = round(round(sum) * dropout(i, j));
        delta += dp[j] * p[i * columns + j];
      }
      if (c.sinks) add(results.dsinks[query_head], -sink_weight[i] * delta);
      std::fill(dq.begin(), dq.end(), Accumulator(0));
      std::fill(dq2.begin(), dq2.end(), Accumulator(0));
      for (std::int64_t j = 0; j < columns; ++j) {
        if (!in.visible(batch, i, j)) continue;
        Accumulator ds = round(p[i * columns + j] * (dp[j] - delta));
        if (!c.bias.empty()) add(results.dbias[in.bias_at(batch, query_head, i, j)], ds);
        if (c.softcap > 0) ds = round(ds * (1 - capped[i * columns + j] * capped[i * columns + j]));
        ds = round(ds * scale);
        const bool far = in.is_far(batch, i, j);
        const double* q = query(far ? in.q2 : in.q, i, c.head_dim);
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
          (far ? dq2 : dq)[d] += ds * Accumulator((far ? in.k2 : in.k)[key(j) * c.head_dim + d]);
          add((far ? results.dk2 : results.dk)[key(j) * c.head_dim + d], ds * Accumulator(q[d]));
        }
      }
      for (std::int64_t d = 0; d < c.head_dim; ++d) {
        const std::int64_t at = in.query_row(batch, query_head, i) * c.head_dim + d;
        results.dq[at] = round(dq[d]);
        if (c.dist_threshold) results.dq2[at] = round(dq2[d]);
      }
    }
  }

  const Instance& in;
  const Case& c;
  std::int64_t rows = 0, columns = 0, batch = 0, query_head = 0, key_head = 0;
  Matrix s, capped, p, sink_weight;
  Results results;
};

}  // namespace

Results naive(const Instance& instance, DType dtype) {
  Results results;
  with_float_type(dtype, [&](auto zero) { results = Naive<decltype(zero)>(instance).run(); });
  return results;
}

}  // namespace onepass::test
