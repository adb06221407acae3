// cuda/hopper/backward_64.cu
#include "cuda/hopper/backward_kernel.cuh"

namespace onepass::cuda::hopper {

const BackwardPair kBackward64 = describe_backward_pair<64>();

}  // namespace onepass::cuda::hopper
