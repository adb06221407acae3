// cpu/backward_kernels.h: the vectorised parts of the backward pass, for the instruction set in use.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "cpu/backward_task.h"

namespace onepass::cpu {

struct BackwardKernels {
  // delta(query) = rowsum(dO∘O) for queries [begin, end) of one (batch, head), tokens counted from the batch's first;
  // 0 in rows without a key.
  void (*deltas)(const BackwardProblem& problem, const RowVector& delta, std::int64_t batch, std::int64_t head,
                 std::int64_t begin, std::int64_t end);
  // Everything that the queries and keys of one task give each other.
  void (*rectangle)(const BackwardProblem& problem, const RowVector& delta, const BackwardTask& task, void* scratch);
};

BackwardKernels backward_kernels(DType dtype);

}  // namespace onepass::cpu
