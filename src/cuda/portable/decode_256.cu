#include "cuda/portable/decode_instantiate.cuh"

namespace onepass::cuda {

template DecodeKernel decode_kernel_for<256>(DType storage, int rows, int plain_tokens);

}  // namespace onepass::cuda
