// cuda/portable/forward_instantiate.cuh: the forward kernels of one head dim; included by forward_<dim>.cu only.
#pragma once

#include "cuda/portable/forward.cuh"

namespace onepass::cuda {

template <class Config>
ForwardKernel describe_forward() {
  return {forward_kernel<Config>, Config::kQueries, Config::kThreads, Config::kSharedBytes, Config::kTerms};
}

template <int kHeadDim>
ForwardKernel forward_kernel_for(DType dtype, bool terms) {
  switch (dtype) {
    case DType::kFloat16:
      return terms ? describe_forward<ForwardConfig<__half, kHeadDim, true>>()
                   : describe_forward<ForwardConfig<__half, kHeadDim, false>>();
    case DType::kBFloat16:
      return terms ? describe_forward<ForwardConfig<__nv_bfloat16, kHeadDim, true>>()
                   : describe_forward<ForwardConfig<__nv_bfloat16, kHeadDim, false>>();
    default: return describe_forward<ForwardConfig<float, kHeadDim, true>>();
  }
}

}  // namespace onepass::cuda
