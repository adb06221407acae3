// cuda/hopper/forward_64.cu
#include "cuda/hopper/instantiate.cuh"

namespace onepass::cuda::hopper {

const ForwardPair kForward64 = describe_pair<64, 3, 128, Scores::kPlain>();

}  // namespace onepass::cuda::hopper
