// cuda/portable/operations.h: the operations of the portable backend, one file each.
#pragma once

#include "core/backend.h"

namespace onepass::cuda {

Unsupported supports_forward(const Problem& problem);
void forward(const Problem& problem, const ExecutionContext& context);

Unsupported supports_backward(const BackwardProblem& problem);
void backward(const BackwardProblem& problem, const ExecutionContext& context);

Unsupported supports_total_attention(const Problem& problem);
void total_attention(const Problem& problem, const ExecutionContext& context);

Unsupported supports_piecewise(const PiecewiseProblem& problem);
void piecewise(const PiecewiseProblem& problem, const ExecutionContext& context);

Unsupported supports_piecewise_backward(const PiecewiseBackwardProblem& problem);
void piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context);

Unsupported supports_merge(const MergeProblem& problem);
void merge(const MergeProblem& problem, const ExecutionContext& context);

Unsupported supports_append(const AppendProblem& problem);
void append(const AppendProblem& problem, const ExecutionContext& context);

Unsupported supports_cached(const CachedProblem& problem);
void cached(const CachedProblem& problem, const ExecutionContext& context);

}  // namespace onepass::cuda
