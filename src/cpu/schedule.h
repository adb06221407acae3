// cpu/schedule.h: blocks of query rows as tasks, heaviest first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/lanes.h"

namespace onepass::cpu {

// Consecutive rows of one batch; every key/value head has the same ones.
struct RowBlock {
  std::int64_t batch;
  std::int64_t first_row, rows;
  double keys;  // that its rows see, summed: the block's share of the work
};

// Visible keys of rows [first, first + count) of a group, exact but for clamping at the ends: visibility is an interval
// whose ends move by at most one a query, so the mean of the outer rows is what is wanted of an estimate.
inline double estimate_keys(const Problem& problem, const RowSet& rows, std::int64_t first, std::int64_t count) {
  const auto size = [&](std::int64_t row) {
    const KeyRange keys = visible_keys(problem, rows.sequence, rows.query_of(row));
    return static_cast<double>(std::max<std::int64_t>(0, keys.end - keys.begin));
  };
  return 0.5 * static_cast<double>(count) * (size(first) + size(first + count - 1));
}

// Blocks of `width` to `max_rows` rows, multiples of `width` but for the last: as many rows as leave every thread four
// tasks. What a row computes does not depend on its block.
inline std::vector<RowBlock> schedule_rows(const Problem& problem, std::int64_t group, std::int64_t tasks_per_block,
                                           std::int64_t width, std::int64_t max_rows, std::int64_t threads) {
  std::int64_t all_rows = 0;
  for (std::int64_t b = 0; b < problem.batch; ++b) all_rows += sequence_of(problem, b).seqlen_q * group;
  const std::int64_t wanted = threads > 1 ? all_rows * tasks_per_block / (4 * threads) : max_rows;
  const std::int64_t rows_per_block = std::clamp(wanted / width * width, width, max_rows);

  std::vector<RowBlock> blocks;
  blocks.reserve(static_cast<std::size_t>(all_rows / rows_per_block + problem.batch));
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const RowSet rows{.batch = b, .heads = group, .sequence = sequence_of(problem, b)};
    for (std::int64_t first = 0; first < rows.size(); first += rows_per_block) {
      const std::int64_t count = std::min(rows_per_block, rows.size() - first);
      blocks.push_back({b, first, count, estimate_keys(problem, rows, first, count)});
    }
  }
  const auto heavier = [](const RowBlock& a, const RowBlock& b) { return a.keys > b.keys; };
  if (threads > 1) std::stable_sort(blocks.begin(), blocks.end(), heavier);
  return blocks;
}

}  // namespace onepass::cpu
