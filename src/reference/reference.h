// reference/reference.h: the oracle. Attention and its gradients as the formulas say, in float64, one query row at a
// time, memory O(seqlen). It serves float64 tensors and is what every test compares with; it is not meant to be fast.
//
// Invisible keys and values are never read. A visible key whose logit is −inf (through the bias) has weight 0, and a
// row whose every visible logit is −inf counts as one without visible keys: out 0, lse −inf, gradients 0.
#pragma once

#include "core/cache_problem.h"
#include "core/problem.h"
#include "onepass/execution.h"

namespace onepass::reference {

void forward(const Problem& problem, const ExecutionContext& context);
void backward(const BackwardProblem& problem, const ExecutionContext& context);
void piecewise(const PiecewiseProblem& problem, const ExecutionContext& context);
void piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context);
void total_attention(const Problem& problem, const ExecutionContext& context);
void merge(const MergeProblem& problem, const ExecutionContext& context);
void append(const AppendProblem& problem, const ExecutionContext& context);
void cached(const CachedProblem& problem, const ExecutionContext& context);

}  // namespace onepass::reference
