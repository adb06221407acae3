// cuda/hopper/forward_128_terms.cu
#include "cuda/hopper/instantiate.cuh"

namespace onepass::cuda::hopper {

const ForwardPair kForward128Terms = describe_pair<128, 2, 80, Scores::kTerms>();

}  // namespace onepass::cuda::hopper
