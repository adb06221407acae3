#include "cuda/hopper/total_attention.h"

#include <algorithm>
#include <string>

#include "cuda/device.h"
#include "cuda/hopper/tensor_map.h"
#include "cuda/portable/head_dims.h"
#include "cuda/portable/ragged.h"

namespace onepass::cuda::hopper {
namespace {

constexpr std::int64_t kMaxTokens = std::int64_t{1} << 28;  // tokens and blocks of them stay within int32
constexpr std::int64_t kSectionBytes = 32 << 20;            // queries of a section of heads: well below the L2

OperandShape shape_of_q(const Problem& p) {
  return {p.head_dim, p.ragged() ? p.total_q : p.seqlen_q, p.num_heads, p.ragged() ? 1 : p.batch};
}
OperandShape shape_of_k(const Problem& p) {
  return {p.head_dim, p.ragged() ? p.total_k : p.seqlen_k, p.num_heads_kv, p.ragged() ? 1 : p.batch};
}

bool has_terms(const Problem& p) {
  return p.softcap > 0.0 || p.alibi_slopes != nullptr || p.bias || !(p.softmax_scale > 1e-20f);
}

template <int kHeadDim>
constexpr bool kCompiled = std::find(kHeadDims.begin(), kHeadDims.end(), kHeadDim) != kHeadDims.end();

const TotalAttentionKernel& choose_kernel(const Problem& p) {
  const bool terms = has_terms(p);
  if constexpr (kCompiled<64>) {
    if (p.head_dim <= 64) return (terms ? kTotalAttention64Terms : kTotalAttention64).of(p.dtype);
  }
  if constexpr (kCompiled<128>) {
    if (p.head_dim <= 128) return (terms ? kTotalAttention128Terms : kTotalAttention128).of(p.dtype);
  }
  if constexpr (kCompiled<256>) return (terms ? kTotalAttention256Terms : kTotalAttention256).of(p.dtype);
  throw Error(ErrorCode::kUnsupported, std::string(p.operation) + ": head_dim: got " + std::to_string(p.head_dim) +
                                           "; need a head_dim with kernels in this build");
}

std::int64_t count_tiles(const Problem& p, int keys) {
  const std::int64_t key_tiles = p.ragged() ? p.total_k / keys + p.batch : p.batch * ((p.seqlen_k + keys - 1) / keys);
  return key_tiles * p.num_heads;
}

}  // namespace

ColumnSums::ColumnSums(const Problem& problem, const ExecutionContext& context)
    : problem_(problem),
      context_(context),
      kernel_(choose_kernel(problem)),
      tiles_(count_tiles(problem, kernel_.keys)),
      blocks_(std::min<std::int64_t>(tiles_, device_info(problem.device.index).multiprocessors)) {
  if (tiles_ > kMaxBlocks - blocks_) {
    throw Error(ErrorCode::kUnsupported,
                std::string(problem.operation) + ": grid: got " + std::to_string(tiles_) + " tiles; need below 2^31");
  }
  if (tiles_ > blocks_) counter_.emplace(context, problem.device, sizeof(int));
}

void ColumnSums::run(bool add) const {
  TotalAttentionPlan plan;
  plan.tiles = static_cast<int>(tiles_);
  plan.heavy_first = problem_.window_right != kUnbounded;
  plan.section_queries = static_cast<int>(kSectionBytes / (2 * problem_.head_dim));
  plan.add = add;
  if (counter_) {
    plan.counter = counter_->as<int>();
    check(cudaMemsetAsync(plan.counter, 0, sizeof(int), static_cast<cudaStream_t>(context_.stream)), problem_.operation,
          "cudaMemsetAsync");
  }
  if (problem_.ragged() && !add) clear_unowned_total_attention(problem_, context_);
  launch(problem_.operation, kernel_.function,
         {.blocks = blocks_, .threads = kernel_.threads, .shared_memory = kernel_.shared_memory}, problem_.device.index,
         context_.stream, tensor_map(problem_, problem_.q, shape_of_q(problem_), kernel_.queries),
         tensor_map(problem_, problem_.k, shape_of_k(problem_), kernel_.keys), problem_, plan);
}

Unsupported supports_total_attention(const Problem& p) {
  if (device_info(p.device.index).compute_capability != 90) return "a device that is not sm_90";
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) return std::string(name_of(p.dtype)) + " tensors";
  if (p.head_dim > kHeadDims.back()) return "head_dim above " + std::to_string(kHeadDims.back());
  if (p.head_dim % 8 != 0) return "head_dim that is no multiple of 8";
  if (p.head_dim == 0 || p.batch == 0 || p.num_heads == 0) return "an empty dimension";
  if (p.total_q == 0 || p.total_k == 0 || p.seqlen_q == 0 || p.seqlen_k == 0) return "an empty dimension";
  if (std::max({p.seqlen_q, p.seqlen_k, p.total_q / 4, p.total_k / 4}) > kMaxTokens) return "more than 2^28 tokens";
  if (auto reason = tma_rejects("q", p.q, shape_of_q(p))) return reason;
  return tma_rejects("k", p.k, shape_of_k(p));
}

void total_attention(const Problem& problem, const ExecutionContext& context) {
  const DeviceGuard guard(problem.device.index);
  ColumnSums(problem, context).run();
}

}  // namespace onepass::cuda::hopper
