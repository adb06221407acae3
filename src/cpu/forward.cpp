// cpu/forward.cpp: one task = a block of query rows of one (batch, key/value head). Its panels of rows share each block
// of keys while it is in cache:
//   for every key block: fetch K and V (halves are converted here, once for all panels)
//     for every panel that sees it: Sᵀ = K·Qᵀ → logits → weights → Oᵀ = Oᵀ·rescale + Vᵀ·Pᵀ
// The two parts of piecewise attention are two such attentions into one softmax: a block that the threshold cuts is met
// by both, the segments of each leaving out what the other scores.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which includes this file once for every tier.
#include <hwy/highway.h>

#include "core/half.h"
#include "core/piecewise.h"
#include "cpu/dropout-inl.h"
#include "cpu/panel-inl.h"
#include "cpu/schedule.h"
#include "cpu/softmax-inl.h"
#include "cpu/values-inl.h"
#include "cpu/workers.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kMaxRows = 512;  // that share a fetched key block; eight AVX-512 panels

PanelShape shape_of(const Problem& problem) {
  const std::int64_t rows = std::clamp<std::int64_t>(problem.seqlen_q * problem.group_size(), 1, kMaxRows);
  const std::int64_t width = std::min(panel_width(), padded(rows));
  return {
      .width = width,
      .panels = (rows + width - 1) / width,
      .keys = std::clamp<std::int64_t>(problem.seqlen_k, 1, kBlockKeys),
      .dim = problem.head_dim,
      .dim_v = problem.head_dim_v,
  };
}

// A worker's memory.
struct Scratch {
  Panel* panels[kMaxParts];  // of a part; those of the second share the softmax state of the first
  KeyBlock keys[kMaxParts];
  float* scores;        // [keys][width]
  float* tile_maximum;  // [width]
  float* rescale;       // [width]
  float* staging;       // rows on their way to or from lanes
  float* bias_staging;
  float* finite_values;  // [keys][dim_v]

  Scratch(Arena arena, Parts parts, const PanelShape& shape) { take(arena, parts, shape); }
  static std::size_t bytes(Parts parts, const PanelShape& shape) {
    Arena arena;
    Scratch(arena).take(arena, parts, shape);
    return arena.used();
  }

 private:
  explicit Scratch(const Arena&) {}
  void take(Arena& arena, Parts parts, const PanelShape& shape) {
    const Problem& problem = parts[0];
    for (std::size_t part = 0; part < parts.size(); ++part) {
      panels[part] = arena.take<Panel>(shape.panels);
      for (std::int64_t i = 0; i < shape.panels; ++i) take_panel(arena, parts[part], shape, part, i);
      keys[part].take_keys(arena, parts[part], shape);
    }
    keys[0].take_values(arena, problem, shape);
    scores = arena.take<float>(shape.keys * shape.width);
    tile_maximum = arena.take<float>(shape.width);
    rescale = arena.take<float>(shape.width);
    staging = arena.take<float>(lane_count() * lane_count());
    bias_staging = problem.bias ? arena.take<float>(bias_staging_size(shape.keys)) : nullptr;
    finite_values = arena.take<float>(shape.keys * shape.dim_v);
  }

  void take_panel(Arena& arena, const Problem& problem, const PanelShape& shape, std::size_t part, std::int64_t i) {
    const bool measuring = panels[part] == nullptr;
    Panel panel;
    if (part == 0) {
      panel.take(arena, problem, shape);
    } else {
      if (!measuring) panel = panels[0][i];
      panel.take_queries(arena, problem, shape);
    }
    if (!measuring) new (panels[part] + i) Panel(panel);
  }
};

void attend_tile(const Problem& problem, const ScoreTerms& terms, Panel& panel, const KeyBlock& block, KeySpan span,
                 Scratch& s) {
  const std::int64_t skipped = span.first - block.first;
  const Broadcast k{block.k.data + skipped * block.k.stride, block.k.stride};
  const Broadcast v{block.v.data + skipped * block.v.stride, block.v.stride};
  const ScoreTile tile{s.scores, panel.width, span.first, span.count};
  const Segments segments(panel.lanes, panel.width, span.first, span.count);

  std::fill_n(s.tile_maximum, panel.width, -kInfinity);
  multiply_segments(k, panel.q, tile, segments, problem.head_dim, s.tile_maximum);
  finish_scores(problem, terms, tile, panel.lanes, s.tile_maximum, s.bias_staging);
  softmax_tile(tile, terms.unit(), s.tile_maximum, panel.maximum, panel.sum, s.rescale);
  if (problem.dropout_p > 0) drop_weights(problem, tile, panel.lanes);
  add_values(v, tile, segments, panel.lanes, problem.head_dim_v, panel.out, s.rescale, s.finite_values);
}

template <class T>
void write_panel(const Problem& problem, const ScoreTerms& terms, const RowSet& rows, Panel& panel, Scratch& s) {
  const auto survivors = static_cast<float>(1.0 / (1.0 - problem.dropout_p));
  float* const factors = s.rescale;
  for (std::int64_t lane = 0; lane < panel.lanes.count; ++lane) {
    const std::int64_t row = panel.lanes.first_row + lane, head = rows.head_of(row);
    float sink = 0.0f;
    if (problem.sinks != nullptr) {
      with_float_type(problem.sinks_dtype,
                      [&]<class S>(S) { sink = float(to_float(static_cast<const S*>(problem.sinks)[head])); });
    }
    const RowResult result =
        finish_row(panel.maximum[lane], panel.sum[lane], terms.unit(), problem.sinks != nullptr ? &sink : nullptr);
    if (problem.lse) problem.lse.at<float>(rows.batch, head, rows.token_of(row)) = result.lse;
    factors[lane] = result.factor * survivors;
    if (panel.sum[lane] == 0.0f) {  // empty: 0 even where hidden weights met values that are not finite
      for (std::int64_t d = 0; d < problem.head_dim_v; ++d) panel.out[d * panel.width + lane] = 0.0f;
    }
  }
  const auto row_of = [&](std::int64_t lane) {
    const std::int64_t row = panel.lanes.first_row + lane;
    return problem.out.row<T>(rows.batch, rows.head_of(row), rows.token_of(row));
  };
  unpack_panel<T>(panel.out, panel.width, factors, panel.lanes.count, problem.head_dim_v, row_of, s.staging);
}

template <class T>
void forward_block(Parts parts, const ScoreTerms& terms, const RowBlock& block, std::int64_t head_kv,
                   std::int64_t width, Scratch& s) {
  const RowSet rows = group_rows(parts[0], block.batch, head_kv);
  const std::int64_t panels = (block.rows + width - 1) / width;
  std::int64_t begin = INT64_MAX, end = 0;
  for (std::size_t part = 0; part < parts.size(); ++part) {
    for (std::int64_t i = 0; i < panels; ++i) {
      Panel& panel = s.panels[part][i];
      const std::int64_t first = block.first_row + i * width;
      const std::int64_t count = std::min(width, block.first_row + block.rows - first);
      panel.load<T>(parts[part], rows, first, count, terms.query_factor, s.staging);
      if (part == 0) panel.clear(parts[0].head_dim_v);
      begin = std::min(begin, panel.lanes.min_begin);
      end = std::max(end, panel.lanes.max_end);
    }
  }
  for (std::int64_t key = begin / kBlockKeys * kBlockKeys; key < end; key += kBlockKeys) {
    const std::int64_t keys = std::min(kBlockKeys, end - key);
    bool has_values = false;
    for (std::size_t part = 0; part < parts.size(); ++part) {
      KeyBlock& fetched = s.keys[part];
      bool has_keys = false;
      for (std::int64_t i = 0; i < panels; ++i) {
        Panel& panel = s.panels[part][i];
        const KeySpan span = seen_span(panel.lanes, key, keys);
        if (span.count <= 0) continue;
        if (!has_values) s.keys[0].fetch_values<T>(parts[0], rows, key, keys);
        if (!has_keys) fetched.fetch_keys<T>(parts[part], rows, key, keys);
        has_values = has_keys = true;
        fetched.v = s.keys[0].v;
        attend_tile(parts[part], terms, panel, fetched, span, s);
      }
    }
  }
  for (std::int64_t i = 0; i < panels; ++i) write_panel<T>(parts[0], terms, rows, s.panels[0][i], s);
}

// `problem` has the outputs, and sees the keys of all parts.
template <class T>
void forward_typed(const Problem& problem, Parts parts, const ExecutionContext& context) {
  const ScoreTerms terms(problem);
  const PanelShape shape = shape_of(problem);
  const std::vector<RowBlock> blocks = schedule_rows(problem, problem.group_size(), problem.num_heads_kv, shape.width,
                                                     shape.width * shape.panels, executor_of(context).concurrency());
  double pairs = 0;
  for (const RowBlock& block : blocks) pairs += block.keys;
  const double flops = 2.0 * pairs * double(problem.num_heads_kv) * double(problem.head_dim + problem.head_dim_v);
  const auto count = static_cast<std::int64_t>(blocks.size()) * problem.num_heads_kv;
  run_tasks(context, count, flops, Scratch::bytes(parts, shape), [&](std::int64_t index, std::byte* memory) {
    Scratch scratch(Arena(memory), parts, shape);
    const RowBlock& block = blocks[static_cast<std::size_t>(index / problem.num_heads_kv)];
    forward_block<T>(parts, terms, block, index % problem.num_heads_kv, shape.width, scratch);
  });
}

void forward_tier(const Problem& problem, Parts parts, const ExecutionContext& context) {
  with_float_type(problem.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) forward_typed<T>(problem, parts, context);
  });
}

}  // namespace
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <optional>

#include "core/with_lse.h"
#include "cpu/empty_rows.h"
#include "cpu/few_rows.h"
#include "cpu/forward.h"
#include "cpu/isa.h"
#include "cpu/total_attention.h"

namespace onepass::cpu {
namespace {

HWY_EXPORT(forward_tier);

}  // namespace

Unsupported supports_forward(const Problem& problem) {
  if (problem.dtype == DType::kFloat64) return "dtype float64 (float32, float16 or bfloat16)";
  if (problem.seqlen_k + problem.seqlen_q > INT32_MAX) {
    return "seqlen_q + seqlen_k " + std::to_string(problem.seqlen_q + problem.seqlen_k) + " (at most 2147483647)";
  }
  return std::nullopt;
}

void forward(const Problem& problem, const ExecutionContext& context) {
  const WithLse with_lse(problem, context);
  const Parts parts(&with_lse.problem(), 1);
  std::optional<TotalAttention> total;  // takes its memory before the first pass writes
  if (problem.total_attention) total.emplace(parts, context);
  if (has_few_rows(problem)) {
    forward_few_rows(with_lse.problem(), context);
  } else {
    dispatch(HWY_DISPATCH_TABLE(forward_tier))(problem, parts, context);
  }
  write_unowned_queries(with_lse.problem());
  if (total) total->run();
}

Unsupported supports_piecewise(const PiecewiseProblem& problem) { return supports_forward(problem.near); }

void piecewise(const PiecewiseProblem& problem, const ExecutionContext& context) {
  const WithLse with_lse(problem.near, context);
  const PiecewiseProblem complete{with_lse.problem(), problem.far};
  const Problem near_and_far[] = {near_part(complete), far_part(complete)};
  const Parts parts(near_and_far);
  std::optional<TotalAttention> total;
  if (problem.near.total_attention) total.emplace(parts, context);
  dispatch(HWY_DISPATCH_TABLE(forward_tier))(problem.near, parts, context);
  if (total) total->run();
}

}  // namespace onepass::cpu
#endif  // HWY_ONCE
