#include "cuda/common/scalar.cuh"
#include "cuda/device.h"
#include "cuda/portable/ragged.h"

namespace onepass::cuda {
namespace {

constexpr int kThreads = 256;

struct UnownedRows {
  const std::int32_t* cu_seqlens;
  std::int64_t batch, total, heads;
  Operand rows;
  std::int64_t dim;
  RowVector scalars;
  float scalar;
};

// Bits is an unsigned integer of the element's size: zero has the same bits in every float type.
template <class Bits>
__global__ void __launch_bounds__(kThreads) clear_kernel(const __grid_constant__ UnownedRows u) {
  const std::int64_t first = min(max(std::int64_t{u.cu_seqlens[u.batch]}, std::int64_t{0}), u.total);
  const std::int64_t rows = (u.total - first) * u.heads;
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads,
                     start = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (u.rows.data != nullptr) {
    for (std::int64_t i = start; i < rows * u.dim; i += step) {
      const std::int64_t row = i / u.dim;
      static_cast<Bits*>(
          u.rows.data)[row % u.heads * u.rows.head_stride + (first + row / u.heads) * u.rows.token_stride + i % u.dim] =
          0;
    }
  }
  if (u.scalars.data != nullptr) {
    for (std::int64_t row = start; row < rows; row += step) {
      static_cast<float*>(
          u.scalars.data)[row % u.heads * u.scalars.head_stride + (first + row / u.heads) * u.scalars.token_stride] =
          u.scalar;
    }
  }
}

void clear(const Problem& problem, const UnownedRows& unowned, const ExecutionContext& context) {
  if (unowned.total == 0 || unowned.heads == 0) return;
  // Usually there is no such row: a grid of one block a multiprocessor keeps the check cheap.
  const LaunchShape shape{device_info(problem.device.index).multiprocessors, kThreads};
  launch(problem.operation,
         problem.dtype == DType::kFloat32 ? clear_kernel<std::uint32_t> : clear_kernel<std::uint16_t>, shape,
         problem.device.index, context.stream, unowned);
}

}  // namespace

void clear_unowned_queries(const Problem& problem, const Operand& rows, std::int64_t dim, const RowVector& lse,
                           const ExecutionContext& context) {
  clear(problem, {problem.cu_seqlens_q, problem.batch, problem.total_q, problem.num_heads, rows, dim, lse, -kInfinity},
        context);
}

void clear_unowned_keys(const Problem& problem, const Operand& rows, std::int64_t dim,
                        const ExecutionContext& context) {
  clear(problem, {problem.cu_seqlens_k, problem.batch, problem.total_k, problem.num_heads_kv, rows, dim, {}, 0.0f},
        context);
}

void clear_unowned_total_attention(const Problem& problem, const ExecutionContext& context) {
  clear(problem,
        {problem.cu_seqlens_k, problem.batch, problem.total_k, problem.num_heads, {}, 0, problem.total_attention, 0.0f},
        context);
}

}  // namespace onepass::cuda
