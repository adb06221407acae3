// cpu/lanes.h: which query rows lie along a panel's lanes, and what each of them sees.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/problem.h"
#include "core/sequence.h"
#include "cpu/arena.h"

namespace onepass::cpu {

// The query rows of one batch that share one key/value head (or some of those heads): row r is query r / heads of head
// first_head + r % heads. Neighbouring lanes then have the same or neighbouring positions, so that a group's rows share
// both a key block and its causal edge.
struct RowSet {
  std::int64_t batch = 0, head_kv = 0;
  std::int64_t first_head = 0, heads = 1;
  Sequence sequence;

  std::int64_t size() const { return sequence.seqlen_q * heads; }
  // A division takes longer than the rest of a row's bookkeeping: not for groups of one.
  std::int64_t query_of(std::int64_t row) const { return heads == 1 ? row : row / heads; }
  std::int64_t head_of(std::int64_t row) const { return heads == 1 ? first_head : first_head + row % heads; }
  std::int64_t token_of(std::int64_t row) const { return sequence.query_start + query_of(row); }
};

inline RowSet group_rows(const Problem& problem, std::int64_t batch, std::int64_t head_kv) {
  const std::int64_t group = problem.group_size();
  return {batch, head_kv, head_kv * group, group, sequence_of(problem, batch)};
}

// Lane arrays of one panel of `count` consecutive rows; the lanes past them repeat the last row.
struct Lanes {
  std::int64_t first_row = 0, count = 0;
  std::int32_t* begin = nullptr;  // visible keys [begin, end) of each lane
  std::int32_t* end = nullptr;
  std::int32_t* center = nullptr;    // i', where ALiBi counts from
  float* slope = nullptr;            // ALiBi
  const std::byte** bias = nullptr;  // the row's bias of key 0
  std::uint32_t* query = nullptr;    // dropout counter
  std::uint32_t* plane = nullptr;    // dropout counter: batch·num_heads + head
  std::int64_t min_begin = 0, max_begin = 0, min_end = 0, max_end = 0;

  void take(Arena& arena, const Problem& problem, std::int64_t width) {
    begin = arena.take<std::int32_t>(width);
    end = arena.take<std::int32_t>(width);
    if (problem.alibi_slopes != nullptr) {
      center = arena.take<std::int32_t>(width);
      slope = arena.take<float>(width);
    }
    if (problem.bias) bias = arena.take<const std::byte*>(width);
    if (problem.dropout_p > 0) {
      query = arena.take<std::uint32_t>(width);
      plane = arena.take<std::uint32_t>(width);
    }
  }

  void set(const Problem& problem, const RowSet& rows, std::int64_t first, std::int64_t rows_in_use,
           std::int64_t width) {
    first_row = first;
    count = rows_in_use;
    min_begin = min_end = INT64_MAX;
    max_begin = max_end = 0;
    for (std::int64_t lane = 0; lane < width; ++lane) set_lane(problem, rows, lane);
  }

  // Keys [key, key + keys) against the panel.
  bool sees_none(std::int64_t key, std::int64_t keys) const { return key + keys <= min_begin || key >= max_end; }
  bool sees_all(std::int64_t key, std::int64_t keys) const { return key >= max_begin && key + keys <= min_end; }

 private:
  void set_lane(const Problem& problem, const RowSet& rows, std::int64_t lane) {
    const std::int64_t row = first_row + std::min(lane, count - 1);
    const std::int64_t i = rows.query_of(row), head = rows.head_of(row);
    KeyRange keys = visible_keys(problem, rows.sequence, i);
    keys.begin = std::clamp<std::int64_t>(keys.begin, 0, rows.sequence.seqlen_k);
    keys.end = std::clamp<std::int64_t>(keys.end, keys.begin, rows.sequence.seqlen_k);
    begin[lane] = static_cast<std::int32_t>(keys.begin);
    end[lane] = static_cast<std::int32_t>(keys.end);
    min_begin = std::min(min_begin, keys.begin);
    max_begin = std::max(max_begin, keys.begin);
    min_end = std::min(min_end, keys.end);
    max_end = std::max(max_end, keys.end);
    if (slope != nullptr) {
      center[lane] = static_cast<std::int32_t>(i + rows.sequence.diagonal);
      slope[lane] = problem.alibi_slopes[rows.batch * problem.alibi_batch_stride + head];
    }
    if (bias != nullptr) {
      const BiasOperand& b = problem.bias;
      const std::int64_t offset = rows.batch * b.batch_stride + head * b.head_stride + i * b.query_stride;
      bias[lane] = static_cast<const std::byte*>(b.data) + offset * size_of(b.dtype);
    }
    if (query != nullptr) {
      query[lane] = static_cast<std::uint32_t>(i);
      plane[lane] = static_cast<std::uint32_t>(rows.batch * problem.num_heads + head);
    }
  }
};

}  // namespace onepass::cpu
