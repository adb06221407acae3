// cuda/hopper/forward.h: the forward pass on sm_90a.
#pragma once

#include "core/backend.h"

namespace onepass::cuda::hopper {

Unsupported supports_forward(const Problem& problem);
void forward(const Problem& problem, const ExecutionContext& context);

Unsupported supports_piecewise(const PiecewiseProblem& problem);
void piecewise(const PiecewiseProblem& problem, const ExecutionContext& context);

}  // namespace onepass::cuda::hopper
