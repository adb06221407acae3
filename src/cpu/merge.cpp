// cpu/merge.cpp: out = (e^lse_a·out_a + e^lse_b·out_b) / (e^lse_a + e^lse_b), bound by memory: plain loops that the
// compiler vectorises.
#include "cpu/merge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/half.h"
#include "core/parallel.h"

namespace onepass::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kElementsPerTask = 16384;  // below about 10 µs of work threads cost more than they give

struct Weights {
  float a, b, lse;
};

// An empty part (−inf) weighs exactly 0; two empty parts make an empty one.
Weights weights_of(float lse_a, float lse_b) {
  if (lse_a == -kInfinity && lse_b == -kInfinity) return {0.0f, 0.0f, -kInfinity};
  const float largest = std::max(lse_a, lse_b);  // a NaN reaches both weights through the differences
  const float a = std::exp(lse_a - largest), b = std::exp(lse_b - largest), sum = a + b;
  return {a / sum, b / sum, largest + std::log(sum)};
}

template <class T>
void merge_row(const MergeProblem& problem, std::int64_t batch, std::int64_t head, std::int64_t token) {
  const Weights w =
      weights_of(problem.lse_a.at<float>(batch, head, token), problem.lse_b.at<float>(batch, head, token));
  const T* a = problem.out_a.row<T>(batch, head, token);
  const T* b = problem.out_b.row<T>(batch, head, token);
  T* out = problem.out.row<T>(batch, head, token);
  for (std::int64_t d = 0; d < problem.head_dim; ++d) {
    const float from_a = w.a == 0.0f ? 0.0f : w.a * to_float(a[d]);  // an empty part's row may hold anything
    const float from_b = w.b == 0.0f ? 0.0f : w.b * to_float(b[d]);
    out[d] = from_float<T>(from_a + from_b);
  }
  problem.lse.at<float>(batch, head, token) = w.lse;
}

}  // namespace

void merge(const MergeProblem& problem, const ExecutionContext& context) {
  const std::int64_t rows = problem.batch * problem.num_heads * problem.seqlen;
  const std::int64_t rows_per_task =
      std::max<std::int64_t>(1, kElementsPerTask / std::max<std::int64_t>(1, problem.head_dim));
  with_float_type(problem.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) {
      executor_of(context).run((rows + rows_per_task - 1) / rows_per_task, [&](std::int64_t task) {
        const std::int64_t end = std::min(rows, (task + 1) * rows_per_task);
        for (std::int64_t row = task * rows_per_task; row < end; ++row) {
          const std::int64_t token = row % problem.seqlen, plane = row / problem.seqlen;
          merge_row<T>(problem, plane / problem.num_heads, plane % problem.num_heads, token);
        }
      });
    }
  });
}

}  // namespace onepass::cpu
