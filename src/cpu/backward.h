// cpu/backward.h: gradients of attention on the CPU.
#pragma once

#include "core/backend.h"

namespace onepass::cpu {

Unsupported supports_backward(const BackwardProblem& problem);
void backward(const BackwardProblem& problem, const ExecutionContext& context);

Unsupported supports_piecewise_backward(const PiecewiseBackwardProblem& problem);
void piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context);

}  // namespace onepass::cpu
