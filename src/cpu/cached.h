// cpu/cached.h: attention over key/value caches.
#pragma once

#include "core/backend.h"
#include "core/cache_problem.h"

namespace onepass::cpu {

Unsupported supports_cached(const CachedProblem& problem);
void cached(const CachedProblem& problem, const ExecutionContext& context);

}  // namespace onepass::cpu
