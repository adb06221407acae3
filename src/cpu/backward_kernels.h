// cpu/backward_kernels.h: the vectorised parts of the backward pass, for the instruction set in use.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "cpu/backward_task.h"

namespace onepass::cpu {

struct BackwardKernels {
  // Everything that the queries and keys of one task give each other.
  void (*rectangle)(const BackwardProblem& problem, const BackwardTask& task, void* scratch);
  // A sink's weight multiplies no value: dsink = −Σ exp(sink − lse)·rowsum(dO∘O) over the head's queries.
  void (*sink_gradient)(const BackwardProblem& problem, std::int64_t head);
};

BackwardKernels backward_kernels(DType dtype);

}  // namespace onepass::cpu
