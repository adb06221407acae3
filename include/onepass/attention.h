// onepass/attention.h: exact attention, out = softmax(scale·Q·Kᵀ + …)·V, forward and backward.
//
// Shapes: B batch, H query heads, G key/value heads (H % G == 0), Sq and Sk sequence lengths, D head_dim,
// Dv head_dim_v. Dense tensors are (B, heads, seqlen, dim); ragged ("varlen") tensors are (total, heads, dim) with
// cumulative lengths. Strides are free except that the last dimension is contiguous (stride 1, or size 1).
// dtypes: q, k, v and out share one of float64 (CPU reference only), float32, float16, bfloat16; accumulation is
// float32 (float64 for float64).
//
// Method: tiled online softmax (Milakov & Gimelshein 2018; Rabe & Staats 2021; Dao et al. 2022, FlashAttention).
#pragma once

#include <cstdint>
#include <optional>

#include "onepass/error.h"
#include "onepass/execution.h"
#include "onepass/export.h"
#include "onepass/tensor.h"

namespace onepass {

// Sliding window around i' = i + Sk − Sq: key j is visible iff i' − left ≤ j ≤ i' + right. nullopt: unbounded.
// The token itself is not counted (a model that attends to W tokens including itself has left = W − 1).
struct Window {
  std::optional<std::int64_t> left = {};
  std::optional<std::int64_t> right = {};
};

// Attention with linear biases (Press et al. 2021): + slope·(j − i') on visible past keys.
struct Alibi {
  TensorView slopes = {};        // float32, (H) or (B, H)
  bool zero_for_future = false;  // without a causal mask: false: −slope·|i' − j|; true: future keys get 0
};

// Counter-based dropout of attention weights (Philox 4x32-10, Salmon et al. 2011): the mask depends only on
// (seed, offset) and (batch, query head, query, key), so forward and backward and every backend draw the same one.
struct Dropout {
  double p = 0.0;  // probability of dropping, in [0, 1); survivors are scaled by 1/(1 − p)
  std::uint64_t seed = 0;
  std::uint64_t offset = 0;
};

enum class CausalAlignment : std::uint8_t {
  kBottomRight = 0,  // query i sees j ≤ i + (Sk − Sq): the last query sees every key
  kTopLeft = 1,      // query i sees j ≤ i: PyTorch's is_causal; also moves the origin of window and ALiBi
};

struct AttentionOptions {
  bool causal = false;
  CausalAlignment alignment = CausalAlignment::kBottomRight;
  std::optional<double> softmax_scale = {};  // default 1/√D
  Window window = {};
  double softcap = 0.0;  // > 0: cap·tanh(s/cap) after scaling
  Alibi alibi = {};
  TensorView bias = {};       // dtype of q or float32; (B|1, H|1, Sq|1, Sk|1) by broadcasting (stride 0 or size 1)
  TensorView sinks = {};      // (H), dtype of q or float32: one extra logit per head, in the denominator only
  TensorView key_begin = {};  // int32 (B): first visible key of each sequence (left padding); default 0
  TensorView key_end = {};    // int32 (B): one past its last visible key (right padding); default Sk
  Dropout dropout = {};
  bool deterministic = false;  // backward: the same bits every run (forward always is)
};

struct AttentionOutputs {
  TensorView out = {};              // (B, H, Sq, Dv), dtype of q
  TensorView lse = {};              // float32 (float64 for float64 inputs), (B, H, Sq): natural log of the denominator
  TensorView total_attention = {};  // float32, (B, H, Sk): sum over queries of the weights before dropout
};

// Writes outputs.out and whichever of the others is given. Rows without a visible key: out 0, lse −inf.
// Throws Error before writing anything.
ONEPASS_API void attention(const TensorView& q,  // (B, H, Sq, D)
                           const TensorView& k,  // (B, G, Sk, D)
                           const TensorView& v,  // (B, G, Sk, Dv)
                           const AttentionOutputs& outputs, const AttentionOptions& options = {},
                           const ExecutionContext& context = {});

struct AttentionGradients {
  TensorView dq = {};      // shape and dtype of q
  TensorView dk = {};      // of k: summed over the query heads of a group
  TensorView dv = {};      // of v
  TensorView dbias = {};   // float32, shape of bias: summed over its broadcast dimensions; only when wanted
  TensorView dsinks = {};  // float32, (H); only when wanted
};

// Gradients from the forward's out and lse (natural log, as returned) and dout (shape of out).
// options must equal the forward's, dropout seed and offset included.
ONEPASS_API void attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k,
                                    const TensorView& v, const TensorView& out, const TensorView& lse,
                                    const AttentionGradients& gradients, const AttentionOptions& options = {},
                                    const ExecutionContext& context = {});

// Ragged batch. cu_seqlens: int32 (B + 1), non-decreasing, first 0, last ≤ total. On CUDA they stay on the device and
// are checked in the kernel; max_seqlen bounds the longest sequence (a shorter one than the data is clamped to, never
// overrun).
struct VarlenShape {
  TensorView cu_seqlens_q = {};
  TensorView cu_seqlens_k = {};
  std::int64_t max_seqlen_q = 0;  // 0: total_q
  std::int64_t max_seqlen_k = 0;  // 0: total_k
};

// q (total_q, H, D), k (total_k, G, D), v (total_k, G, Dv), out (total_q, H, Dv), lse (H, total_q),
// total_attention (H, total_k). bias is not taken. key_begin/key_end count from the sequence's first key.
ONEPASS_API void varlen_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                                  const VarlenShape& shape, const AttentionOutputs& outputs,
                                  const AttentionOptions& options = {}, const ExecutionContext& context = {});

ONEPASS_API void varlen_attention_backward(const TensorView& dout, const TensorView& q, const TensorView& k,
                                           const TensorView& v, const VarlenShape& shape, const TensorView& out,
                                           const TensorView& lse, const AttentionGradients& gradients,
                                           const AttentionOptions& options = {}, const ExecutionContext& context = {});

// Writes total: for each key the sum over queries of the weights e^(logit − lse), from an LSE that attention() or a
// merge of parts has returned; float32 (B, H, Sk). options as for attention(); dropout has no part in it.
ONEPASS_API void total_attention(const TensorView& q, const TensorView& k, const TensorView& lse,
                                 const TensorView& total, const AttentionOptions& options = {},
                                 const ExecutionContext& context = {});

// Exact merge of two partial results over disjoint keys: lse = log(e^lse_a + e^lse_b), out weighted accordingly;
// (−inf, −inf) gives (0, −inf). out_*: (B, H, S, Dv) of one dtype, lse_*: float32 (B, H, S). Outputs may be the inputs.
ONEPASS_API void merge_states(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b,
                              const TensorView& lse_b, const TensorView& out, const TensorView& lse,
                              const ExecutionContext& context = {});

// The slope of query head `head` of `num_heads`: 2^(−8(head+1)/H) when H is a power of two (or geometric is set), else
// the interleaved sequence of Press et al. for other head counts.
ONEPASS_API double alibi_slope(std::int64_t head, std::int64_t num_heads, bool geometric = false);

}  // namespace onepass
