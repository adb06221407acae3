// cuda/hopper/forward_256_terms.cu
#include "cuda/hopper/instantiate.cuh"

namespace onepass::cuda::hopper {

const ForwardPair kForward256Terms = describe_pair<256, 2, 32, Scores::kTerms>();

}  // namespace onepass::cuda::hopper
