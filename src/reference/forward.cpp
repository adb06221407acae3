// reference/forward.cpp: out = softmax(scores)·V, its log-sum-exp and the column sums of the weights.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "reference/head.h"
#include "reference/reference.h"

namespace onepass::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Doubles that the rows of one head need beside the operands.
struct Scratch {
  double* weights;  // (seqlen_k): logits, then softmax weights of the current row
  double* columns;  // (seqlen_k): their sum over rows
  double* out;      // (head_dim_v)

  static std::int64_t size(const Problem& p) { return 2 * p.seqlen_k + p.head_dim_v; }
  Scratch(const Problem& p, double* block) : weights(block), columns(block + p.seqlen_k), out(block + 2 * p.seqlen_k) {}
};

// Turns logits into softmax weights in place and returns the log of the denominator; −inf when no weight is left.
template <class T>
double softmax_row(const Head<T>& head, double* weights, KeyRange keys) {
  double largest = -kInfinity;
  for (std::int64_t j = keys.begin; j < keys.end; ++j) {
    if (weights[j] > largest || std::isnan(weights[j])) largest = weights[j];  // NaN stays: nothing compares greater
  }
  if (largest == -kInfinity) return -kInfinity;
  if (head.has_sink() && head.sink() > largest) largest = head.sink();
  double denominator = head.has_sink() ? std::exp(head.sink() - largest) : 0.0;
  for (std::int64_t j = keys.begin; j < keys.end; ++j) denominator += weights[j] = std::exp(weights[j] - largest);
  for (std::int64_t j = keys.begin; j < keys.end; ++j) weights[j] /= denominator;
  return largest + std::log(denominator);
}

template <class T>
void forward_row(const Problem& problem, const Head<T>& head, std::int64_t i, const Scratch& scratch) {
  const KeyRange keys = head.visible(i);
  std::fill_n(scratch.out, problem.head_dim_v, 0.0);
  for (std::int64_t j = keys.begin; j < keys.end; ++j) scratch.weights[j] = head.score(i, j).value;
  const double lse = softmax_row(head, scratch.weights, keys);
  if (lse != -kInfinity) {
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      const T* v = head.key_row(problem.v, j);
      const double weight = scratch.weights[j] * head.dropout_factor(i, j);
      for (std::int64_t d = 0; d < problem.head_dim_v; ++d) scratch.out[d] += weight * to_double(v[d]);
      scratch.columns[j] += scratch.weights[j];
    }
  }
  T* out = head.query_row(problem.out, i);
  for (std::int64_t d = 0; d < problem.head_dim_v; ++d) out[d] = round_to<T>(scratch.out[d]);
  if (problem.lse) head.query_statistic(problem.lse, i) = static_cast<Statistic<T>>(lse);
}

template <class T>
void forward_head(const Problem& problem, const FarPair* far, std::int64_t batch, std::int64_t head_index,
                  const Scratch& scratch) {
  const Head<T> head(problem, far, batch, head_index);
  const std::int64_t seqlen_k = head.sequence().seqlen_k;
  std::fill_n(scratch.columns, seqlen_k, 0.0);
  for (std::int64_t i = 0; i < head.sequence().seqlen_q; ++i) forward_row(problem, head, i, scratch);
  if (!problem.total_attention) return;
  for (std::int64_t j = 0; j < seqlen_k; ++j) {
    head.key_statistic(problem.total_attention, j) = static_cast<Statistic<T>>(scratch.columns[j]);
  }
}

// Ragged tensors may be longer than their sequences: such rows are empty ones.
template <class T>
void write_unowned(const Problem& problem, std::int64_t head) {
  const KeyRange queries = unowned_queries(problem), keys = unowned_keys(problem);
  for (std::int64_t i = queries.begin; i < queries.end; ++i) {
    std::fill_n(problem.out.row<T>(0, head, i), problem.head_dim_v, T{});
    if (problem.lse) problem.lse.at<Statistic<T>>(0, head, i) = static_cast<Statistic<T>>(-kInfinity);
  }
  if (!problem.total_attention) return;
  for (std::int64_t j = keys.begin; j < keys.end; ++j) problem.total_attention.at<Statistic<T>>(0, head, j) = 0;
}

template <class T>
void forward_typed(const Problem& problem, const FarPair* far, const ExecutionContext& context) {
  const std::int64_t heads = problem.batch * problem.num_heads, scratch_size = Scratch::size(problem);
  const Workspace workspace(context, problem.device, heads * scratch_size * sizeof(double));
  executor_of(context).run(heads, [&](std::int64_t index) {
    const Scratch scratch(problem, workspace.as<double>() + index * scratch_size);
    forward_head<T>(problem, far, index / problem.num_heads, index % problem.num_heads, scratch);
  });
  for (std::int64_t head = 0; head < problem.num_heads; ++head) write_unowned<T>(problem, head);
}

template <class T>
void sum_columns(const Problem& problem, const ExecutionContext& context) {
  const std::int64_t heads = problem.batch * problem.num_heads;
  const Workspace workspace(context, problem.device, heads * problem.seqlen_k * sizeof(double));
  executor_of(context).run(heads, [&](std::int64_t index) {
    const Head<T> head(problem, nullptr, index / problem.num_heads, index % problem.num_heads);
    double* const columns = workspace.as<double>() + index * problem.seqlen_k;
    std::fill_n(columns, problem.seqlen_k, 0.0);
    for (std::int64_t i = 0; i < head.sequence().seqlen_q; ++i) {
      const double lse = head.query_statistic(problem.lse, i);
      const KeyRange keys = lse == -kInfinity ? KeyRange{0, 0} : head.visible(i);
      for (std::int64_t j = keys.begin; j < keys.end; ++j) columns[j] += std::exp(head.score(i, j).value - lse);
    }
    for (std::int64_t j = 0; j < head.sequence().seqlen_k; ++j) {
      head.key_statistic(problem.total_attention, j) = static_cast<Statistic<T>>(columns[j]);
    }
  });
}

}  // namespace

void forward(const Problem& problem, const ExecutionContext& context) {
  with_float_type(problem.dtype, [&](auto zero) { forward_typed<decltype(zero)>(problem, nullptr, context); });
}

void total_attention(const Problem& problem, const ExecutionContext& context) {
  with_float_type(problem.dtype, [&](auto zero) { sum_columns<decltype(zero)>(problem, context); });
}

void piecewise(const PiecewiseProblem& problem, const ExecutionContext& context) {
  with_float_type(problem.near.dtype,
                  [&](auto zero) { forward_typed<decltype(zero)>(problem.near, &problem.far, context); });
}

}  // namespace onepass::reference
