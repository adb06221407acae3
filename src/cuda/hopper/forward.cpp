#include "cuda/hopper/forward.h"

#include <algorithm>
#include <optional>
#include <string>

#include "core/parallel.h"
#include "core/piecewise.h"
#include "core/with_lse.h"
#include "cuda/graph_launch.h"
#include "cuda/hopper/kernels.h"
#include "cuda/hopper/limits.h"
#include "cuda/hopper/total_attention.h"
#include "cuda/portable/ragged.h"

namespace onepass::cuda::hopper {
namespace {

constexpr std::int64_t kSectionBytes = 32 << 20;  // K and V of a section of heads: about half the L2
// Beyond it, both pairs' queries leave too little shared memory for the ring.
constexpr std::int64_t kMaxPiecewiseHeadDim = std::min<std::int64_t>(128, kHeadDims.back());

bool has_terms(const Problem& p) { return has_score_terms(p) || p.dropout_p > 0.0; }

// The smallest kernels of this build that hold both head dims.
const ForwardKernel& choose_kernel(const Problem& p, bool piecewise) {
  const std::int64_t dim = std::max(p.head_dim, p.head_dim_v);
  if constexpr (kCompiled<64>) {
    if (dim <= 64) return (piecewise ? kPiecewise64 : has_terms(p) ? kForward64Terms : kForward64).of(p.dtype);
  }
  if constexpr (kCompiled<128>) {
    const ForwardPair& plain = dim <= 96 ? kForward96 : kForward128;
    if (dim <= 128) return (piecewise ? kPiecewise128 : has_terms(p) ? kForward128Terms : plain).of(p.dtype);
  }
  if constexpr (kCompiled<256>) {
    const ForwardPair& plain = dim <= 192 ? kForward192 : kForward256;
    if (!piecewise) return (has_terms(p) ? kForward256Terms : plain).of(p.dtype);
  }
  throw_no_kernel(p, dim);
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Parts to split every tile's keys into when there are too few tiles to fill the SMs: the least estimated time in
// units of one block's. A tile costs about two blocks beyond its own, the second kernel about four.
int choose_splits(std::int64_t tiles, std::int64_t blocks, int multiprocessors) {
  constexpr int kTileCost = 2, kMergeCost = 4, kMaxSplits = 32;
  if (tiles >= 2 * multiprocessors) return 1;
  int best = 1;
  std::int64_t least = ceil_div(tiles, multiprocessors) * (blocks + kTileCost);
  for (int splits = 2; splits <= std::min<std::int64_t>(kMaxSplits, blocks); ++splits) {
    const std::int64_t cost =
        ceil_div(tiles * splits, multiprocessors) * (ceil_div(blocks, splits) + kTileCost) + kMergeCost;
    if (cost < least) {
      least = cost;
      best = splits;
    }
  }
  return best;
}

// piecewise: null, or the whole of which p is the near pair with the mask of all keys.
Plan make_plan(const Problem& p, const PiecewiseProblem* piecewise, const ForwardKernel& kernel, int multiprocessors) {
  Plan plan;
  const std::int64_t row_tiles =
      p.ragged() ? p.total_q / kernel.rows + p.batch : p.batch * ceil_div(p.seqlen_q, kernel.rows);
  std::int64_t visible = p.seqlen_k;  // of a tile, at most
  if (p.window_left != kUnbounded && p.window_right != kUnbounded) {
    visible = std::clamp<std::int64_t>(p.window_left + p.window_right + kernel.rows, 1, visible);
  }
  if (piecewise != nullptr) {
    plan.dist_threshold = static_cast<int>(clamped_threshold(*piecewise));
    plan.near_left = near_part(*piecewise).window_left;
    plan.far_right = far_part(*piecewise).window_right;
  } else {
    plan.splits = choose_splits(row_tiles * p.num_heads, ceil_div(visible, kernel.keys), multiprocessors);
  }
  const std::int64_t tiles = row_tiles * p.num_heads * plan.splits;
  if (tiles > 0x7FFFFFFF - multiprocessors) {
    throw Error(ErrorCode::kUnsupported,
                std::string(p.operation) + ": grid: got " + std::to_string(tiles) + " tiles; need below 2^31");
  }
  plan.tiles = static_cast<int>(tiles);
  plan.heavy_first = p.window_right != kUnbounded;
  plan.wave_keys = multiprocessors * kernel.rows;
  plan.cached_keys = static_cast<int>(
      std::min<std::int64_t>(kSectionBytes / (2 * (p.head_dim + p.head_dim_v)) * p.group_size(), 1 << 30));
  plan.tma_store = !tma_rejects("out", p.out, query_shape(p, p.head_dim_v));
  return plan;
}

void attend(const Problem& problem, const PiecewiseProblem* piecewise, const ExecutionContext& context) {
  const int multiprocessors = device_info(problem.device.index).multiprocessors;
  const ForwardKernel& kernel = choose_kernel(problem, piecewise != nullptr);
  Plan plan = make_plan(problem, piecewise, kernel, multiprocessors);
  const std::int64_t grid = std::min<std::int64_t>(plan.tiles, multiprocessors);

  const std::int64_t partial_rows =
      plan.splits > 1
          ? plan.splits * problem.num_heads * (problem.ragged() ? problem.total_q : problem.batch * problem.seqlen_q)
          : 0;
  const bool counts = plan.tiles > grid;
  std::optional<Workspace> workspace;
  if (counts || partial_rows > 0) {
    workspace.emplace(context, problem.device,
                      static_cast<std::size_t>(kTileCounterBytes + partial_rows * 4 * (problem.head_dim_v + 1)));
    if (counts) {
      plan.counter = make_tile_counter(workspace->as<char>(), plan.tiles, problem.operation, context.stream);
    }
    plan.partial_out = reinterpret_cast<float*>(workspace->as<char>() + kTileCounterBytes);
    plan.partial_lse = plan.partial_out + partial_rows * problem.head_dim_v;
  }

  const auto queries = [&](const Operand& q) {
    return tensor_map(problem, q, query_shape(problem, problem.head_dim), kernel.rows);
  };
  const auto keys = [&](const Operand& k, std::int64_t dim) {
    return tensor_map(problem, k, key_shape(problem, dim), kernel.keys);
  };
  TensorMaps maps{};
  maps.q = queries(problem.q);
  maps.k = keys(problem.k, problem.head_dim);
  maps.v = keys(problem.v, problem.head_dim_v);
  if (plan.tma_store) maps.out = tensor_map(problem, problem.out, query_shape(problem, problem.head_dim_v), 64);
  if (piecewise != nullptr) {
    maps.q_far = queries(piecewise->far.q);
    maps.k_far = keys(piecewise->far.k, problem.head_dim);
  }
  const LaunchShape shape{.blocks = grid, .threads = kernel.threads, .shared_memory = kernel.shared_memory};
  launch_dependent(problem.operation, kernel.function, shape, problem.device.index, context.stream, maps, problem,
                   plan);
  if (plan.splits > 1) merge_splits(problem, plan, context.stream);
}

}  // namespace

Unsupported supports_forward(const Problem& p) {
  if (auto reason = rejects_queries_and_keys(p)) return reason;
  if (auto reason = rejects_values_and_window(p)) return reason;
  if (reinterpret_cast<std::uintptr_t>(p.out.data) % 4 != 0 ||
      (p.out.token_stride | p.out.head_stride | p.out.batch_stride) % 2 != 0) {
    return "out: address or a stride off 4 bytes";
  }
  return std::nullopt;
}

Unsupported supports_piecewise(const PiecewiseProblem& problem) {
  const Problem& p = problem.near;
  if (auto reason = supports_forward(p)) return reason;
  if (has_terms(p)) return "softcap, ALiBi, a bias, dropout or a softmax_scale below 1e-20 with two pairs";
  if (std::max(p.head_dim, p.head_dim_v) > kMaxPiecewiseHeadDim) {
    return "head_dim above " + std::to_string(kMaxPiecewiseHeadDim) + " with two pairs";
  }
  if (auto reason = tma_rejects("q2", problem.far.q, query_shape(p, p.head_dim))) return reason;
  return tma_rejects("k2", problem.far.k, key_shape(p, p.head_dim));
}

void forward(const Problem& problem, const ExecutionContext& context) {
  const DeviceGuard guard(problem.device.index);
  const WithLse with_lse(problem, context);
  const Problem& attended = with_lse.problem();
  std::optional<ColumnSums> sums;
  if (problem.total_attention) sums.emplace(attended, context);
  attend(attended, nullptr, context);
  if (problem.ragged()) clear_unowned_queries(attended, problem.out, problem.head_dim_v, attended.lse, context);
  if (sums) sums->run();
}

void piecewise(const PiecewiseProblem& problem, const ExecutionContext& context) {
  const DeviceGuard guard(problem.near.device.index);
  const WithLse with_lse(problem.near, context);
  PiecewiseProblem attended = problem;
  attended.near = with_lse.problem();
  const Problem& whole = attended.near;
  const Problem near = near_part(attended), far = far_part(attended);
  std::optional<ColumnSums> near_sums, far_sums;
  if (whole.total_attention) {
    near_sums.emplace(near, context);
    far_sums.emplace(far, context);
  }
  attend(whole, &attended, context);
  if (whole.ragged()) clear_unowned_queries(whole, whole.out, whole.head_dim_v, whole.lse, context);
  if (!whole.total_attention) return;
  near_sums->run();
  far_sums->run(true);
}

}  // namespace onepass::cuda::hopper
