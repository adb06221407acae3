// cuda/hopper/piecewise_128.cu
#include "cuda/hopper/instantiate.cuh"

namespace onepass::cuda::hopper {

const ForwardPair kPiecewise128 = describe_pair<128, 2, 128, Scores::kPiecewise>();

}  // namespace onepass::cuda::hopper
