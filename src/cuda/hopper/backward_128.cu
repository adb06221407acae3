// cuda/hopper/backward_128.cu
#include "cuda/hopper/backward_kernel.cuh"

namespace onepass::cuda::hopper {

const BackwardPair kBackward128 = describe_backward_pair<128>();

}  // namespace onepass::cuda::hopper
