// onepass/piecewise.h: attention whose logits come from one of two query/key pairs, by distance (the method of
// FlagAttention, used for length extrapolation with two rotary bases):
//   s(i, j) = scale·q2·k2 where i' − j ≥ dist_threshold, scale·q1·k1 elsewhere, i' = i + seqlen_k − seqlen_q.
// A threshold of 0 or less uses (q2, k2) for every past key, one beyond seqlen_k never.
#pragma once

#include "onepass/attention.h"

namespace onepass {

// q1, q2: (B, H, Sq, D). k1, k2: (B, G, Sk, D). v: (B, G, Sk, Dv). Everything else as in attention().
ONEPASS_API void piecewise_attention(const TensorView& q1, const TensorView& k1, const TensorView& q2,
                                     const TensorView& k2, const TensorView& v, std::int64_t dist_threshold,
                                     const AttentionOutputs& outputs, const AttentionOptions& options = {},
                                     const ExecutionContext& context = {});

// Five gradients: gradients.dq and .dk are those of q1 and k1.
struct PiecewiseGradients {
  AttentionGradients near = {};
  TensorView dq2 = {};
  TensorView dk2 = {};
};

ONEPASS_API void piecewise_attention_backward(const TensorView& dout, const TensorView& q1, const TensorView& k1,
                                              const TensorView& q2, const TensorView& k2, const TensorView& v,
                                              std::int64_t dist_threshold, const TensorView& out, const TensorView& lse,
                                              const PiecewiseGradients& gradients, const AttentionOptions& options = {},
                                              const ExecutionContext& context = {});

}  // namespace onepass
