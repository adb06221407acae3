// cpu/cached.cpp: one task = query rows of one (sequence, key/value head) over some of its keys. Few rows go to the
// decode kernel, more to the panels of the forward kernel, over key blocks that are dequantized once for all of them.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/cached.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which includes this file once for every tier.
#include <hwy/highway.h>

#include "core/float8.h"
#include "cpu/cached_plan.h"
#include "cpu/decode_rows-inl.h"
#include "cpu/dropout-inl.h"
#include "cpu/panel-inl.h"
#include "cpu/rotary.h"
#include "cpu/values-inl.h"
#include "cpu/workers.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kPanels = 4;  // that share a key block

// One call: the problem, and queries that may have been rotated into float32.
struct CachedCall {
  const CachedProblem& problem;
  Problem queries;
  ScoreTerms terms;
  CachedPlanShape shape;
  CachedPlan plan;
  float* partials = nullptr;  // rows of partial_stride floats: maximum, sum, then the undivided output

  const Problem& attention() const { return problem.attention; }
  std::int64_t partial_stride() const { return 2 + attention().head_dim_v; }
};

float sink_of(const Problem& problem, std::int64_t head) {
  float sink = 0.0f;
  with_float_type(problem.sinks_dtype,
                  [&]<class S>(S) { sink = static_cast<float>(to_float(static_cast<const S*>(problem.sinks)[head])); });
  return sink;
}

// What a row comes to: its LSE is written, the factor of its undivided output returned.
float finish(const CachedCall& call, const RowSet& rows, std::int64_t row, float maximum, float sum) {
  const Problem& problem = call.attention();
  const float sink = problem.sinks != nullptr ? sink_of(problem, rows.head_of(row)) : 0.0f;
  const RowResult result = finish_row(maximum, sum, call.terms.unit(), problem.sinks != nullptr ? &sink : nullptr);
  if (problem.lse) problem.lse.at<float>(rows.batch, rows.head_of(row), rows.token_of(row)) = result.lse;
  return result.factor * static_cast<float>(1.0 / (1.0 - problem.dropout_p));
}

void store_out(const CachedCall& call, const RowSet& rows, std::int64_t row, const float* values) {
  with_float_type(call.attention().dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) {
      T* const out = call.attention().out.row<T>(rows.batch, rows.head_of(row), rows.token_of(row));
      store_row(values, call.attention().head_dim_v, out);
    }
  });
}

// ---- few rows

#if !HWY_HAVE_SCALABLE
template <class T, int kRows>
void decode_rows(const CachedCall& call, const CachedTask& task, DecodeState& state) {
  DecodeTask<T, kRows> decode(call.problem, call.queries, call.terms, task, state);
  decode.run();
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
void decode_task(const CachedCall& call, const CachedTask& task, DecodeState& state) {
  const std::int64_t rows = tile_rows(task.rows);
  if (rows == 1) return decode_rows<T, 1>(call, task, state);
  if (rows == kLanes) return decode_rows<T, kLanes>(call, task, state);
  if (rows == kLanes / 2) return decode_rows<T, kLanes / 2>(call, task, state);
  if constexpr (kLanes / 4 > 1) decode_rows<T, kLanes / 4>(call, task, state);
}
#endif

// ---- panels

struct PanelState {
  Panel panels[kPanels];
  float* k_floats;  // [key][row stride]
  float* v_floats;
  float* scores;        // [key][width]
  float* tile_maximum;  // [width]
  float* rescale;
  float* staging;
  float* bias_staging;
  float* finite_values;  // [key][dim_v]

  void take(Arena& arena, const CachedProblem& problem) {
    const Problem& p = problem.attention;
    const PanelShape shape{panel_width(), kPanels, kBlockKeys, p.head_dim, p.head_dim_v};
    for (Panel& panel : panels) panel.take(arena, p, shape);
    k_floats = arena.take<float>(kBlockKeys * KeyBlock::row_stride(p.head_dim));
    v_floats = arena.take<float>(kBlockKeys * KeyBlock::row_stride(p.head_dim_v));
    scores = arena.take<float>(kBlockKeys * shape.width);
    tile_maximum = arena.take<float>(shape.width);
    rescale = arena.take<float>(shape.width);
    staging = arena.take<float>(lane_count() * lane_count());
    bias_staging = p.bias ? arena.take<float>(bias_staging_size(kBlockKeys)) : nullptr;
    finite_values = arena.take<float>(kBlockKeys * p.head_dim_v);
  }
};

// Keys [first, first + count) of one of K and V as floats. Floats that lie evenly are read in place.
template <class T>
Broadcast fetch(const KVStorage& cache, const CacheReader<T>& reader, const Operand& operand, const CacheScale& scale,
                std::int64_t dim, std::int64_t first, std::int64_t count, float* floats) {
  if constexpr (std::is_same_v<T, float>) {
    if (!cache.paged()) return {reader.row(operand, first), operand.token_stride};
  }
  const bool groups = cache.granularity == ScaleGranularity::kGroup;
  const std::int64_t stride = KeyBlock::row_stride(dim);
  for (std::int64_t i = 0; i < count; ++i) {
    const float* scales = scale ? reader.group_scales(scale, first + i) : nullptr;
    dequantize_row(reader.row(operand, first + i), dim, scales, groups ? cache.group_channels : dim,
                   floats + i * stride);
  }
  return {floats, stride};
}

void attend_panel(const CachedCall& call, Panel& panel, KeySpan span, std::int64_t first_key, Broadcast k, Broadcast v,
                  PanelState& s) {
  const Problem& problem = call.attention();
  const std::int64_t skipped = span.first - first_key;
  k.data += skipped * k.stride;
  v.data += skipped * v.stride;
  const ScoreTile tile{s.scores, panel.width, span.first, span.count};
  const Segments segments(panel.lanes, panel.width, span.first, span.count);
  std::fill_n(s.tile_maximum, panel.width, -kInfinity);
  multiply_segments(k, panel.q, tile, segments, problem.head_dim, s.tile_maximum);
  finish_scores(problem, call.terms, tile, panel.lanes, s.tile_maximum, s.bias_staging);
  softmax_tile(tile, call.terms.unit(), s.tile_maximum, panel.maximum, panel.sum, s.rescale);
  if (problem.dropout_p > 0) drop_weights(problem, tile, panel.lanes);
  add_values(v, tile, segments, panel.lanes, problem.head_dim_v, panel.out, s.rescale, s.finite_values);
}

// The part of a span inside [begin, end).
KeySpan clip(KeySpan span, std::int64_t begin, std::int64_t end) {
  const std::int64_t first = std::max(span.first, begin);
  return {first, std::max<std::int64_t>(0, std::min(span.first + span.count, end) - first)};
}

void write_panel(const CachedCall& call, const CachedTask& task, const RowSet& rows, Panel& panel, PanelState& s) {
  const Problem& problem = call.attention();
  const bool partial = task.partial >= 0;
  const auto partial_of = [&](std::int64_t lane) {
    return call.partials + (task.partial + panel.lanes.first_row + lane - task.first_row) * call.partial_stride();
  };
  float* const factors = s.rescale;
  for (std::int64_t lane = 0; lane < panel.lanes.count; ++lane) {
    if (partial) {
      partial_of(lane)[0] = panel.maximum[lane];
      partial_of(lane)[1] = panel.sum[lane];
      factors[lane] = 1.0f;
    } else {
      factors[lane] = finish(call, rows, panel.lanes.first_row + lane, panel.maximum[lane], panel.sum[lane]);
    }
    if (panel.sum[lane] != 0.0f) continue;  // empty: 0 even where hidden weights met values that are not finite
    for (std::int64_t d = 0; d < problem.head_dim_v; ++d) panel.out[d * panel.width + lane] = 0.0f;
  }
  if (partial) {
    return unpack_panel<float>(
        panel.out, panel.width, factors, panel.lanes.count, problem.head_dim_v,
        [&](std::int64_t lane) { return partial_of(lane) + 2; }, s.staging);
  }
  with_float_type(problem.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) {
      const auto row_of = [&](std::int64_t lane) {
        const std::int64_t row = panel.lanes.first_row + lane;
        return problem.out.row<T>(rows.batch, rows.head_of(row), rows.token_of(row));
      };
      unpack_panel<T>(panel.out, panel.width, factors, panel.lanes.count, problem.head_dim_v, row_of, s.staging);
    }
  });
}

template <class T>
void panel_task(const CachedCall& call, const CachedTask& task, PanelState& s) {
  const Problem& problem = call.attention();
  const KVStorage& cache = call.problem.cache;
  const RowSet rows = row_set(call.problem, task.batch, task.head_kv);
  const std::int64_t width = panel_width(), panels = (task.rows + width - 1) / width;
  for (std::int64_t i = 0; i < panels; ++i) {
    const std::int64_t first = task.first_row + i * width;
    const std::int64_t count = std::min(width, task.first_row + task.rows - first);
    with_float_type(call.queries.dtype, [&]<class Q>(Q) {
      if constexpr (!std::is_same_v<Q, double>) {
        s.panels[i].load<Q>(call.queries, rows, first, count, call.terms.query_factor, s.staging);
      }
    });
    s.panels[i].clear(problem.head_dim_v);
  }
  const CacheReader<T> reader(cache, task.batch, task.head_kv);
  for (std::int64_t block = task.begin / kBlockKeys * kBlockKeys; block < task.end; block += kBlockKeys) {
    const std::int64_t first = std::max(block, task.begin), end = std::min(block + kBlockKeys, task.end);
    const Broadcast k = fetch(cache, reader, cache.k, cache.k_scale, cache.head_dim, first, end - first, s.k_floats);
    const Broadcast v = fetch(cache, reader, cache.v, cache.v_scale, cache.head_dim_v, first, end - first, s.v_floats);
    for (std::int64_t i = 0; i < panels; ++i) {
      Panel& panel = s.panels[i];
      const KeySpan span = clip(seen_span(panel.lanes, block, kBlockKeys), first, end);
      if (span.count <= 0) continue;
      attend_panel(call, panel, span, first, k, v, s);
    }
  }
  for (std::int64_t i = 0; i < panels; ++i) write_panel(call, task, rows, s.panels[i], s);
}

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
  std::int64_t max_keys = 0;
  for (const CachedTask& task : call.plan.tasks) max_keys = std::max(max_keys, task.end - task.begin);
  if (call.problem.prob_threshold == 0) max_keys = 0;
  Arena panels_size;
  PanelState().take(panels_size, call.problem);
  std::size_t bytes = panels_size.used();
#if !HWY_HAVE_SCALABLE
  Arena decode_size;
  DecodeState().take(decode_size, call.problem, max_keys);
  bytes = std::max(bytes, decode_size.used());
#endif
  const double flops = flops_of(call);
  const std::int64_t dim = call.attention().head_dim_v;
  // Both have their memory before either writes.
  const Workers attending(context, {static_cast<std::int64_t>(call.plan.tasks.size()), flops, bytes});
  const Workers merging(context,
                        {static_cast<std::int64_t>(call.plan.merges.size()), 4.0 * double(call.plan.partial_rows * dim),
                         static_cast<std::size_t>(dim) * sizeof(float)});
  attending.run([&](std::int64_t index, std::byte* memory) {
    const CachedTask& task = call.plan.tasks[static_cast<std::size_t>(index)];
    Arena arena(memory);
#if !HWY_HAVE_SCALABLE
    if (task.few_rows) {
      DecodeState state;
      state.take(arena, call.problem, max_keys);
      return decode_task<T>(call, task, state);
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
  const auto partial_floats = static_cast<std::size_t>(call.plan.partial_rows * call.partial_stride());
  const Workspace partials(context, p.device, partial_floats * sizeof(float));
  call.partials = partials.as<float>();
  with_cache_type(problem.cache.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) run_plan<T>(call, context);
  });
}

}  // namespace
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cpu/cached.h"
#include "cpu/isa.h"

namespace onepass::cpu {
namespace {

HWY_EXPORT(cached_tier);

// Rows of packed queries behind the last sequence are empty ones.
void write_unowned_rows(const Problem& problem) {
  const KeyRange queries = unowned_queries(problem);
  for (std::int64_t head = 0; head < problem.num_heads; ++head) {
    for (std::int64_t i = queries.begin; i < queries.end; ++i) {
      with_float_type(problem.dtype,
                      [&]<class T>(T) { std::fill_n(problem.out.row<T>(0, head, i), problem.head_dim_v, T{}); });
      if (problem.lse) problem.lse.at<float>(0, head, i) = -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace

Unsupported supports_cached(const CachedProblem& problem) {
  const Problem& p = problem.attention;
  if (p.dtype == DType::kFloat64) return "dtype float64 (float32, float16 or bfloat16)";
  if (problem.cache.dtype == DType::kFloat64) return "a float64 cache (float32, float16, bfloat16, int8 or float8)";
  if (p.seqlen_k + p.seqlen_q > INT32_MAX) {
    return "seqlen_q + seqlen_k " + std::to_string(p.seqlen_q + p.seqlen_k) + " (at most 2147483647)";
  }
  return std::nullopt;
}

void cached(const CachedProblem& problem, const ExecutionContext& context) {
  dispatch(HWY_DISPATCH_TABLE(cached_tier))(problem, context);
  write_unowned_rows(problem.attention);
}

}  // namespace onepass::cpu
#endif  // HWY_ONCE
