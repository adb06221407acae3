// cpu/few_rows.h: few query rows over many keys are bound by memory, and panels of rows would leave most lanes idle.
// The decode kernel of cached attention takes them, with K and V as its cache.
#pragma once

#include "core/problem.h"
#include "onepass/execution.h"

namespace onepass::cpu {

// Whether the decode kernel takes this call: few rows a key/value head, many keys.
bool has_few_rows(const Problem& problem);

// The forward pass of such a problem; writes out and lse.
void forward_few_rows(const Problem& problem, const ExecutionContext& context);

}  // namespace onepass::cpu
