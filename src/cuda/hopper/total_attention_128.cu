// cuda/hopper/total_attention_128.cu
#include "cuda/hopper/total_attention.cuh"

namespace onepass::cuda::hopper {

const TotalAttentionPair kTotalAttention128 = describe_total_attention_pair<128, 4, 128, false, false>();
const TotalAttentionPair kTotalAttention128Terms = describe_total_attention_pair<128, 2, 64, true, true>();

}  // namespace onepass::cuda::hopper
