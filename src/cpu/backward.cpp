#include "cpu/backward.h"

#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "core/parallel.h"
#include "core/piecewise.h"
#include "cpu/backward_kernels.h"
#include "cpu/backward_plan.h"
#include "cpu/workers.h"

namespace onepass::cpu {
namespace {

// The workspace: O(seqlen), see docs/cpu-backward.md.
struct Memory {
  float* shared_sums;  // of a split plan
  std::vector<float*> worker_sums;
  std::vector<void*> scratch;
  std::size_t bytes;

  Memory(const BackwardProblem& problem, const BackwardPlan& plan, Arena arena) {
    const Problem& f = problem.forward;
    const auto scratch_bytes = static_cast<std::int64_t>(BackwardScratch::bytes(f));
    shared_sums = arena.take<float>(plan.shared_floats());
    for (std::int64_t worker = 0; worker < plan.workers(); ++worker) {
      worker_sums.push_back(arena.take<float>(plan.worker_floats()));
      scratch.push_back(arena.take<std::byte>(scratch_bytes));
    }
    bytes = arena.used();
  }
};

// Rows of ragged tensors that belong to no sequence get no gradient.
void clear_unowned(const Operand& gradient, std::int64_t element_size, std::int64_t heads, std::int64_t dim,
                   std::int64_t begin, std::int64_t end) {
  for (std::int64_t head = 0; head < heads; ++head) {
    for (std::int64_t token = begin; token < end; ++token) {
      const std::int64_t offset = head * gradient.head_stride + token * gradient.token_stride;
      std::memset(static_cast<std::byte*>(gradient.data) + offset * element_size, 0, dim * element_size);
    }
  }
}

void clear_unowned(const BackwardProblem& problem) {
  const Problem& f = problem.forward;
  if (!f.ragged()) return;
  const std::int64_t queries = f.cu_seqlens_q[f.batch], keys = f.cu_seqlens_k[f.batch], size = size_of(f.dtype);
  clear_unowned(problem.dq, size, f.num_heads, f.head_dim, queries, f.total_q);
  clear_unowned(problem.dk, size, f.num_heads_kv, f.head_dim, keys, f.total_k);
  clear_unowned(problem.dv, size, f.num_heads_kv, f.head_dim_v, keys, f.total_k);
}

// Elements of dbias as stored start at 0; tasks add to them.
void clear_bias_gradient(const BackwardProblem& problem) {
  const Problem& f = problem.forward;
  const BiasOperand& b = problem.dbias;
  if (!b) return;
  const auto stored = [](std::int64_t stride, std::int64_t size) { return stride == 0 ? 1 : size; };
  const std::int64_t batches = stored(b.batch_stride, f.batch), heads = stored(b.head_stride, f.num_heads);
  const std::int64_t rows = stored(b.query_stride, f.seqlen_q), columns = stored(b.key_stride, f.seqlen_k);
  for (std::int64_t plane = 0; plane < batches * heads; ++plane) {
    float* const at = static_cast<float*>(b.data) + plane / heads * b.batch_stride + plane % heads * b.head_stride;
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) at[i * b.query_stride + j * b.key_stride] = 0.0f;
    }
  }
}

}  // namespace

Unsupported supports_backward(const BackwardProblem& problem) {
  const Problem& f = problem.forward;
  if (f.dtype == DType::kFloat64) return "dtype float64 (float32, float16 or bfloat16)";
  return std::nullopt;
}

namespace {

// `problem` sees the keys of all parts, which are problems of their own over disjoint keys; dv is the sum over them.
void run_parts(const BackwardProblem& problem, std::span<const BackwardProblem> parts,
               const ExecutionContext& context) {
  const Problem& f = problem.forward;
  const BackwardKernels kernels = backward_kernels(f.dtype);
  Executor& executor = executor_of(context);
  const BackwardPlan plan(problem, static_cast<std::int64_t>(parts.size()), std::max(1, executor.concurrency()));
  const Memory measure(problem, plan, Arena());
  const Workspace workspace(context, f.device, measure.bytes);
  const Memory memory(problem, plan, Arena(workspace.as<std::byte>()));

  clear_unowned(problem);
  clear_bias_gradient(problem);
  if (problem.dsinks != nullptr) {
    const double flops = 2.0 * static_cast<double>(f.total_q * f.num_heads * f.head_dim_v);
    run_tasks(context, f.num_heads, flops, 0,
              [&](std::int64_t head, std::byte*) { kernels.sink_gradient(problem, head); });
  }
  run_grids(plan.grids(), plan.workers(), executor, [&](const Cell& cell, std::int64_t worker) {
    const FlushDenormals guard;
    plan.for_each_task(cell, memory.shared_sums, memory.worker_sums[worker], [&](const BackwardTask& task) {
      kernels.rectangle(parts[task.part], task, memory.scratch[worker]);
    });
  });
}

}  // namespace

void backward(const BackwardProblem& problem, const ExecutionContext& context) {
  run_parts(problem, std::span(&problem, 1), context);
}

Unsupported supports_piecewise_backward(const PiecewiseBackwardProblem& problem) {
  return supports_backward(problem.near);
}

void piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context) {
  const PiecewiseProblem forward{problem.near.forward, problem.far};
  BackwardProblem near = problem.near, far = problem.near;
  near.forward = near_part(forward);
  far.forward = far_part(forward);
  far.dq = problem.dq_far;
  far.dk = problem.dk_far;
  const BackwardProblem parts[] = {near, far};
  run_parts(problem.near, parts, context);
}

}  // namespace onepass::cpu
