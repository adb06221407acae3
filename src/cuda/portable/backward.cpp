// cuda/portable/backward.cpp: host side of the backward pass.
#include "cuda/portable/backward.h"

#include <algorithm>
#include <numbers>

#include "core/parallel.h"
#include "core/piecewise.h"
#include "cuda/portable/choose.h"
#include "cuda/portable/operations.h"
#include "cuda/portable/ragged.h"
#include "cuda/portable/sink_gradient.h"

namespace onepass::cuda {
namespace {

// Host-side choices of one call.
class BackwardCall {
  static constexpr int kLargestBoth = 128;  // head dim up to which one pass holds dK and dV
  static constexpr int kStaticBytes =
      128;  // of shared memory, that the wide kernel has beyond what it is launched with

  template <class F>
  auto with_kernels(F&& f) const {
    return with_head_dim(head_dim_, [&](auto head_dim) { return f(BackwardKernels<head_dim.value>{}); });
  }

 public:
  BackwardCall(const BackwardProblem& problem, const ExecutionContext& context, GradientKernels gradients)
      : problem_(problem),
        forward_(problem.forward),
        context_(context),
        gradients_(gradients),
        head_dim_(padded_head_dim(forward_)) {
    const BackwardKernel wide = with_kernels([&](auto kernels) { return kernels.wide_key_pass(forward_.dtype); });
    wide_ = wide.kernel != nullptr && forward_.dtype != DType::kFloat32 && !has_terms(forward_) &&
            wide.shared_bytes + kStaticBytes <= device_info(forward_.device.index).shared_memory;
  }

  std::int64_t padded_rows() const {
    return forward_.ragged() ? (forward_.total_q / kPadding + forward_.batch) * kPadding
                             : forward_.batch * ceil_div(forward_.seqlen_q, kPadding) * kPadding;
  }

  // Tiles of the kernel with the finest ones.
  std::int64_t largest_grid() const {
    constexpr std::int64_t kFinestTile = 16;
    return std::max(ceil_div(forward_.seqlen_q, kFinestTile), ceil_div(forward_.seqlen_k, kFinestTile)) *
           forward_.batch * forward_.num_heads;
  }

  // Device memory of a call. Its size does not depend on the mask, so that one serves both parts of piecewise
  // attention.
  struct Memory {
    Workspace statistics, natural, dq_sums, counter;
  };
  Memory memory() const {
    const auto allocate = [&](std::int64_t bytes) { return Workspace(context_, forward_.device, bytes); };
    const std::int64_t rows = forward_.num_heads * padded_rows();
    // A block more than there are: kernels may look at the block where a tile's queries begin before they know that no
    // query sees the tile.
    const std::int64_t seen = rows + kPadding;
    return {allocate(seen * sizeof(RowStatistics)), allocate(seen / statistics_rows() * sizeof(std::int32_t)),
            allocate(sums_by_atomics() ? rows * head_dim_ * sizeof(float) : 0),
            allocate(gradients_ != nullptr ? kCounterBytes : 0)};
  }

  // add: dv and dbias are added to.
  void run(const Memory& memory, bool add) {
    arguments_ = common_arguments();
    arguments_.statistics = memory.statistics.as<RowStatistics>();
    arguments_.natural = memory.natural.as<std::int32_t>();
    arguments_.dq_sums = memory.dq_sums.as<float>();
    arguments_.counter = memory.counter.as<void>();
    arguments_.add = add;
    row_statistics();
    if (gradients_ != nullptr) {
      gradients_(arguments_, context_);
    } else {
      key_gradients();
      sums_by_atomics() ? convert_query_gradient() : query_gradient();
    }
    if (problem_.dbias) bias_gradient();
    if (problem_.dsinks != nullptr) {
      const SinkGradientKernel kernel = sink_gradient();
      start(kernel.kernel, {forward_.num_heads, kernel.threads});
    }
    if (forward_.ragged()) {
      clear_unowned_queries(forward_, problem_.dq, forward_.head_dim, {}, context_);
      clear_unowned_keys(forward_, problem_.dk, forward_.head_dim, context_);
      clear_unowned_keys(forward_, problem_.dv, forward_.head_dim_v, context_);
    }
  }

 private:
  // float32 operands ask for accuracy, not for speed: their dQ is always summed in a fixed order.
  int statistics_rows() const { return kStatisticsRows<false> / (forward_.dtype == DType::kFloat32 ? 2 : 1); }

  bool sums_by_atomics() const { return !forward_.deterministic && forward_.dtype != DType::kFloat32; }

  BackwardArguments common_arguments() const {
    const auto vectorizable = [&](const Operand& operand, bool query, std::int64_t dim) {
      return is_vectorizable(operand, forward_.dtype, forward_.batch,
                             query ? forward_.num_heads : forward_.num_heads_kv,
                             query ? forward_.total_q : forward_.total_k, dim);
    };
    const std::int64_t dim = forward_.head_dim, dim_v = forward_.head_dim_v;
    BackwardArguments arguments = {};
    arguments.problem = problem_;
    arguments.group_size = static_cast<int>(forward_.group_size());
    arguments.vectorized = {vectorizable(forward_.q, true, dim),      vectorizable(forward_.k, false, dim),
                            vectorizable(forward_.v, false, dim_v),   vectorizable(forward_.out, true, dim_v),
                            vectorizable(problem_.dout, true, dim_v), vectorizable(problem_.dq, true, dim),
                            vectorizable(problem_.dk, false, dim),    vectorizable(problem_.dv, false, dim_v)};
    arguments.padded_rows = padded_rows();
    return arguments;
  }

  void start(void (*kernel)(BackwardArguments), const LaunchShape& shape) const {
    launch(forward_.operation, kernel, shape, forward_.device.index, context_.stream, arguments_);
  }

  // Launches a tiled kernel over `tokens` tokens of each of `heads` heads.
  void start_tiles(const BackwardKernel& kernel, std::int64_t tokens, std::int64_t heads, int heads_per_key_head) {
    const std::int64_t planes = forward_.batch * heads;
    arguments_.tiles = static_cast<int>(ceil_div(tokens, kernel.rows));
    arguments_.planes_per_group = planes_per_group(forward_, planes, heads_per_key_head);
    arguments_.scale_log2 = std::numbers::log2e_v<float> * (kernel.has_terms ? 1.0f : forward_.softmax_scale);
    start(kernel.kernel, {planes * arguments_.tiles, kernel.threads, kernel.shared_bytes});
  }

  void row_statistics() {
    start_tiles(with_kernels([&](auto kernels) { return kernels.row_statistics(forward_.dtype); }), forward_.seqlen_q,
                forward_.num_heads, arguments_.group_size);
  }

  void key_gradients() {
    const auto pass = [&](Pass which) {
      const BackwardKernel kernel = with_kernels([&](auto kernels) {
        return wide_ ? kernels.wide_key_pass(forward_.dtype)
                     : kernels.key_pass(forward_.dtype, has_terms(forward_), which);
      });
      start_tiles(kernel, forward_.seqlen_k, forward_.num_heads_kv, 1);
    };
    if (head_dim_ <= kLargestBoth) return pass(Pass::kBoth);
    pass(Pass::kValue);
    pass(Pass::kKey);
  }

  void convert_query_gradient() {
    start_tiles(
        with_kernels([&](auto kernels) { return kernels.convert_dq(forward_.dtype, has_terms(forward_), wide_); }),
        forward_.seqlen_q, forward_.num_heads, arguments_.group_size);
  }

  void query_gradient() {
    start_tiles(with_kernels([&](auto kernels) { return kernels.query_pass(forward_.dtype); }), forward_.seqlen_q,
                forward_.num_heads, arguments_.group_size);
  }

  void bias_gradient() {
    const BackwardKernel kernel = with_kernels([&](auto kernels) { return kernels.bias_gradient(forward_.dtype); });
    const BiasOperand& dbias = problem_.dbias;
    const std::int64_t keys = with_kernels([&](auto kernels) { return kernels.bias_keys(forward_.dtype); });
    const std::int64_t blocks = (dbias.key_stride == 0 ? 1 : ceil_div(forward_.seqlen_k, keys)) *
                                (dbias.query_stride == 0 ? 1 : ceil_div(forward_.seqlen_q, kernel.rows)) *
                                (dbias.head_stride == 0 ? 1 : forward_.num_heads) *
                                (dbias.batch_stride == 0 ? 1 : forward_.batch);
    start(kernel.kernel, {blocks, kernel.threads, kernel.shared_bytes});
  }

  const BackwardProblem& problem_;
  const Problem& forward_;
  const ExecutionContext& context_;
  const GradientKernels gradients_;  // null: those of this backend
  int head_dim_;
  bool wide_;
  BackwardArguments arguments_;
};

}  // namespace

Unsupported supports_backward(const BackwardProblem& problem) {
  const Problem& forward = problem.forward;
  if (Unsupported reason =
          common_limits(forward.device, forward.dtype, std::max(forward.head_dim, forward.head_dim_v))) {
    return reason;
  }
  const std::int64_t tiles = BackwardCall(problem, {}, nullptr).largest_grid();
  if (tiles > kMaxBlocks) return std::to_string(tiles) + " tiles (at most " + std::to_string(kMaxBlocks) + ")";
  return std::nullopt;
}

void backward(const BackwardProblem& problem, const ExecutionContext& context) { backward(problem, context, nullptr); }

void backward(const BackwardProblem& problem, const ExecutionContext& context, GradientKernels gradients) {
  const DeviceGuard guard(problem.forward.device.index);
  BackwardCall call(problem, context, gradients);
  call.run(call.memory(), false);
}

Unsupported supports_piecewise_backward(const PiecewiseBackwardProblem& problem) {
  return supports_backward(problem.near);
}

void piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context) {
  piecewise_backward(problem, context, nullptr);
}

void piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context,
                        GradientKernels gradients) {
  const DeviceGuard guard(problem.near.forward.device.index);
  const PiecewiseProblem forward{problem.near.forward, problem.far};
  BackwardProblem near = problem.near, far = problem.near;
  near.forward = near_part(forward);
  near.dsinks = nullptr;  // of all keys: once
  far.forward = far_part(forward);
  far.dq = problem.dq_far;
  far.dk = problem.dk_far;
  BackwardCall near_call(near, context, gradients), far_call(far, context, gradients);
  const BackwardCall::Memory memory = near_call.memory();
  near_call.run(memory, false);
  far_call.run(memory, true);
}

}  // namespace onepass::cuda
