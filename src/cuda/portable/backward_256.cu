#include "cuda/portable/backward_instantiate.cuh"

namespace onepass::cuda {
template struct BackwardKernels<256>;
}
