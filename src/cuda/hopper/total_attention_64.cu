// cuda/hopper/total_attention_64.cu
#include "cuda/hopper/total_attention.cuh"

namespace onepass::cuda::hopper {

const TotalAttentionPair kTotalAttention64 = describe_total_attention_pair<64, 2, 128, 2, false>();
const TotalAttentionPair kTotalAttention64Terms = describe_total_attention_pair<64, 2, 64, 0, true>();

}  // namespace onepass::cuda::hopper
