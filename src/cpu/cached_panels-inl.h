// cpu/cached_panels-inl.h: a task of many query rows over a cache: the panels of the forward kernel, over key blocks
// that are dequantized once for all of them.
#if defined(ONEPASS_CPU_CACHED_PANELS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_CACHED_PANELS_INL_H_
#undef ONEPASS_CPU_CACHED_PANELS_INL_H_
#else
#define ONEPASS_CPU_CACHED_PANELS_INL_H_
#endif

#include "cpu/cache_reader.h"
#include "cpu/cached_call-inl.h"
#include "cpu/dequant-inl.h"
#include "cpu/dropout-inl.h"
#include "cpu/panel-inl.h"
#include "cpu/values-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

inline constexpr std::int64_t kPanels = 4;  // that share a key block

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

inline void attend_panel(const CachedCall& call, Panel& panel, KeySpan span, std::int64_t first_key, Broadcast k,
                         Broadcast v, PanelState& s) {
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
inline KeySpan clip(KeySpan span, std::int64_t begin, std::int64_t end) {
  const std::int64_t first = std::max(span.first, begin);
  return {first, std::max<std::int64_t>(0, std::min(span.first + span.count, end) - first)};
}

inline void write_panel(const CachedCall& call, const CachedTask& task, const RowSet& rows, Panel& panel,
                        PanelState& s) {
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

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
