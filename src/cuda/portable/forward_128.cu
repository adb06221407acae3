#include "cuda/portable/forward_instantiate.cuh"

namespace onepass::cuda {
template ForwardKernel forward_kernel_for<128>(DType dtype, bool terms);
}
