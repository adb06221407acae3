// cuda/hopper/forward_96.cu
#include "cuda/hopper/instantiate.cuh"

namespace onepass::cuda::hopper {

const ForwardPair kForward96 = describe_pair<96, 3, 96, Scores::kPlain>();

}  // namespace onepass::cuda::hopper
