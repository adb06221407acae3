// cuda/hopper/piecewise_64.cu
#include "cuda/hopper/instantiate.cuh"

namespace onepass::cuda::hopper {

const ForwardPair kPiecewise64 = describe_pair<64, 3, 128, Scores::kPiecewise>();

}  // namespace onepass::cuda::hopper
