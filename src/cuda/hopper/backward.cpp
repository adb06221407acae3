// cuda/hopper/backward.cpp: host side of the backward pass. What goes around the two kernels, row statistics before
// them above all, is the portable backend's.
#include "cuda/hopper/backward.h"

#include <algorithm>
#include <numbers>
#include <string>

#include "cuda/graph_launch.h"
#include "cuda/hopper/backward_plan.h"
#include "cuda/hopper/limits.h"
#include "cuda/portable/choose.h"
#include "cuda/portable/operations.h"

namespace onepass::cuda::hopper {
namespace {

constexpr std::int64_t kSectionBytes = 32 << 20;  // of a section of heads: well below the L2
constexpr std::int64_t kMaxBackwardHeadDim = std::min<std::int64_t>(128, kHeadDims.back());
constexpr int kFewestKeys = 128;  // of a tile
static_assert(kCounterBytes >= kTileCounterBytes, "what the portable backend sets aside for this one");

const BackwardKernel& choose_kernel(const Problem& p) {
  const std::int64_t dim = std::max(p.head_dim, p.head_dim_v);
  if constexpr (kCompiled<64>) {
    if (dim <= 64) return kBackward64.of(p.dtype);
  }
  if constexpr (kCompiled<128>) return kBackward128.of(p.dtype);
  throw_no_kernel(p, dim);
}

// What a query of all heads of a group takes of the L2: Q, dO and the sums of dQ.
std::int64_t query_bytes(const Problem& p) {
  return p.group_size() * (2 * (p.head_dim + p.head_dim_v) + 4 * p.head_dim);
}

// dK, dV and dQ from the rows' statistics.
void gradients(const BackwardArguments& common, const ExecutionContext& context) {
  const Problem& p = common.problem.forward;
  const BackwardKernel& kernel = choose_kernel(p);
  BackwardArguments arguments = common;
  arguments.scale_log2 = std::numbers::log2e_v<float> * p.softmax_scale;

  const auto queries = [&](const Operand& operand, std::int64_t dim) {
    return tensor_map(p, operand, query_shape(p, dim), kernel.queries);
  };
  const auto keys = [&](const Operand& operand, std::int64_t dim, int rows) {
    return tensor_map(p, operand, key_shape(p, dim), rows);
  };
  BackwardMaps maps{};
  maps.q = queries(p.q, p.head_dim);
  maps.dout = queries(common.problem.dout, p.head_dim_v);
  maps.k = keys(p.k, p.head_dim, kernel.keys);
  maps.v = keys(p.v, p.head_dim_v, kernel.keys);
  BackwardPlan plan;
  constexpr int kWarpgroupKeys = 64;
  plan.tma_store_dk = !tma_rejects("dk", common.problem.dk, key_shape(p, p.head_dim));
  plan.tma_store_dv = !tma_rejects("dv", common.problem.dv, key_shape(p, p.head_dim_v));
  if (plan.tma_store_dk) maps.dk = keys(common.problem.dk, p.head_dim, kWarpgroupKeys);
  if (plan.tma_store_dv) maps.dv = keys(common.problem.dv, p.head_dim_v, kWarpgroupKeys);

  const std::int64_t tiles = count_key_tiles(p, p.num_heads_kv, kernel.keys);
  const std::int64_t blocks = std::min<std::int64_t>(tiles, device_info(p.device.index).multiprocessors);
  plan.order.tiles = static_cast<int>(tiles);
  plan.order.heavy_first = p.window_right != kUnbounded;
  plan.order.section_queries = static_cast<int>(kSectionBytes / query_bytes(p));
  if (tiles > blocks) {
    plan.order.counter = make_tile_counter(common.counter, tiles, p.operation, context.stream);
  }
  launch(p.operation, kernel.function, {blocks, kernel.threads, kernel.shared_memory}, p.device.index, context.stream,
         maps, arguments, plan);

  arguments.tiles = static_cast<int>(ceil_div(p.seqlen_q, kernel.queries));
  launch(p.operation, kernel.convert, {p.batch * p.num_heads * arguments.tiles, kernel.convert_threads}, p.device.index,
         context.stream, arguments);
}

}  // namespace

Unsupported supports_backward(const BackwardProblem& problem) {
  const Problem& p = problem.forward;
  if (auto reason = rejects_queries_and_keys(p)) return reason;
  if (auto reason = rejects_values_and_window(p)) return reason;
  if (std::max(p.head_dim, p.head_dim_v) > kMaxBackwardHeadDim) {
    return "head_dim above " + std::to_string(kMaxBackwardHeadDim) + " backward";
  }
  if (has_score_terms(p) || p.dropout_p > 0.0) {
    return "softcap, ALiBi, a bias, dropout or a softmax_scale below 1e-20 backward";
  }
  if (p.deterministic) return "deterministic gradients";
  if (auto reason = tma_rejects("dout", problem.dout, query_shape(p, p.head_dim_v))) return reason;
  if (count_key_tiles(p, p.num_heads_kv, kFewestKeys) > kMaxBlocks / 2) return "more than 2^30 tiles";
  return cuda::supports_backward(problem);
}

void backward(const BackwardProblem& problem, const ExecutionContext& context) {
  cuda::backward(problem, context, gradients);
}

Unsupported supports_piecewise_backward(const PiecewiseBackwardProblem& problem) {
  if (auto reason = supports_backward(problem.near)) return reason;
  const Problem& p = problem.near.forward;
  if (auto reason = tma_rejects("q2", problem.far.q, query_shape(p, p.head_dim))) return reason;
  return tma_rejects("k2", problem.far.k, key_shape(p, p.head_dim));
}

void piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context) {
  cuda::piecewise_backward(problem, context, gradients);
}

}  // namespace onepass::cuda::hopper
