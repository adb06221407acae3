// reference/merge.cpp: lse = log(e^lse_a + e^lse_b), out = e^(lse_a − lse)·out_a + e^(lse_b − lse)·out_b.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "reference/head.h"
#include "reference/reference.h"

namespace onepass::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// log(e^a + e^b); −inf is the neutral element, NaN stays.
double log_add(double a, double b) {
  if (a == -kInfinity) return b;
  if (b == -kInfinity) return a;
  const double largest = std::max(a, b);
  return largest + std::log(std::exp(a - largest) + std::exp(b - largest));
}

template <class T>
void merge_row(const MergeProblem& problem, std::int64_t batch, std::int64_t head, std::int64_t i) {
  const T* a = problem.out_a.row<T>(batch, head, i);
  const T* b = problem.out_b.row<T>(batch, head, i);
  T* out = problem.out.row<T>(batch, head, i);
  const double lse_a = problem.lse_a.at<Statistic<T>>(batch, head, i);
  const double lse_b = problem.lse_b.at<Statistic<T>>(batch, head, i);
  const double lse = log_add(lse_a, lse_b);
  for (std::int64_t d = 0; d < problem.head_dim; ++d) {
    double sum = 0.0;  // an empty part weighs nothing, whatever stands in its rows
    if (lse_a != -kInfinity) sum += std::exp(lse_a - lse) * to_double(a[d]);
    if (lse_b != -kInfinity) sum += std::exp(lse_b - lse) * to_double(b[d]);
    out[d] = round_to<T>(sum);
  }
  problem.lse.at<Statistic<T>>(batch, head, i) = static_cast<Statistic<T>>(lse);
}

}  // namespace

void merge(const MergeProblem& problem, const ExecutionContext& context) {
  with_float_type(problem.dtype, [&](auto zero) {
    executor_of(context).run(problem.batch * problem.num_heads, [&](std::int64_t index) {
      for (std::int64_t i = 0; i < problem.seqlen; ++i) {
        merge_row<decltype(zero)>(problem, index / problem.num_heads, index % problem.num_heads, i);
      }
    });
  });
}

}  // namespace onepass::reference
