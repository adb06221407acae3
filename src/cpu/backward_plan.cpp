#include "cpu/backward_plan.h"

#include <algorithm>

#include "core/sequence.h"
#include "cpu/workers.h"

namespace onepass::cpu {
namespace {

// Tasks a thread that even out unequal ones.
constexpr std::int64_t kTasksPerWorker = 4;
// Chunks that keep packing and the clearing of sums below a few percent.
constexpr std::int64_t kMinChunk = 256;

// Axes along which tasks add to one element of dbias. Cells of grids are in sequence along one axis at a time, so with
// two or more only whole units, one after the other, keep the order of the addends; but when the axes are units and the
// heads of a group, a cell may hold all those heads.
struct BiasSharing {
  bool units, heads, queries, keys;
  std::int64_t chains;  // of units that share nothing with each other

  explicit BiasSharing(const BackwardProblem& problem) {
    const Problem& f = problem.forward;
    const BiasOperand& b = problem.dbias;
    const bool given = static_cast<bool>(b), all_heads = given && b.head_stride == 0 && f.num_heads > 1;
    units = given && ((b.batch_stride == 0 && f.batch > 1) || (all_heads && f.num_heads_kv > 1));
    heads = all_heads && f.group_size() > 1;
    queries = given && b.query_stride == 0 && f.seqlen_q > 1;
    keys = given && b.key_stride == 0 && f.seqlen_k > 1;
    chains = (given && b.batch_stride == 0 ? 1 : f.batch) * (all_heads ? 1 : f.num_heads_kv);
  }
  bool can_split() const { return units + (heads || queries) + keys <= 1; }
  bool can_split_with_all_heads() const { return units && heads && !queries && !keys; }
};

double flops(const Problem& problem, const BackwardUnit& unit) {
  const Sequence& s = unit.sequence;
  auto keys = static_cast<double>(s.seqlen_k);
  if (problem.window_right != kUnbounded && problem.window_left != kUnbounded) {
    keys = std::min(keys, static_cast<double>(problem.window_left + problem.window_right + 1));
  }
  return static_cast<double>(problem.group_size() * s.seqlen_q) * keys *
         static_cast<double>(6 * problem.head_dim + 4 * problem.head_dim_v);
}

}  // namespace

BackwardPlan::BackwardPlan(const BackwardProblem& problem, std::int64_t parts, int concurrency)
    : problem_(problem), parts_(parts) {
  const Problem& f = problem.forward;
  double total = 0;
  for (std::int64_t batch = 0; batch < f.batch; ++batch) {
    const Sequence sequence = sequence_of(f, batch);
    for (std::int64_t head = 0; head < f.num_heads_kv; ++head) {
      units_.push_back({.batch = batch, .head_kv = head, .sequence = sequence});
      total += flops(f, units_.back());
    }
  }
  if (total < kSerialFlops) return;
  if (f.ragged()) {  // the heaviest first
    std::stable_sort(units_.begin(), units_.end(),
                     [&](const BackwardUnit& a, const BackwardUnit& b) { return flops(f, a) > flops(f, b); });
  }
  choose_split(concurrency);
}

void BackwardPlan::choose_split(int concurrency) {
  const Problem& f = problem_.forward;
  const BiasSharing sharing(problem_);
  if (sharing.can_split_with_all_heads()) {  // chunks of a fixed size: they decide the order of addends to dK and dV
    split_ = all_heads_ = true;
    workers_ = concurrency;
    query_chunk_ = key_chunk_ = kMinChunk;
    return place_sums();
  }
  const std::int64_t chains = std::max<std::int64_t>(1, sharing.chains);
  const bool balanced = !f.ragged() && chains % concurrency == 0;
  const bool enough = chains >= kTasksPerWorker * concurrency;
  // An element of dbias that many pairs share gets addends from both parts, in an order that a cut would change.
  const bool parts_share = parts_ > 1 && (sharing.queries || sharing.keys);
  split_ = concurrency > 1 && !balanced && !enough && sharing.can_split() && !parts_share;
  workers_ = split_ ? concurrency : std::min<std::int64_t>(chains, concurrency);
  if (!split_) return;
  const std::int64_t wanted = (kTasksPerWorker * concurrency + chains - 1) / chains;  // cells of an anti-diagonal
  const std::int64_t chunks = (wanted + f.group_size() - 1) / f.group_size();
  query_chunk_ = std::max(kMinChunk, round_up((f.seqlen_q + chunks - 1) / chunks, kPanel));
  key_chunk_ = std::max(kMinChunk, round_up((f.seqlen_k + wanted - 1) / wanted, kBlock));
  place_sums();
}

void BackwardPlan::place_sums() {
  const Problem& f = problem_.forward;
  const auto take = [&](std::int64_t floats) {
    const std::int64_t offset = shared_floats_;
    shared_floats_ += round_up(floats, Arena::kAlignment / sizeof(float));
    return offset;
  };
  for (BackwardUnit& unit : units_) {
    unit.dv = take(unit.sequence.seqlen_k * sum_stride(f.head_dim_v));
    for (std::int64_t part = 0; part < parts_; ++part) {
      unit.dk[part] = take(unit.sequence.seqlen_k * sum_stride(f.head_dim));
      unit.dq[part] = take(f.group_size() * round_up(unit.sequence.seqlen_q, kPanel) * sum_stride(f.head_dim));
    }
  }
}

std::int64_t BackwardPlan::query_chunks(const BackwardUnit& unit) const {
  return std::max<std::int64_t>(1, (unit.sequence.seqlen_q + query_chunk_ - 1) / query_chunk_);
}

std::int64_t BackwardPlan::key_chunks(const BackwardUnit& unit) const {
  return std::max<std::int64_t>(1, (unit.sequence.seqlen_k + key_chunk_ - 1) / key_chunk_);
}

std::vector<Grid> BackwardPlan::grids() const {
  const Problem& f = problem_.forward;
  const BiasOperand& dbias = problem_.dbias;
  std::vector<Grid> grids;
  std::vector<std::int64_t> last(BiasSharing(problem_).units ? f.batch * f.num_heads_kv : 0, -1);
  for (const BackwardUnit& unit : units_) {
    Grid grid;
    if (split_) grid = {.rows = heads_of_grid() * query_chunks(unit), .columns = key_chunks(unit)};
    if (!last.empty()) {
      const std::int64_t batch = dbias.batch_stride == 0 ? 0 : unit.batch;
      std::int64_t& predecessor = last[batch * f.num_heads_kv + (dbias.head_stride == 0 ? 0 : unit.head_kv)];
      grid.after = predecessor;
      predecessor = static_cast<std::int64_t>(grids.size());
    }
    grids.push_back(grid);
  }
  return grids;
}

std::int64_t BackwardPlan::worker_floats() const {
  const Problem& f = problem_.forward;
  return split_ ? 0 : f.seqlen_k * (parts_ * sum_stride(f.head_dim) + sum_stride(f.head_dim_v));
}

BackwardTask BackwardPlan::head_task(const BackwardUnit& unit, std::int64_t head_in_group, std::int64_t part,
                                     float* own) const {
  const Problem& f = problem_.forward;
  const std::int64_t dk_floats = f.seqlen_k * sum_stride(f.head_dim);
  return {.batch = unit.batch,
          .head = unit.head_kv * f.group_size() + head_in_group,
          .sequence = unit.sequence,
          .query_end = unit.sequence.seqlen_q,
          .key_end = unit.sequence.seqlen_k,
          .first_queries = head_in_group == 0,
          .last_queries = head_in_group == f.group_size() - 1,
          .part = part,
          .first_part = part == 0,
          .last_part = part == parts_ - 1,
          .dk = own + part * dk_floats,
          .dv = own + parts_ * dk_floats};
}

BackwardTask BackwardPlan::cell_task(const BackwardUnit& unit, const Cell& cell, std::int64_t head_in_cell,
                                     std::int64_t part, float* shared) const {
  const Problem& f = problem_.forward;
  const std::int64_t rows = query_chunks(unit), columns = key_chunks(unit);
  const std::int64_t head_in_group = all_heads_ ? head_in_cell : cell.row / rows, chunk = cell.row % rows;
  const std::int64_t seqlen_q = unit.sequence.seqlen_q, seqlen_k = unit.sequence.seqlen_k;
  return {.batch = unit.batch,
          .head = unit.head_kv * f.group_size() + head_in_group,
          .sequence = unit.sequence,
          .query_begin = chunk * query_chunk_,
          .query_end = std::min(seqlen_q, (chunk + 1) * query_chunk_),
          .key_begin = cell.column * key_chunk_,
          .key_end = std::min(seqlen_k, (cell.column + 1) * key_chunk_),
          .first_queries = cell.row == 0 && head_in_cell == 0,
          .last_queries = cell.row == heads_of_grid() * rows - 1 && head_in_cell == heads_of_cell() - 1,
          .first_keys = cell.column == 0,
          .last_keys = cell.column == columns - 1,
          .part = part,
          .first_part = part == 0,
          .last_part = part == parts_ - 1,
          .dk = shared + unit.dk[part],
          .dv = shared + unit.dv,
          .dq = shared + unit.dq[part] + head_in_group * round_up(seqlen_q, kPanel) * sum_stride(f.head_dim)};
}

}  // namespace onepass::cpu
