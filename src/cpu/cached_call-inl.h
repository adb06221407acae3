// cpu/cached_call-inl.h: one call of cached attention, and how a row of its result ends.
#if defined(ONEPASS_CPU_CACHED_CALL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_CACHED_CALL_INL_H_
#undef ONEPASS_CPU_CACHED_CALL_INL_H_
#else
#define ONEPASS_CPU_CACHED_CALL_INL_H_
#endif

#include "cpu/cached_plan.h"
#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

// One call: the problem, and queries that may have been rotated into float32.
struct CachedCall {
  const CachedProblem& problem;
  Problem queries;
  ScoreTerms terms;
  CachedPlanShape shape;
  CachedPlan plan;
  float* partials = nullptr;  // rows of partial_stride floats: maximum, sum, then the undivided output
  // Only when weights are dropped:
  float* maxima = nullptr;  // largest score of each partial row
  float* scores = nullptr;  // of all tasks

  const Problem& attention() const { return problem.attention; }
  std::int64_t partial_stride() const { return 2 + attention().head_dim_v; }
};

inline float sink_of(const Problem& problem, std::int64_t head) {
  float sink = 0.0f;
  with_float_type(problem.sinks_dtype,
                  [&]<class S>(S) { sink = static_cast<float>(to_float(static_cast<const S*>(problem.sinks)[head])); });
  return sink;
}

// What a row comes to: its LSE is written, the factor of its undivided output returned.
inline float finish(const CachedCall& call, const RowSet& rows, std::int64_t row, float maximum, float sum) {
  const Problem& problem = call.attention();
  const float sink = problem.sinks != nullptr ? sink_of(problem, rows.head_of(row)) : 0.0f;
  const RowResult result = finish_row(maximum, sum, call.terms.unit(), problem.sinks != nullptr ? &sink : nullptr);
  if (problem.lse) problem.lse.at<float>(rows.batch, rows.head_of(row), rows.token_of(row)) = result.lse;
  return result.factor * static_cast<float>(1.0 / (1.0 - problem.dropout_p));
}

inline void store_out(const CachedCall& call, const RowSet& rows, std::int64_t row, const float* values) {
  with_float_type(call.attention().dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) {
      T* const out = call.attention().out.row<T>(rows.batch, rows.head_of(row), rows.token_of(row));
      store_row(values, call.attention().head_dim_v, out);
    }
  });
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
