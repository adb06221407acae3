// cuda/hopper/kernels.h: the compiled forward kernels as the host sees them; each table lives in its own file.
#pragma once

#include <cuda.h>

#include "core/problem.h"
#include "cuda/hopper/plan.h"

namespace onepass::cuda::hopper {

struct TensorMaps {
  CUtensorMap q, k, v, out;
  CUtensorMap q_far, k_far;  // piecewise attention's second pair
};

using ForwardFunction = void (*)(TensorMaps, Problem, Plan);

struct ForwardKernel {
  ForwardFunction function;
  int rows;  // queries of a tile
  int keys;  // keys of a block
  int threads;
  int shared_memory;  // bytes
};

// Both dtypes of one tile shape.
struct ForwardPair {
  ForwardKernel float16, bfloat16;
  const ForwardKernel& of(DType dtype) const { return dtype == DType::kFloat16 ? float16 : bfloat16; }
};

extern const ForwardPair kForward64, kForward96, kForward128, kForward192, kForward256;
extern const ForwardPair kForward64Terms, kForward128Terms, kForward256Terms;  // softcap, ALiBi, bias, dropout
extern const ForwardPair kPiecewise64, kPiecewise128;

// Merges plan.splits partial results into problem.out and problem.lse.
void merge_splits(const Problem& problem, const Plan& plan, void* stream);

}  // namespace onepass::cuda::hopper
