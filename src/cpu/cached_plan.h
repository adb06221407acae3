// cpu/cached_plan.h: the tasks of a cached_attention call. A set of query rows of one (sequence, key/value head)
// attends to its keys in one part or in several, whose partial results are merged.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/cache_problem.h"
#include "cpu/lanes.h"

namespace onepass::cpu {

struct CachedTask {
  std::int64_t batch, head_kv;
  std::int64_t first_row, rows;  // of the RowSet
  std::int64_t begin, end;       // keys
  bool few_rows;                 // the decode kernel, else panels
  std::int64_t partial;          // index of its first row among the partial rows; −1: writes the output itself
  std::int64_t merge;            // that its part belongs to; −1 likewise
  std::int64_t scores;           // where its scores begin, when they are kept
  double cost;                   // keys, weighted by arithmetic
};

// A set of rows whose result lies in `parts` consecutive groups of partial rows.
struct CachedMerge {
  std::int64_t batch, head_kv, first_row, rows;
  std::int64_t partial, parts;
};

struct CachedPlan {
  std::vector<CachedTask> tasks;  // heaviest first
  std::vector<CachedMerge> merges;
  std::int64_t partial_rows = 0;
  double cost = 0;
};

struct CachedPlanShape {
  std::int64_t few_rows;                     // at most these go to the decode kernel
  std::int64_t panel_rows;                   // width of a panel
  std::int64_t max_rows;                     // of a task of panels
  std::int64_t few_rows_block, panel_block;  // keys: parts begin at multiples of them
  std::int64_t threads;
};

// A part below this many keys costs more in merging than it gives.
inline constexpr std::int64_t kMinPartKeys = 256;

inline RowSet row_set(const CachedProblem& problem, std::int64_t batch, std::int64_t head_kv) {
  const std::int64_t group = problem.attention.group_size();
  return {batch, head_kv, head_kv * group, group, sequence_of(problem, batch)};
}

// Keys that rows [first, first + count) see between them: both ends grow with the query.
inline KeyRange seen_by_rows(const Problem& problem, const RowSet& rows, std::int64_t first, std::int64_t count) {
  const std::int64_t length = rows.sequence.seqlen_k;
  const KeyRange low = visible_keys(problem, rows.sequence, rows.query_of(first));
  const KeyRange high = visible_keys(problem, rows.sequence, rows.query_of(first + count - 1));
  const std::int64_t begin = std::clamp<std::int64_t>(low.begin, 0, length);
  return {begin, std::clamp<std::int64_t>(high.end, begin, length)};
}

// Rows of one task. Panels: as many as leave every thread four tasks, a multiple of the panel.
inline std::int64_t rows_of_task(const CachedProblem& problem, const CachedPlanShape& shape, std::int64_t rows) {
  if (rows <= shape.few_rows || problem.prob_threshold > 0) return shape.few_rows;
  const std::int64_t all = problem.attention.total_q * problem.attention.num_heads;
  const std::int64_t wanted = shape.threads > 1 ? all / (4 * shape.threads) : shape.max_rows;
  return std::clamp(wanted / shape.panel_rows * shape.panel_rows, shape.panel_rows, shape.max_rows);
}

// Every set of rows with all its keys.
inline std::vector<CachedTask> whole_sets(const CachedProblem& problem, const CachedPlanShape& shape) {
  std::vector<CachedTask> sets;
  for (std::int64_t b = 0; b < problem.attention.batch; ++b) {
    const RowSet rows = row_set(problem, b, 0);
    const std::int64_t per_task = rows_of_task(problem, shape, rows.size());
    for (std::int64_t first = 0; first < rows.size(); first += per_task) {
      const std::int64_t count = std::min(per_task, rows.size() - first);
      const KeyRange keys = seen_by_rows(problem.attention, rows, first, count);
      // 16 rows take about as long to compute as their keys to read.
      const double cost = double(keys.end - keys.begin) * std::max(1.0, double(count) / 16.0);
      for (std::int64_t g = 0; g < problem.attention.num_heads_kv; ++g) {
        sets.push_back({b, g, first, count, keys.begin, keys.end, per_task == shape.few_rows, -1, -1, 0, cost});
      }
    }
  }
  return sets;
}

inline CachedPlan plan_cached(const CachedProblem& problem, const CachedPlanShape& shape) {
  CachedPlan plan;
  const std::vector<CachedTask> sets = whole_sets(problem, shape);
  for (const CachedTask& set : sets) plan.cost += set.cost;
  // Four tasks a thread even out their ends.
  const double cost_per_part = plan.cost / double(4 * shape.threads);
  for (const CachedTask& set : sets) {
    const std::int64_t block_keys = set.few_rows ? shape.few_rows_block : shape.panel_block;
    const std::int64_t first_block = set.begin / block_keys;
    const std::int64_t blocks = (set.end + block_keys - 1) / block_keys - first_block;
    std::int64_t parts = problem.num_splits;
    if (problem.keys_per_part > 0) {
      parts = (set.end - set.begin + problem.keys_per_part - 1) / problem.keys_per_part;
    } else if (parts == 0) {
      parts = shape.threads == 1 ? 1 : static_cast<std::int64_t>(std::lround(set.cost / std::max(1.0, cost_per_part)));
      parts = std::min(parts, (set.end - set.begin) / kMinPartKeys);
    }
    parts = std::clamp<std::int64_t>(parts, 1, std::max<std::int64_t>(1, blocks));
    // Weights are dropped relative to the row's largest, which all parts find first: then there is always a merge.
    if (parts == 1 && problem.prob_threshold == 0) {
      plan.tasks.push_back(set);
      continue;
    }
    plan.merges.push_back({set.batch, set.head_kv, set.first_row, set.rows, plan.partial_rows, parts});
    for (std::int64_t part = 0; part < parts; ++part) {
      CachedTask task = set;
      task.begin = std::max(set.begin, (first_block + blocks * part / parts) * block_keys);
      task.end = std::min(set.end, (first_block + blocks * (part + 1) / parts) * block_keys);
      task.partial = plan.partial_rows;
      task.merge = static_cast<std::int64_t>(plan.merges.size()) - 1;
      task.cost = set.cost / double(parts);
      plan.tasks.push_back(task);
      plan.partial_rows += set.rows;
    }
  }
  const auto heavier = [](const CachedTask& a, const CachedTask& b) { return a.cost > b.cost; };
  if (shape.threads > 1) std::stable_sort(plan.tasks.begin(), plan.tasks.end(), heavier);
  return plan;
}

}  // namespace onepass::cpu
