// cuda/hopper/total_attention_64.cu
#include "cuda/hopper/total_attention.cuh"

namespace onepass::cuda::hopper {

const TotalAttentionPair kTotalAttention64 = describe_total_attention_pair<64, 4, 128, false, false>();
const TotalAttentionPair kTotalAttention64Terms = describe_total_attention_pair<64, 2, 64, true, true>();

}  // namespace onepass::cuda::hopper
