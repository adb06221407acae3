// cuda/hopper/forward_64_terms.cu
#include "cuda/hopper/instantiate.cuh"

namespace onepass::cuda::hopper {

const ForwardPair kForward64Terms = describe_pair<64, 2, 96, Scores::kTerms>();

}  // namespace onepass::cuda::hopper
