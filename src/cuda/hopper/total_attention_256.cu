// cuda/hopper/total_attention_256.cu
#include "cuda/hopper/total_attention.cuh"

namespace onepass::cuda::hopper {

const TotalAttentionPair kTotalAttention256 = describe_total_attention_pair<256, 3, 96, true, false>();
const TotalAttentionPair kTotalAttention256Terms = describe_total_attention_pair<256, 2, 64, true, true>();

}  // namespace onepass::cuda::hopper
