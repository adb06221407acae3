// cuda/hopper/instantiate.cuh: for the files that compile one tile shape each.
#pragma once

#include "cuda/hopper/forward_kernel.cuh"
#include "cuda/hopper/kernels.h"

namespace onepass::cuda::hopper {

template <class Config>
ForwardKernel describe() {
  return {forward_kernel<Config>, Config::kRows, Config::kKeys, Config::kThreads, Config::kSharedMemory};
}

template <int kHeadDim, int kConsumers, int kKeys, Scores kScores>
ForwardPair describe_pair() {
  return {describe<ForwardConfig<__half, kHeadDim, kConsumers, kKeys, kScores>>(),
          describe<ForwardConfig<__nv_bfloat16, kHeadDim, kConsumers, kKeys, kScores>>()};
}

}  // namespace onepass::cuda::hopper
