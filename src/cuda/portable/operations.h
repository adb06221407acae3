// cuda/portable/operations.h: the operations of the portable backend, one file each.
#pragma once

#include "core/backend.h"
#include "cuda/portable/backward.h"

namespace onepass::cuda {

Unsupported supports_forward(const Problem& problem);
void forward(const Problem& problem, const ExecutionContext& context);

// Another backend's kernels in place of those that compute dK, dV and dQ from the rows' statistics: see
// BackwardArguments.
using GradientKernels = void (*)(const BackwardArguments& arguments, const ExecutionContext& context);

Unsupported supports_backward(const BackwardProblem& problem);
void backward(const BackwardProblem& problem, const ExecutionContext& context);
void backward(const BackwardProblem& problem, const ExecutionContext& context, GradientKernels gradients);

Unsupported supports_total_attention(const Problem& problem);
void total_attention(const Problem& problem, const ExecutionContext& context);

Unsupported supports_piecewise(const PiecewiseProblem& problem);
void piecewise(const PiecewiseProblem& problem, const ExecutionContext& context);

Unsupported supports_piecewise_backward(const PiecewiseBackwardProblem& problem);
void piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context);
void piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context,
                        GradientKernels gradients);

Unsupported supports_merge(const MergeProblem& problem);
void merge(const MergeProblem& problem, const ExecutionContext& context);

Unsupported supports_append(const AppendProblem& problem);
void append(const AppendProblem& problem, const ExecutionContext& context);

Unsupported supports_cached(const CachedProblem& problem);
void cached(const CachedProblem& problem, const ExecutionContext& context);

}  // namespace onepass::cuda
