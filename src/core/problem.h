// core/problem.h: the one struct that every public operation is lowered to and every backend reads.
//
// Dense is the trivial case of ragged (cu_seqlens null, the batch stride does the work); a contiguous cache is the
// trivial case of a paged one. Everything here is already validated: backends only ask whether they support it.
#pragma once

#include <cstdint>
#include <limits>

#include "onepass/attention.h"
#include "onepass/tensor.h"

namespace onepass {

// A window side without a limit. Any other value is one, also below 0: see core/piecewise.h.
inline constexpr std::int64_t kUnbounded = std::numeric_limits<std::int64_t>::min();

// One (batch, head, token, dim) operand; the dim stride is 1. Ragged: batch stride 0, tokens count from the total.
struct Operand {
  void* data = nullptr;
  std::int64_t batch_stride = 0;  // strides in elements
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 0;

  template <class T>
  constexpr T* row(std::int64_t batch, std::int64_t head, std::int64_t token) const {
    return static_cast<T*>(data) + batch * batch_stride + head * head_stride + token * token_stride;
  }
};

// (batch, head, token) scalars: LSE, delta, total attention.
struct RowVector {
  void* data = nullptr;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t token_stride = 1;

  constexpr explicit operator bool() const { return data != nullptr; }
  template <class T>
  constexpr T& at(std::int64_t batch, std::int64_t head, std::int64_t token) const {
    return static_cast<T*>(data)[batch * batch_stride + head * head_stride + token * token_stride];
  }
};

// Additive bias (and its gradient): a broadcast dimension has stride 0.
struct BiasOperand {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t batch_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t query_stride = 0;
  std::int64_t key_stride = 0;

  constexpr explicit operator bool() const { return data != nullptr; }
};

struct Problem {
  const char* operation = "attention";  // for messages
  Device device = {};
  DType dtype = DType::kFloat32;  // of q, k, v and out

  // Sizes. Ragged: seqlen_q and seqlen_k are upper bounds of the longest sequence.
  std::int64_t batch = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_heads_kv = 0;
  std::int64_t seqlen_q = 0;
  std::int64_t seqlen_k = 0;
  std::int64_t head_dim = 0;
  std::int64_t head_dim_v = 0;
  std::int64_t total_q = 0;  // batch·seqlen_q when dense
  std::int64_t total_k = 0;

  Operand q, k, v, out;
  RowVector lse;              // float32 (float64 when dtype is); null when not wanted
  RowVector total_attention;  // float32 (float64 when dtype is) (batch, head, key); null when not wanted

  // Ragged bounds, int32 (batch + 1) on `device`; null: dense.
  const std::int32_t* cu_seqlens_q = nullptr;
  const std::int32_t* cu_seqlens_k = nullptr;
  // Visible keys of each sequence, int32 (batch) on `device`; null: 0 and seqlen_k. They only hide keys: the causal
  // diagonal, the window and ALiBi still count from the full seqlen_k.
  const std::int32_t* key_begin = nullptr;
  const std::int32_t* key_end = nullptr;

  // Mask: key j is visible to query i iff i' − window_left ≤ j ≤ i' + window_right, with i' = i + diagonal and
  // diagonal = 0 (top_left) or seqlen_k − seqlen_q of the sequence. Causal has been lowered to window_right ≤ 0.
  bool top_left = false;
  std::int64_t window_left = kUnbounded;
  std::int64_t window_right = kUnbounded;

  // Score: s = softmax_scale·q·k → softcap·tanh(s/softcap) → + ALiBi → + bias.
  float softmax_scale = 1.0f;
  double softmax_scale_f64 = 1.0;  // the same, unrounded, for float64 problems
  double softcap = 0.0;            // 0: none
  const float* alibi_slopes = nullptr;
  std::int64_t alibi_batch_stride = 0;
  bool alibi_zero_for_future = false;
  BiasOperand bias;
  const void* sinks = nullptr;  // (num_heads)
  DType sinks_dtype = DType::kFloat32;

  double dropout_p = 0.0;  // 0: none
  std::uint64_t dropout_seed = 0;
  std::uint64_t dropout_offset = 0;

  bool deterministic = false;

  constexpr bool ragged() const { return cu_seqlens_q != nullptr; }
  constexpr std::int64_t group_size() const { return num_heads_kv == 0 ? 1 : num_heads / num_heads_kv; }
};

// The backward pass of `forward`, whose out and lse hold what the forward pass wrote.
struct BackwardProblem {
  Problem forward;
  Operand dout, dq, dk, dv;
  BiasOperand dbias;       // float32 (float64 when dtype is); null when not wanted; backends overwrite it
  void* dsinks = nullptr;  // float32 (float64 when dtype is) (num_heads); null when not wanted
};

// The second query/key pair of piecewise attention: its logits count where i' − j ≥ dist_threshold.
struct FarPair {
  Operand q, k;  // sizes as of the first pair
  std::int64_t dist_threshold = 0;
};

struct PiecewiseProblem {
  Problem near;
  FarPair far;
};

struct PiecewiseBackwardProblem {
  BackwardProblem near;
  FarPair far;
  Operand dq_far, dk_far;
};

// out, lse = the exact merge of two partial results. Outputs may be the inputs, element for element.
struct MergeProblem {
  Device device = {};
  DType dtype = DType::kFloat32;  // of out_a, out_b and out; the LSEs are float32 (float64 when dtype is)
  std::int64_t batch = 0, num_heads = 0, seqlen = 0, head_dim = 0;
  Operand out_a, out_b, out;
  RowVector lse_a, lse_b, lse;
};

// The part of one sequence that a row of queries sees. Shared by every backend so that no two disagree.
struct Sequence {
  std::int64_t query_start = 0, key_start = 0;  // token offsets of the sequence's first query and key
  std::int64_t seqlen_q = 0, seqlen_k = 0;
  std::int64_t key_begin = 0, key_end = 0;  // visible keys, within [0, seqlen_k]
  std::int64_t diagonal = 0;                // i' = i + diagonal
};

}  // namespace onepass
