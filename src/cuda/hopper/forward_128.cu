// cuda/hopper/forward_128.cu
#include "cuda/hopper/instantiate.cuh"

namespace onepass::cuda::hopper {

const ForwardPair kForward128 = describe_pair<128, 2, 128, Scores::kPlain>();

}  // namespace onepass::cuda::hopper
