// cpu/merge.h: exact merge of two partial attention results.
#pragma once

#include "core/problem.h"
#include "onepass/execution.h"

namespace onepass::cpu {

// float32, float16 and bfloat16; weights in float32.
void merge(const MergeProblem& problem, const ExecutionContext& context);

}  // namespace onepass::cpu
