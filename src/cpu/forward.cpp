// cpu/forward.cpp: one task = a block of query rows of one (batch, key/value head). Its panels of rows share each block
// of keys while it is in cache:
//   for every key block: fetch K and V (halves are converted here, once for all panels)
//     for every panel that sees it: Sᵀ = K·Qᵀ → logits → weights → Oᵀ = Oᵀ·rescale + Vᵀ·Pᵀ
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which includes this file once for every tier.
#include <hwy/highway.h>

#include "core/half.h"
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
  Panel* panels;
  KeyBlock keys;
  float* scores;        // [keys][width]
  float* tile_maximum;  // [width]
  float* rescale;       // [width]
  float* staging;       // rows on their way to or from lanes
  float* bias_staging;
  float* finite_values;  // [keys][dim_v]

  Scratch(Arena arena, const Problem& problem, const PanelShape& shape) { take(arena, problem, shape); }
  static std::size_t bytes(const Problem& problem, const PanelShape& shape) {
    Arena arena;
    Scratch(arena).take(arena, problem, shape);
    return arena.used();
  }

 private:
  explicit Scratch(const Arena&) {}
  void take(Arena& arena, const Problem& problem, const PanelShape& shape) {
    panels = arena.take<Panel>(shape.panels);
    for (std::int64_t i = 0; i < shape.panels; ++i) {
      Panel panel;
      panel.take(arena, problem, shape);
      if (panels != nullptr) new (panels + i) Panel(panel);
    }
    keys.take(arena, problem, shape);
    scores = arena.take<float>(shape.keys * shape.width);
    tile_maximum = arena.take<float>(shape.width);
    rescale = arena.take<float>(shape.width);
    staging = arena.take<float>(lane_count() * lane_count());
    bias_staging = problem.bias ? arena.take<float>(bias_staging_size(shape.keys)) : nullptr;
    finite_values = arena.take<float>(shape.keys * shape.dim_v);
  }
};

void attend_tile(const Problem& problem, const ScoreTerms& terms, Panel& panel, KeySpan span, Scratch& s) {
  const KeyBlock& block = s.keys;
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
void forward_block(const Problem& problem, const ScoreTerms& terms, const RowBlock& block, std::int64_t head_kv,
                   std::int64_t width, Scratch& s) {
  const RowSet rows = group_rows(problem, block.batch, head_kv);
  const std::int64_t panels = (block.rows + width - 1) / width;
  std::int64_t begin = INT64_MAX, end = 0;
  for (std::int64_t i = 0; i < panels; ++i) {
    Panel& panel = s.panels[i];
    const std::int64_t first = block.first_row + i * width;
    const std::int64_t count = std::min(width, block.first_row + block.rows - first);
    panel.load<T>(problem, rows, first, count, terms.query_factor, s.staging);
    panel.clear(problem.head_dim_v);
    begin = std::min(begin, panel.lanes.min_begin);
    end = std::max(end, panel.lanes.max_end);
  }
  for (std::int64_t key = begin / kBlockKeys * kBlockKeys; key < end; key += kBlockKeys) {
    s.keys.fetch<T>(problem, rows, key, std::min(kBlockKeys, end - key));
    for (std::int64_t i = 0; i < panels; ++i) {
      Panel& panel = s.panels[i];
      const KeySpan span = seen_span(panel.lanes, key, s.keys.count);
      if (span.count <= 0) continue;
      attend_tile(problem, terms, panel, span, s);
    }
  }
  for (std::int64_t i = 0; i < panels; ++i) write_panel<T>(problem, terms, rows, s.panels[i], s);
}

template <class T>
void forward_typed(const Problem& problem, const ExecutionContext& context) {
  const ScoreTerms terms(problem);
  const PanelShape shape = shape_of(problem);
  const std::vector<RowBlock> blocks = schedule_rows(problem, problem.group_size(), problem.num_heads_kv, shape.width,
                                                     shape.width * shape.panels, executor_of(context).concurrency());
  double pairs = 0;
  for (const RowBlock& block : blocks) pairs += block.keys;
  const double flops = 2.0 * pairs * double(problem.num_heads_kv) * double(problem.head_dim + problem.head_dim_v);
  const auto count = static_cast<std::int64_t>(blocks.size()) * problem.num_heads_kv;
  run_tasks(context, count, flops, Scratch::bytes(problem, shape), [&](std::int64_t index, std::byte* memory) {
    Scratch scratch(Arena(memory), problem, shape);
    const RowBlock& block = blocks[static_cast<std::size_t>(index / problem.num_heads_kv)];
    forward_block<T>(problem, terms, block, index % problem.num_heads_kv, shape.width, scratch);
  });
}

void forward_tier(const Problem& problem, const ExecutionContext& context) {
  with_float_type(problem.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) forward_typed<T>(problem, context);
  });
}

}  // namespace
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cpu/few_rows.h"
#include "cpu/forward.h"
#include "cpu/isa.h"
#include "cpu/total_attention.h"

namespace onepass::cpu {
namespace {

HWY_EXPORT(forward_tier);

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Ragged tensors may be longer than their sequences: such rows are empty ones.
void write_unowned(const Problem& problem) {
  const KeyRange queries = unowned_queries(problem);
  for (std::int64_t head = 0; head < problem.num_heads; ++head) {
    for (std::int64_t i = queries.begin; i < queries.end; ++i) {
      with_float_type(problem.dtype,
                      [&]<class T>(T) { std::fill_n(problem.out.row<T>(0, head, i), problem.head_dim_v, T{}); });
      if (problem.lse) problem.lse.at<float>(0, head, i) = kMinusInfinity;
    }
  }
}

}  // namespace

Unsupported supports_forward(const Problem& problem) {
  if (problem.dtype == DType::kFloat64) return "dtype float64 (float32, float16 or bfloat16)";
  if (problem.seqlen_k + problem.seqlen_q > INT32_MAX) {
    return "seqlen_q + seqlen_k " + std::to_string(problem.seqlen_q + problem.seqlen_k) + " (at most 2147483647)";
  }
  return std::nullopt;
}

void forward(const Problem& problem, const ExecutionContext& context) {
  const auto run = has_few_rows(problem) ? forward_few_rows : dispatch(HWY_DISPATCH_TABLE(forward_tier));
  if (!problem.total_attention) {
    run(problem, context);
    return write_unowned(problem);
  }
  // The column sums are a second pass over the scores, from the LSE of the first.
  Problem with_lse = problem;
  const std::int64_t rows = problem.num_heads * problem.total_q;
  const Workspace lse(context, problem.device, problem.lse ? 0 : static_cast<std::size_t>(rows) * sizeof(float));
  if (!problem.lse) {
    with_lse.lse = {.data = lse.as<float>(),
                    .batch_stride = problem.ragged() ? 0 : problem.num_heads * problem.seqlen_q,
                    .head_stride = problem.ragged() ? problem.total_q : problem.seqlen_q};
  }
  run(with_lse, context);
  write_unowned(with_lse);
  total_attention(with_lse, context);
}

}  // namespace onepass::cpu
#endif  // HWY_ONCE
