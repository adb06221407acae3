// cuda/hopper/forward_128_tall.cu
#include "cuda/hopper/instantiate.cuh"

namespace onepass::cuda::hopper {

const ForwardPair kForward128Tall = describe_pair<128, 3, 80, false>();

}  // namespace onepass::cuda::hopper
