#include "cuda/hopper/total_attention.h"

#include <algorithm>
#include <string>

#include "cuda/graph_launch.h"
#include "cuda/hopper/limits.h"
#include "cuda/portable/ragged.h"

namespace onepass::cuda::hopper {
namespace {

constexpr std::int64_t kSectionBytes = 32 << 20;  // queries of a section of heads: well below the L2

const TotalAttentionKernel& choose_kernel(const Problem& p) {
  const bool terms = has_score_terms(p);
  if constexpr (kCompiled<64>) {
    if (p.head_dim <= 64) return (terms ? kTotalAttention64Terms : kTotalAttention64).of(p.dtype);
  }
  if constexpr (kCompiled<128>) {
    if (p.head_dim <= 128) return (terms ? kTotalAttention128Terms : kTotalAttention128).of(p.dtype);
  }
  if constexpr (kCompiled<256>) return (terms ? kTotalAttention256Terms : kTotalAttention256).of(p.dtype);
  throw_no_kernel(p, p.head_dim);
}

}  // namespace

ColumnSums::ColumnSums(const Problem& problem, const ExecutionContext& context)
    : problem_(problem),
      context_(context),
      kernel_(choose_kernel(problem)),
      tiles_(count_key_tiles(problem, problem.num_heads, kernel_.keys)),
      blocks_(std::min<std::int64_t>(tiles_, device_info(problem.device.index).multiprocessors)) {
  if (tiles_ > kMaxBlocks - blocks_) {
    throw Error(ErrorCode::kUnsupported,
                std::string(problem.operation) + ": grid: got " + std::to_string(tiles_) + " tiles; need below 2^31");
  }
  if (tiles_ > blocks_) counter_.emplace(context, problem.device, kTileCounterBytes);
}

void ColumnSums::run(bool add) const {
  TotalAttentionPlan plan;
  plan.order.tiles = static_cast<int>(tiles_);
  plan.order.heavy_first = problem_.window_right != kUnbounded;
  plan.order.section_queries = static_cast<int>(kSectionBytes / (2 * problem_.head_dim));
  plan.add = add;
  if (counter_)
    plan.order.counter = make_tile_counter(counter_->as<char>(), tiles_, problem_.operation, context_.stream);
  if (problem_.ragged() && !add) clear_unowned_total_attention(problem_, context_);
  const LaunchShape shape{.blocks = blocks_, .threads = kernel_.threads, .shared_memory = kernel_.shared_memory};
  launch_dependent(problem_.operation, kernel_.function, shape, problem_.device.index, context_.stream,
                   tensor_map(problem_, problem_.q, query_shape(problem_, problem_.head_dim), kernel_.queries),
                   tensor_map(problem_, problem_.k, key_shape(problem_, problem_.head_dim), kernel_.keys), problem_,
                   plan);
}

Unsupported supports_total_attention(const Problem& p) { return rejects_queries_and_keys(p); }

void total_attention(const Problem& problem, const ExecutionContext& context) {
  const DeviceGuard guard(problem.device.index);
  ColumnSums(problem, context).run();
}

}  // namespace onepass::cuda::hopper
