// cpu/backward.h: gradients of attention on the CPU.
#pragma once

#include "core/backend.h"

namespace onepass::cpu {

Unsupported supports_backward(const BackwardProblem& problem);
void backward(const BackwardProblem& problem, const ExecutionContext& context);

}  // namespace onepass::cpu
