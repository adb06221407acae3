#include "cuda/portable/choose.h"

#include <algorithm>

namespace onepass::cuda {
namespace {

constexpr int kOldest = 80;  // compute capability: bfloat16 mma, cp.async and ldmatrix

}  // namespace

Unsupported common_limits(Device device, DType dtype, std::int64_t largest_head_dim) {
  if (dtype != DType::kFloat16 && dtype != DType::kBFloat16 && dtype != DType::kFloat32) {
    return std::string("dtype ") + name_of(dtype) + " (float16, bfloat16 or float32)";
  }
  if (largest_head_dim > kHeadDims.back()) {
    return "head_dim " + std::to_string(largest_head_dim) + " (at most " + std::to_string(kHeadDims.back()) +
           " in this build)";
  }
  const int capability = device_info(device.index).compute_capability;
  if (capability < kOldest) return "a GPU of sm_" + std::to_string(capability) + " (sm_80 or newer)";
  return std::nullopt;
}

int padded_head_dim(const Problem& problem) {
  const std::int64_t needed = std::max(problem.head_dim, problem.head_dim_v);
  return *std::lower_bound(kHeadDims.begin(), kHeadDims.end(), needed);
}

bool is_vectorizable(const Operand& operand, DType dtype, std::int64_t batch, std::int64_t heads, std::int64_t tokens,
                     std::int64_t dim) {
  constexpr std::int64_t kBytes = 16;
  const std::int64_t size = size_of(dtype);
  const auto fits = [&](std::int64_t stride, std::int64_t count) { return count <= 1 || stride * size % kBytes == 0; };
  return reinterpret_cast<std::uintptr_t>(operand.data) % kBytes == 0 && dim * size % kBytes == 0 &&
         fits(operand.batch_stride, batch) && fits(operand.head_stride, heads) && fits(operand.token_stride, tokens);
}

bool has_terms(const Problem& problem) {
  return problem.softcap > 0 || problem.alibi_slopes != nullptr || problem.bias || problem.dropout_p > 0 ||
         !(problem.softmax_scale > 0);
}

int planes_per_group(const Problem& problem, std::int64_t planes, int heads_per_key_head) {
  const std::int64_t bytes =
      std::max<std::int64_t>(1, problem.seqlen_k * (problem.head_dim + problem.head_dim_v) * size_of(problem.dtype));
  const std::int64_t key_heads = std::max<std::int64_t>(1, device_info(problem.device.index).l2_bytes / 2 / bytes);
  return static_cast<int>(
      std::clamp<std::int64_t>(key_heads * heads_per_key_head, 1, std::max<std::int64_t>(planes, 1)));
}

}  // namespace onepass::cuda
