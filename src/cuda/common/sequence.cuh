// cuda/common/sequence.cuh: bounds of one sequence, and the keys that a query row sees (device side of
// core/sequence.h). Bounds that live on the device cannot be validated before the launch: they are clamped here to what
// the call declared, so that no address outside the operands is ever formed.
#pragma once

#include "core/problem.h"
#include "cuda/common/scalar.cuh"

namespace onepass::cuda {

struct DeviceSequence {
  std::int64_t query_start, key_start;
  int seqlen_q, seqlen_k;
  int key_begin, key_end;
  int diagonal;
};

struct Span {
  std::int64_t start;
  int size;
};

ONEPASS_DEVICE int clamp_to(std::int64_t value, std::int64_t low, std::int64_t high) {
  return static_cast<int>(value < low ? low : value > high ? high : value);
}

ONEPASS_DEVICE Span ragged_span(const std::int32_t* cu_seqlens, int batch, std::int64_t longest, std::int64_t total) {
  const std::int64_t start = clamp_to(cu_seqlens[batch], 0, total);
  const std::int64_t room = min(longest, total - start);
  return {start, clamp_to(cu_seqlens[batch + 1] - start, 0, room)};
}

ONEPASS_DEVICE DeviceSequence device_sequence(const Problem& problem, int batch) {
  Span queries{0, static_cast<int>(problem.seqlen_q)}, keys{0, static_cast<int>(problem.seqlen_k)};
  if (problem.cu_seqlens_q != nullptr) {
    queries = ragged_span(problem.cu_seqlens_q, batch, problem.seqlen_q, problem.total_q);
    keys = ragged_span(problem.cu_seqlens_k, batch, problem.seqlen_k, problem.total_k);
  }
  DeviceSequence s;
  s.query_start = queries.start;
  s.key_start = keys.start;
  s.seqlen_q = queries.size;
  s.seqlen_k = keys.size;
  s.key_begin = problem.key_begin != nullptr ? clamp_to(problem.key_begin[batch], 0, s.seqlen_k) : 0;
  s.key_end = problem.key_end != nullptr ? clamp_to(problem.key_end[batch], 0, s.seqlen_k) : s.seqlen_k;
  s.diagonal = problem.top_left ? 0 : s.seqlen_k - s.seqlen_q;
  return s;
}

// Half-open ranges of tokens; empty when begin ≥ end.
struct Range {
  int begin, end;
  ONEPASS_DEVICE bool contains(int i) const { return i >= begin && i < end; }
};

ONEPASS_DEVICE Range visible_keys(const Problem& problem, const DeviceSequence& s, int query) {
  const std::int64_t center = std::int64_t{query} + s.diagonal;
  std::int64_t begin = s.key_begin, end = s.key_end;
  if (problem.window_left != kUnbounded) begin = max(begin, center - problem.window_left);
  if (problem.window_right != kUnbounded) end = min(end, center + problem.window_right + 1);
  return {clamp_to(begin, 0, s.seqlen_k), clamp_to(end, 0, s.seqlen_k)};
}

// Queries that see key j; j itself must lie within the visible keys of the sequence.
ONEPASS_DEVICE Range seeing_queries(const Problem& problem, const DeviceSequence& s, int key) {
  std::int64_t begin = 0, end = s.seqlen_q;
  const std::int64_t center = std::int64_t{key} - s.diagonal;  // the query whose i' is this key
  if (problem.window_right != kUnbounded) begin = max(begin, center - problem.window_right);
  if (problem.window_left != kUnbounded) end = min(end, center + problem.window_left + 1);
  return {clamp_to(begin, 0, s.seqlen_q), clamp_to(end, 0, s.seqlen_q)};
}

// Keys of a tile of queries [first, last]: those that at least one query sees, and within them those that all see.
struct TileKeys {
  Range any, all;
};

ONEPASS_DEVICE TileKeys tile_keys(const Problem& problem, const DeviceSequence& s, int first, int last) {
  const Range of_first = visible_keys(problem, s, first), of_last = visible_keys(problem, s, last);
  return {{of_first.begin, of_last.end}, {of_last.begin, of_first.end}};
}

// Queries of a tile of keys [first, end): those that see at least one live key of it, and those that see all of them.
struct TileQueries {
  Range any, all;
};

ONEPASS_DEVICE TileQueries tile_queries(const Problem& problem, const DeviceSequence& s, int first, int end) {
  const int first_live = max(first, s.key_begin), last_live = min(end, s.key_end) - 1;
  if (first_live > last_live) return {{0, 0}, {0, 0}};
  const Range of_first = seeing_queries(problem, s, first_live), of_last = seeing_queries(problem, s, last_live);
  const bool whole = first >= s.key_begin && end <= s.key_end;
  return {{of_first.begin, of_last.end}, whole ? Range{of_last.begin, of_first.end} : Range{0, 0}};
}

}  // namespace onepass::cuda
