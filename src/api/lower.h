// api/lower.h: the arguments of attention and its kin → Problem. Each function throws Error naming the argument.
#pragma once

#include "api/validate.h"
#include "core/problem.h"
#include "onepass/attention.h"

namespace onepass::api {

// One call's tensors and what it calls itself in messages. Dense and ragged differ only in `varlen`.
struct Call {
  const char* operation;
  Named q, k, v;
  const AttentionOptions& options;
  const VarlenShape* varlen;  // null: dense

  int rank() const { return varlen ? 3 : 4; }
};

// Statistics are float32, beside float64 tensors float64.
inline DType row_dtype(const Problem& problem) {
  return problem.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Everything that does not depend on the outputs.
Problem lower(const Call& call);

// Its parts. Mask and score terms of the options, for a problem whose sizes are known.
void lower_options(const Call& call, Problem& problem);
// Shape, dtype and device of an int32 vector beside the operands.
void check_int32_vector(const Call& call, Named vector, std::int64_t size);
// The longest sequence: exact on the CPU, where max_seqlen is not needed; on CUDA the caller's bound.
std::int64_t longest_sequence(const Call& call, Named cu_seqlens, const char* max_name, std::int64_t max_seqlen,
                              std::int64_t total);

enum class Tokens { kQuery, kKey };

// A tensor of q's kind: (batch, heads, tokens, dim), or ragged (tokens, heads, dim).
Operand lower_operand(const Call& call, const Problem& problem, Named tensor, std::int64_t heads, Tokens tokens,
                      std::int64_t dim);

// A float32 (or float64) scalar for each (batch, head, token), or ragged (head, token).
RowVector lower_rows(const Call& call, const Problem& problem, Named tensor, Tokens tokens);

// out and, where given, lse and total_attention.
void lower_outputs(const Call& call, Problem& problem, const AttentionOutputs& outputs);

// What the backward pass reads and writes beside q, k and v; fills problem.forward's out and lse.
void lower_gradients(const Call& call, BackwardProblem& problem, const TensorView& dout, const TensorView& out,
                     const TensorView& lse, const AttentionGradients& gradients);

// No output overlaps an input. `more` are inputs beside those of `call`.
void check_outputs(const Call& call, std::initializer_list<Named> outputs, std::initializer_list<Named> more);

}  // namespace onepass::api
