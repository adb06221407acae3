// cpu/total_attention.cpp: total[key] = Σ_query e^(logit − lse), keys outer: a task owns some keys of one query head
// and goes through the queries, so nothing is added atomically and the order of sums is fixed.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/total_attention.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, which includes this file once for every tier.
#include <hwy/highway.h>

#include "core/half.h"
#include "core/piecewise.h"
#include "cpu/segments-inl.h"
#include "cpu/workers.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
namespace {

constexpr std::int64_t kTaskBlocks = 4;  // key blocks of a task: they share the transposition of a panel of queries

struct ColumnScratch {
  Panel panel;
  KeyBlock blocks[kTaskBlocks];
  float* scores;        // [keys][width]
  float* tile_maximum;  // [width], not used
  float* lse;           // [width]
  float* columns;       // [kTaskBlocks·keys][lanes]: sums over panels, not yet over lanes
  float* staging;
  float* bias_staging;

  ColumnScratch(Arena arena, const Problem& problem, const PanelShape& shape) { take(arena, problem, shape); }
  static std::size_t bytes(const Problem& problem, const PanelShape& shape) {
    Arena arena;
    ColumnScratch(arena).take(arena, problem, shape);
    return arena.used();
  }

 private:
  explicit ColumnScratch(const Arena&) {}
  void take(Arena& arena, const Problem& problem, const PanelShape& shape) {
    panel.take(arena, problem, shape);
    for (KeyBlock& block : blocks) block.take_keys(arena, problem, shape);
    scores = arena.take<float>(shape.keys * shape.width);
    tile_maximum = arena.take<float>(shape.width);
    lse = arena.take<float>(shape.width);
    columns = arena.take<float>(kTaskBlocks * shape.keys * lane_count());
    staging = arena.take<float>(lane_count() * lane_count());
    bias_staging = problem.bias ? arena.take<float>(bias_staging_size(shape.keys)) : nullptr;
  }
};

// columns[key][·] += e^(unit·score − lse) of every vector of lanes; lanes past the panel's rows have lse +inf. A hidden
// score (−inf) weighs nothing also in a row whose lse is NaN.
void add_columns(const ScoreTile& tile, float unit, const float* lse, float* columns) {
  const FloatTag f;
  const std::int64_t lanes = lane_count();
  const Floats scale = hn::Set(f, unit), log2e = hn::Set(f, kLog2E), hidden = hn::Set(f, -kInfinity);
  for (std::int64_t k = 0; k < tile.keys; ++k) {
    Floats total = hn::Load(f, columns + k * lanes);
    for (std::int64_t column = 0; column < tile.width; column += lanes) {
      const Floats s = hn::Load(f, tile.scores + k * tile.width + column);
      const Floats x = hn::Sub(hn::Mul(s, scale), hn::Load(f, lse + column));
      total = hn::Add(total, hn::IfThenZeroElse(hn::Eq(s, hidden), exp2_floats(hn::Mul(x, log2e))));
    }
    hn::Store(total, f, columns + k * lanes);
  }
}

// Loads the panel's LSEs. An empty row sees no key, so its weights must be 0: lse +inf.
void load_lse(const Problem& problem, const RowSet& rows, const Panel& panel, float* lse) {
  for (std::int64_t lane = 0; lane < panel.width; ++lane) {
    const std::int64_t row = panel.lanes.first_row + std::min(lane, panel.lanes.count - 1);
    const float value = problem.lse.at<float>(rows.batch, rows.head_of(row), rows.token_of(row));
    lse[lane] = lane >= panel.lanes.count || value == -kInfinity ? kInfinity : value;
  }
}

// Adds the weights of keys [first_key, end_key) to s.columns, over all rows.
template <class T>
void add_part(const Problem& problem, const ScoreTerms& terms, const RowSet& rows, std::int64_t first_key,
              std::int64_t end_key, const PanelShape& shape, ColumnScratch& s) {
  const std::int64_t blocks = (end_key - first_key + kBlockKeys - 1) / kBlockKeys, lanes = lane_count();
  for (std::int64_t b = 0; b < blocks; ++b) {
    const std::int64_t key = first_key + b * kBlockKeys;
    s.blocks[b].template fetch_keys<T>(problem, rows, key, std::min(kBlockKeys, end_key - key));
  }
  std::fill_n(s.tile_maximum, shape.width, 0.0f);
  for (std::int64_t row = 0; row < rows.size(); row += shape.width) {
    Panel& panel = s.panel;
    panel.width = padded(std::min(shape.width, rows.size() - row));
    panel.lanes.set(problem, rows, row, std::min(shape.width, rows.size() - row), panel.width);
    if (panel.lanes.sees_none(first_key, end_key - first_key)) continue;
    panel.load<T>(problem, rows, row, panel.lanes.count, terms.query_factor, s.staging);
    load_lse(problem, rows, panel, s.lse);
    for (std::int64_t b = 0; b < blocks; ++b) {
      const KeyBlock& block = s.blocks[b];
      if (panel.lanes.sees_none(block.first, block.count)) continue;
      const ScoreTile tile{s.scores, panel.width, block.first, block.count};
      const Segments segments(panel.lanes, panel.width, block.first, block.count);
      multiply_segments(block.k, panel.q, tile, segments, problem.head_dim, s.tile_maximum);
      finish_scores(problem, terms, tile, panel.lanes, s.tile_maximum, s.bias_staging);
      add_columns(tile, terms.unit(), s.lse, s.columns + (block.first - first_key) * lanes);
    }
  }
}

template <class T>
void sum_columns(Parts parts, const ScoreTerms& terms, const RowSet& rows, std::int64_t first_key,
                 const PanelShape& shape, ColumnScratch& s) {
  const std::int64_t end_key = std::min(rows.sequence.seqlen_k, first_key + kTaskBlocks * kBlockKeys);
  const std::int64_t lanes = lane_count();
  std::fill_n(s.columns, (end_key - first_key) * lanes, 0.0f);
  for (const Problem& part : parts) add_part<T>(part, terms, rows, first_key, end_key, shape, s);
  const FloatTag f;
  for (std::int64_t key = first_key; key < end_key; ++key) {
    const Floats sums = hn::Load(f, s.columns + (key - first_key) * lanes);
    parts[0].total_attention.at<float>(rows.batch, rows.first_head, rows.sequence.key_start + key) =
        hn::GetLane(hn::SumOfLanes(f, sums));
  }
}

constexpr std::int64_t kTaskKeys = kTaskBlocks * kBlockKeys;

// Tasks of one head.
std::int64_t chunks_of(const Problem& problem) { return (problem.seqlen_k + kTaskKeys - 1) / kTaskKeys; }

PanelShape shape_of(const Problem& problem) {
  return {
      .width = std::min(panel_width(), padded(std::max<std::int64_t>(1, problem.seqlen_q))),
      .panels = 1,
      .keys = std::clamp<std::int64_t>(problem.seqlen_k, 1, kBlockKeys),
      .dim = problem.head_dim,
      .dim_v = problem.head_dim_v,
  };
}

TaskSet tasks_tier(Parts parts) {
  const Problem& problem = parts[0];
  const std::int64_t planes = problem.batch * problem.num_heads;
  return {.count = planes * chunks_of(problem),
          .flops = 2.0 * double(planes) * double(problem.seqlen_q) * double(problem.seqlen_k * problem.head_dim),
          .scratch_bytes = ColumnScratch::bytes(problem, shape_of(problem))};
}

template <class T>
void total_typed(Parts parts, const Workers& workers) {
  const Problem& problem = parts[0];
  const ScoreTerms terms(problem);
  const PanelShape shape = shape_of(problem);
  const std::int64_t chunks = chunks_of(problem);
  workers.run([&](std::int64_t index, std::byte* memory) {
    const std::int64_t plane = index / chunks, head = plane % problem.num_heads;
    RowSet rows = group_rows(problem, plane / problem.num_heads, head / problem.group_size());
    rows.first_head = head;
    rows.heads = 1;
    const std::int64_t first_key = index % chunks * kTaskKeys;
    if (first_key >= rows.sequence.seqlen_k) return;
    ColumnScratch scratch(Arena(memory), problem, shape);
    sum_columns<T>(parts, terms, rows, first_key, shape, scratch);
  });
}

void total_tier(Parts parts, const Workers& workers) {
  with_float_type(parts[0].dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) total_typed<T>(parts, workers);
  });
}

}  // namespace
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cpu/isa.h"
#include "cpu/total_attention.h"

namespace onepass::cpu {
namespace {
HWY_EXPORT(tasks_tier);
HWY_EXPORT(total_tier);
}  // namespace

TotalAttention::TotalAttention(Parts parts, const ExecutionContext& context)
    : parts_(parts), workers_(context, dispatch(HWY_DISPATCH_TABLE(tasks_tier))(parts)) {}

void TotalAttention::run() const {
  dispatch(HWY_DISPATCH_TABLE(total_tier))(parts_, workers_);
  const Problem& problem = parts_[0];
  const KeyRange keys = unowned_keys(problem);
  for (std::int64_t head = 0; head < problem.num_heads; ++head) {
    for (std::int64_t j = keys.begin; j < keys.end; ++j) problem.total_attention.at<float>(0, head, j) = 0.0f;
  }
}

void total_attention(const Problem& problem, const ExecutionContext& context) {
  TotalAttention(Parts(&problem, 1), context).run();
}

}  // namespace onepass::cpu
#endif  // HWY_ONCE
