// cpu/cached.cpp: one task = query rows of one (sequence, key/value head) over some of its keys. Few rows go to the
// decode kernel, more to the panels of the forward kernel, over key blocks that are dequantized once for all of them.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/cached.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which includes this file once for every tier.
#include <hwy/highway.h>

#include "core/float8.h"
#include "cpu/cached_panels-inl.h"
#include "cpu/decode_rows-inl.h"
#include "cpu/rotary.h"
#include "cpu/workers.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
namespace {

// ---- few rows

#if !HWY_HAVE_SCALABLE
// When weights are dropped, all parts find their largest scores before any reads values.
enum class Step : std::uint8_t { kScores, kAll };

// Scores of a task, and room for the keys whose values it reads.
std::int64_t score_floats(const CachedTask& task) { return decode_span(task) * (tile_rows(task.rows) + 1); }

float largest_of_parts(const CachedCall& call, const CachedTask& task, std::int64_t r) {
  const CachedMerge& merge = call.plan.merges[static_cast<std::size_t>(task.merge)];
  float largest = -kInfinity;
  for (std::int64_t i = 0; i < merge.parts; ++i) {
    largest = std::max(largest, call.maxima[merge.partial + i * merge.rows + r]);
  }
  return largest;
}

template <class T, int kRows>
void decode_rows(const CachedCall& call, const CachedTask& task, Step step, DecodeState& state) {
  DecodeTask<T, kRows> decode(call.problem, call.queries, call.terms, task, state);
  if (call.problem.prob_threshold == 0) {
    decode.run();
  } else {
    float* const scores = call.scores + task.scores;
    float* const maxima = call.maxima + task.partial;
    if (step == Step::kScores) return decode.run_scores(scores, maxima);
    float largest[kRows];
    for (std::int64_t r = 0; r < task.rows; ++r) largest[r] = largest_of_parts(call, task, r);
    decode.run_kept_values(scores, largest, reinterpret_cast<std::int32_t*>(scores + decode_span(task) * kRows));
  }
  const RowSet rows = row_set(call.problem, task.batch, task.head_kv);
  for (std::int64_t r = 0; r < task.rows; ++r) {
    if (task.partial >= 0) {
      float* const partial = call.partials + (task.partial + r) * call.partial_stride();
      partial[0] = state.maximum[r];
      partial[1] = state.sum[r];
      decode.read_row(r, 1.0f, partial + 2);
    } else {
      const float factor = finish(call, rows, task.first_row + r, state.maximum[r], state.sum[r]);
      decode.read_row(r, factor, state.staging);
      store_out(call, rows, task.first_row + r, state.staging);
    }
  }
}

template <class T>
void decode_task(const CachedCall& call, const CachedTask& task, Step step, DecodeState& state) {
  const std::int64_t rows = tile_rows(task.rows);
  if (rows == 1) return decode_rows<T, 1>(call, task, step, state);
  if (rows == kLanes) return decode_rows<T, kLanes>(call, task, step, state);
  if (rows == kLanes / 2) return decode_rows<T, kLanes / 2>(call, task, step, state);
  if constexpr (kLanes / 4 > 1) decode_rows<T, kLanes / 4>(call, task, step, state);
}
#endif

// ---- the call

// What softmax_tile would rescale a part by when the row's maximum rises to `largest`. A part whose scores are all NaN
// has the maximum −inf, and a sum that stays NaN.
float weight_of_part(float maximum, float largest, float unit) {
  if (maximum == largest || maximum == -kInfinity) return 1.0f;
  const float exponent = unit * kLog2E, scaled = largest * exponent;
  return std::exp2(std::fabs(scaled) < kFusedLimit ? maximum * exponent - scaled : (maximum - largest) * exponent);
}

// Parts without a visible key have sum 0 and weigh nothing.
void merge_row(const CachedCall& call, const CachedMerge& merge, std::int64_t r, float* values) {
  const RowSet rows = row_set(call.problem, merge.batch, merge.head_kv);
  const std::int64_t dim = call.attention().head_dim_v;
  const auto part = [&](std::int64_t i) {
    return call.partials + (merge.partial + i * merge.rows + r) * call.partial_stride();
  };
  float largest = -kInfinity, sum = 0.0f;
  for (std::int64_t i = 0; i < merge.parts; ++i) largest = std::max(largest, part(i)[0]);
  std::fill_n(values, dim, 0.0f);
  for (std::int64_t i = 0; i < merge.parts; ++i) {
    const float* const from = part(i);
    if (from[1] == 0.0f) continue;
    const float weight = weight_of_part(from[0], largest, call.terms.unit());
    sum += from[1] * weight;
    for (std::int64_t d = 0; d < dim; ++d) values[d] += from[2 + d] * weight;
  }
  const float factor = finish(call, rows, merge.first_row + r, largest, sum);
  for (std::int64_t d = 0; d < dim; ++d) values[d] *= factor;
  store_out(call, rows, merge.first_row + r, values);
}

std::int64_t element_bytes(const CachedProblem& problem) {
  return (problem.cache.head_dim + problem.cache.head_dim_v) * size_of(problem.cache.dtype);
}

// Arithmetic, or what the bytes read cost in terms of it (about 10 GB/s beside 100 GFLOP/s).
double flops_of(const CachedCall& call) {
  double flops = 0;
  for (const CachedTask& task : call.plan.tasks) {
    const auto keys = static_cast<double>(task.end - task.begin);
    const double arithmetic =
        2.0 * keys * double(task.rows) * double(call.attention().head_dim + call.attention().head_dim_v);
    flops += std::max(arithmetic, 10.0 * keys * double(element_bytes(call.problem)));
  }
  return flops;
}

template <class T>
void run_plan(const CachedCall& call, const ExecutionContext& context) {
  Arena panels_size;
  PanelState().take(panels_size, call.problem);
  std::size_t bytes = panels_size.used();
#if !HWY_HAVE_SCALABLE
  Arena decode_size;
  DecodeState().take(decode_size, call.problem);
  bytes = std::max(bytes, decode_size.used());
#endif
  const double flops = flops_of(call);
  const std::int64_t dim = call.attention().head_dim_v;
  // Both have their memory before either writes.
  const Workers attending(context, {static_cast<std::int64_t>(call.plan.tasks.size()), flops, bytes});
  const Workers merging(context,
                        {static_cast<std::int64_t>(call.plan.merges.size()), 4.0 * double(call.plan.partial_rows * dim),
                         static_cast<std::size_t>(dim) * sizeof(float)});
#if !HWY_HAVE_SCALABLE
  if (call.problem.prob_threshold > 0) {
    attending.run([&](std::int64_t index, std::byte* memory) {
      Arena arena(memory);
      DecodeState state;
      state.take(arena, call.problem);
      decode_task<T>(call, call.plan.tasks[static_cast<std::size_t>(index)], Step::kScores, state);
    });
  }
#endif
  attending.run([&](std::int64_t index, std::byte* memory) {
    const CachedTask& task = call.plan.tasks[static_cast<std::size_t>(index)];
    Arena arena(memory);
#if !HWY_HAVE_SCALABLE
    if (task.few_rows) {
      DecodeState state;
      state.take(arena, call.problem);
      return decode_task<T>(call, task, Step::kAll, state);
    }
#endif
    PanelState state;
    state.take(arena, call.problem);
    panel_task<T>(call, task, state);
  });
  merging.run([&](std::int64_t index, std::byte* memory) {
    const CachedMerge& merge = call.plan.merges[static_cast<std::size_t>(index)];
    for (std::int64_t r = 0; r < merge.rows; ++r) merge_row(call, merge, r, reinterpret_cast<float*>(memory));
  });
}

// Rotated queries as float32 (token, head, dim) rows; dense: batch after batch.
void rotate_queries(const CachedProblem& problem, const ExecutionContext& context, float* rotated, Problem& queries) {
  const Problem& p = problem.attention;
  const std::int64_t dim = p.head_dim;
  queries.dtype = DType::kFloat32;
  queries.q = {rotated, p.ragged() ? 0 : p.seqlen_q * p.num_heads * dim, dim, p.num_heads * dim};
  const double flops = 4.0 * double(p.total_q * p.num_heads * dim);
  run_tasks(context, p.batch, flops, 0, [&](std::int64_t b, std::byte*) {
    const Sequence s = sequence_of(problem, b);
    for (std::int64_t i = 0; i < s.seqlen_q; ++i) {
      for (std::int64_t h = 0; h < p.num_heads; ++h) {
        float* const row = queries.q.row<float>(b, h, s.query_start + i);
        with_float_type(p.dtype, [&]<class T>(T) {
          if constexpr (!std::is_same_v<T, double>) convert_row(p.q.row<T>(b, h, s.query_start + i), dim, row);
        });
        rotate_row(problem.rotary, i + s.diagonal - problem.cache.start(b), row);
      }
    }
  });
}

void cached_tier(const CachedProblem& problem, const ExecutionContext& context) {
  const Problem& p = problem.attention;
  const std::int64_t threads = std::max(1, executor_of(context).concurrency());
  CachedCall call{problem, p, ScoreTerms(p), {}, {}};
#if HWY_HAVE_SCALABLE
  call.shape = {0, panel_width(), panel_width() * kPanels, kBlockKeys, kBlockKeys, threads};
#else
  call.shape = {kLanes, panel_width(), panel_width() * kPanels, kDecodeKeys, kBlockKeys, threads};
#endif
  const std::size_t rotated_floats =
      problem.rotary ? static_cast<std::size_t>(p.total_q * p.num_heads * p.head_dim) : 0;
  const Workspace rotated(context, p.device, rotated_floats * sizeof(float));
  if (problem.rotary) rotate_queries(problem, context, rotated.as<float>(), call.queries);
  call.plan = plan_cached(problem, call.shape);
  const std::int64_t partials = padded(call.plan.partial_rows * call.partial_stride());
  std::int64_t maxima = 0, scores = 0;
#if !HWY_HAVE_SCALABLE
  if (problem.prob_threshold > 0) {
    maxima = padded(call.plan.partial_rows);
    for (CachedTask& task : call.plan.tasks) {
      task.scores = scores;
      scores += score_floats(task);
    }
  }
#endif
  const Workspace kept(context, p.device, static_cast<std::size_t>(partials + maxima + scores) * sizeof(float));
  call.partials = kept.as<float>();
  call.maxima = call.partials + partials;
  call.scores = call.maxima + maxima;
  with_cache_type(problem.cache.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) run_plan<T>(call, context);
  });
}

// The decode kernel, which alone knows prob_threshold, needs vectors of a fixed size.
bool has_decode_kernel() { return !HWY_HAVE_SCALABLE; }

}  // namespace
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cpu/cached.h"
#include "cpu/empty_rows.h"
#include "cpu/isa.h"

namespace onepass::cpu {
namespace {

HWY_EXPORT(cached_tier);
HWY_EXPORT(has_decode_kernel);

}  // namespace

Unsupported supports_cached(const CachedProblem& problem) {
  const Problem& p = problem.attention;
  if (p.dtype == DType::kFloat64) return "dtype float64 (float32, float16 or bfloat16)";
  if (problem.cache.dtype == DType::kFloat64) return "a float64 cache (float32, float16, bfloat16, int8 or float8)";
  if (p.seqlen_k + p.seqlen_q > INT32_MAX) {
    return "seqlen_q + seqlen_k " + std::to_string(p.seqlen_q + p.seqlen_k) + " (at most 2147483647)";
  }
  if (problem.prob_threshold > 0 && !dispatch(HWY_DISPATCH_TABLE(has_decode_kernel))()) {
    return "prob_threshold on a processor with scalable vectors";
  }
  return std::nullopt;
}

void cached(const CachedProblem& problem, const ExecutionContext& context) {
  dispatch(HWY_DISPATCH_TABLE(cached_tier))(problem, context);
  write_unowned_queries(problem.attention);
}

}  // namespace onepass::cpu
#endif  // HWY_ONCE
