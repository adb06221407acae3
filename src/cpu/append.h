// cpu/append.h: new tokens into a key/value cache.
#pragma once

#include "core/backend.h"
#include "core/cache_problem.h"

namespace onepass::cpu {

Unsupported supports_append(const AppendProblem& problem);
void append(const AppendProblem& problem, const ExecutionContext& context);

}  // namespace onepass::cpu
