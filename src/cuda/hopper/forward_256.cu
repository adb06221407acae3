// cuda/hopper/forward_256.cu
#include "cuda/hopper/instantiate.cuh"

namespace onepass::cuda::hopper {

const ForwardPair kForward256 = describe_pair<256, 2, 80, Scores::kPlain>();

}  // namespace onepass::cuda::hopper
