// cpu/forward.h: the forward pass of the SIMD backend.
#pragma once

#include "core/backend.h"

namespace onepass::cpu {

Unsupported supports_forward(const Problem& problem);
void forward(const Problem& problem, const ExecutionContext& context);

Unsupported supports_piecewise(const PiecewiseProblem& problem);
void piecewise(const PiecewiseProblem& problem, const ExecutionContext& context);

}  // namespace onepass::cpu
