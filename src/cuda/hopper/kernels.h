// cuda/hopper/kernels.h: the compiled forward kernels as the host sees them; each table lives in its own file.
#pragma once

#include <cuda.h>

#include "core/problem.h"
#include "cuda/hopper/plan.h"

namespace onepass::cuda::hopper {

using ForwardFunction = void (*)(CUtensorMap q, CUtensorMap k, CUtensorMap v, CUtensorMap out, Problem, Plan);

struct ForwardKernel {
  ForwardFunction function;
  int head_dim;  // both head dims are at most this
  int rows;      // queries of a tile
  int keys;      // keys of a block
  int threads;
  int shared_memory;  // bytes
};

// Both dtypes of one tile shape.
struct ForwardPair {
  ForwardKernel float16, bfloat16;
  const ForwardKernel& of(DType dtype) const { return dtype == DType::kFloat16 ? float16 : bfloat16; }
};

extern const ForwardPair kForward64, kForward128, kForward256;
extern const ForwardPair kForward64Terms, kForward128Terms, kForward256Terms;  // softcap, ALiBi, bias, dropout

// Merges plan.splits partial results into problem.out and problem.lse.
void merge_splits(const Problem& problem, const Plan& plan, void* stream);

}  // namespace onepass::cuda::hopper
