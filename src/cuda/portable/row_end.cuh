// cuda/portable/row_end.cuh: from a row's maximum and sum to its normalisation and log-sum-exp.
#pragma once

#include "core/problem.h"
#include "cuda/common/scalar.cuh"

namespace onepass::cuda {

struct RowEnd {
  float factor;  // of the accumulated output
  float lse;     // natural logarithm
};

// `base`: the maximum in log2 units; `denominator` and `exact` over 2^(logit − base), of the weights as the product
// with the values rounds them and of the exact ones (0 when no log-sum-exp is wanted); `all_masked`: every logit was
// −inf. A sink joins the denominator of rows that see a key.
ONEPASS_DEVICE RowEnd finish_row(const Problem& problem, int head, float base, float denominator, float exact,
                                 bool all_masked, float survivor_scale) {
  if (all_masked && denominator == 0.0f) return {0.0f, -kInfinity};  // a row of NaNs has no maximum, but a NaN sum
  float rescale = 1.0f, largest = base, sink_weight = 0.0f;
  if (problem.sinks != nullptr) {
    const float sink = load_as_float(problem.sinks, problem.sinks_dtype, head) * kLog2e;
    largest = fmaxf(base, sink);
    rescale = exp2_approx(base - largest);
    sink_weight = exp2_approx(sink - largest);
  }
  return {rescale * survivor_scale / (denominator * rescale + sink_weight),
          largest * kLn2 + logf(exact * rescale + sink_weight)};
}

ONEPASS_DEVICE void store_lse(const Problem& problem, int batch, int head, std::int64_t token, float lse) {
  const RowVector& rows = problem.lse;
  if (rows.data == nullptr) return;
  static_cast<float*>(rows.data)[batch * rows.batch_stride + head * rows.head_stride + token * rows.token_stride] = lse;
}

}  // namespace onepass::cuda
