// cpu/append.cpp: a task stores some tokens of one sequence: all heads as floats, rotated, then scaled and cast.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/append.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which includes this file once for every tier.
#include <hwy/highway.h>

#include "cpu/quantize-inl.h"
#include "cpu/rotary.h"
#include "cpu/workers.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kTokensPerTask = 16;

// One of K and V.
struct Side {
  const Operand& source;
  const Operand& stored;
  const CacheScale& scale;
  std::int64_t dim;
};

// The scales of a token, and where those of (head, channel) are.
void write_scales(const KVStorage& cache, const Side& side, const float* rows, Slot slot) {
  const std::int64_t dim = side.dim;
  switch (cache.granularity) {
    case ScaleGranularity::kNone:
    case ScaleGranularity::kTensor: return;
    case ScaleGranularity::kToken:
      *side.scale.at(slot.block, 0, slot.offset) = scale_of(rows, cache.num_heads_kv * dim);
      return;
    case ScaleGranularity::kHead:
    case ScaleGranularity::kGroup: {
      const std::int64_t group = cache.granularity == ScaleGranularity::kHead ? dim : cache.group_channels;
      for (std::int64_t g = 0; g < cache.num_heads_kv; ++g) {
        float* const scales = side.scale.at(slot.block, g, slot.offset);
        for (std::int64_t d = 0; d < dim; d += group) scales[d / group] = scale_of(rows + g * dim + d, group);
      }
    }
  }
}

template <class T>
void write_rows(const KVStorage& cache, const Side& side, const float* rows, Slot slot) {
  const std::int64_t group = std::min(cache.group_channels, side.dim);
  for (std::int64_t g = 0; g < cache.num_heads_kv; ++g) {
    const float* const scales = side.scale ? side.scale.at(slot.block, g, slot.offset) : nullptr;
    T* const stored = side.stored.row<T>(slot.block, g, slot.offset);
    for (std::int64_t d = 0; d < side.dim; d += group) {
      quantize(rows + g * side.dim + d, group, scales ? scales[d / group] : 1.0f, stored + d);
    }
  }
}

// rows: num_heads_kv · dim floats.
void append_token(const AppendProblem& problem, const Side& side, const RotaryTable& rotary, std::int64_t b,
                  std::int64_t i, float* rows) {
  const KVStorage& cache = problem.cache;
  const std::int64_t position = cache.seqlens[b] + i;
  for (std::int64_t g = 0; g < cache.num_heads_kv; ++g) {
    float* const row = rows + g * side.dim;
    with_float_type(problem.dtype, [&]<class T>(T) {
      if constexpr (!std::is_same_v<T, double>) {
        convert_row(side.source.row<T>(b, g, problem.tokens.first(b) + i), side.dim, row);
      }
    });
    if (rotary) rotate_row(rotary, position - cache.start(b), row);
  }
  const Slot slot = cache.slot(b, position);
  write_scales(cache, side, rows, slot);
  with_cache_type(cache.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) write_rows<T>(cache, side, rows, slot);
  });
}

void append_tier(const AppendProblem& problem, const ExecutionContext& context) {
  const KVStorage& cache = problem.cache;
  const std::int64_t dims = cache.head_dim + cache.head_dim_v,
                     chunks = (problem.max_new + kTokensPerTask - 1) / kTokensPerTask;
  const std::int64_t row_floats = cache.num_heads_kv * std::max(cache.head_dim, cache.head_dim_v);
  const double flops = 30.0 * double(problem.total_new * cache.num_heads_kv * dims);
  run_tasks(
      context, cache.batch * chunks, flops, static_cast<std::size_t>(row_floats) * sizeof(float),
      [&](std::int64_t index, std::byte* memory) {
        float* const rows = reinterpret_cast<float*>(memory);
        const std::int64_t b = index / chunks, first = index % chunks * kTokensPerTask;
        const std::int64_t end = std::min(first + kTokensPerTask, problem.tokens.count(b));
        for (std::int64_t i = first; i < end; ++i) {
          append_token(problem, {problem.k_new, cache.k, cache.k_scale, cache.head_dim}, problem.rotary, b, i, rows);
          append_token(problem, {problem.v_new, cache.v, cache.v_scale, cache.head_dim_v}, {}, b, i, rows);
        }
      });
}

}  // namespace
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cpu/append.h"
#include "cpu/isa.h"

namespace onepass::cpu {
namespace {

HWY_EXPORT(append_tier);

}  // namespace

Unsupported supports_append(const AppendProblem& problem) {
  if (problem.dtype == DType::kFloat64) return "dtype float64 (float32, float16 or bfloat16)";
  if (problem.cache.dtype == DType::kFloat64) return "a float64 cache (float32, float16, bfloat16, int8 or float8)";
  return std::nullopt;
}

void append(const AppendProblem& problem, const ExecutionContext& context) {
  dispatch(HWY_DISPATCH_TABLE(append_tier))(problem, context);
  if (!problem.advance) return;
  for (std::int64_t b = 0; b < problem.cache.batch; ++b) {
    problem.cache.seqlens[b] += static_cast<std::int32_t>(problem.tokens.count(b));
  }
}

}  // namespace onepass::cpu
#endif  // HWY_ONCE
