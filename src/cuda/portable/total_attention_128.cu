#include "cuda/portable/total_attention.cuh"

namespace onepass::cuda {
template TotalAttentionKernel total_attention_kernel_for<128>(DType dtype);
}
