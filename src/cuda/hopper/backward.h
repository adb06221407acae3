// cuda/hopper/backward.h: the backward pass on sm_90a.
#pragma once

#include "core/backend.h"

namespace onepass::cuda::hopper {

Unsupported supports_backward(const BackwardProblem& problem);
void backward(const BackwardProblem& problem, const ExecutionContext& context);

Unsupported supports_piecewise_backward(const PiecewiseBackwardProblem& problem);
void piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context);

}  // namespace onepass::cuda::hopper
