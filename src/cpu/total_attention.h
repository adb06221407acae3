// cpu/total_attention.h: column sums of the softmax weights, from the LSE.
#pragma once

#include "core/problem.h"
#include "onepass/execution.h"

namespace onepass::cpu {

// Writes problem.total_attention; problem.lse holds what the forward pass wrote.
void total_attention(const Problem& problem, const ExecutionContext& context);

}  // namespace onepass::cpu
