// cuda/hopper/forward_192.cu
#include "cuda/hopper/instantiate.cuh"

namespace onepass::cuda::hopper {

const ForwardPair kForward192 = describe_pair<192, 2, 96, Scores::kPlain>();

}  // namespace onepass::cuda::hopper
