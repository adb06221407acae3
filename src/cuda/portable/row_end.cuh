// cuda/portable/row_end.cuh: from a row's maximum and sum to its normalisation and log-sum-exp.
#pragma once

#include "core/problem.h"
#include "cuda/common/scalar.cuh"

namespace onepass::cuda {

struct RowEnd {
  float factor;  // of the accumulated output
  float lse;     // natural logarithm
};

// `score`: the row's largest, which `scale_log2` takes to log2 units and `unit` to natural ones; `denominator` and
// `exact` are sums of 2^(logit − largest) (`fused`: by one FMA below kFusedLimit), of the weights as the product with
// the values rounds them and of the exact ones (0 when no log-sum-exp is wanted); `all_masked`: every logit was −inf. A
// sink joins the denominator of rows that see a key.
ONEPASS_DEVICE RowEnd finish_row(const void* sinks, DType sinks_dtype, int head, float score, float scale_log2,
                                 float unit, bool fused, float denominator, float exact, bool all_masked,
                                 float survivor_scale) {
  if (all_masked && denominator == 0.0f) return {0.0f, -kInfinity};  // a row of NaNs has no maximum, but a NaN sum
  const float base = score * scale_log2;
  float rescale = 1.0f, largest = base, logit = score * unit, sink_weight = 0.0f;
  if (sinks != nullptr) {
    const float sink = load_as_float(sinks, sinks_dtype, head);
    largest = fmaxf(base, sink * kLog2e);
    logit = fmaxf(logit, sink);
    rescale = exp2_approx(base - largest);
    sink_weight = exp2_approx(sink * kLog2e - largest);
  }
  // Fused, from the same rounded product as the weights, whose common factor then cancels.
  const float log_largest = fused && fabsf(largest) < kFusedLimit ? largest * kLn2 : logit;
  return {rescale * survivor_scale / (denominator * rescale + sink_weight),
          log_largest + logf(exact * rescale + sink_weight)};
}

ONEPASS_DEVICE RowEnd finish_row(const Problem& problem, int head, float score, float scale_log2, float unit,
                                 bool fused, float denominator, float exact, bool all_masked, float survivor_scale) {
  return finish_row(problem.sinks, problem.sinks_dtype, head, score, scale_log2, unit, fused, denominator, exact,
                    all_masked, survivor_scale);
}

ONEPASS_DEVICE void store_lse(const RowVector& rows, int batch, int head, std::int64_t token, float lse) {
  if (rows.data == nullptr) return;
  static_cast<float*>(rows.data)[batch * rows.batch_stride + head * rows.head_stride + token * rows.token_stride] = lse;
}
ONEPASS_DEVICE void store_lse(const Problem& problem, int batch, int head, std::int64_t token, float lse) {
  store_lse(problem.lse, batch, head, token, lse);
}

}  // namespace onepass::cuda
