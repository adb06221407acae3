// cuda/common/quad.cuh: reductions over the four lanes that hold a row of an accumulator fragment.
#pragma once

#include "cuda/common/scalar.cuh"

namespace onepass::cuda {

ONEPASS_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
ONEPASS_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace onepass::cuda
