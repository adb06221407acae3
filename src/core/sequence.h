// core/sequence.h: bounds of one sequence of a problem, and the keys that a query row sees (host side).
#pragma once

#include <algorithm>

#include "core/problem.h"

namespace onepass {

inline Sequence sequence_of(const Problem& problem, std::int64_t batch) {
  Sequence s;
  s.seqlen_q = problem.seqlen_q;
  s.seqlen_k = problem.seqlen_k;
  if (problem.ragged()) {
    s.query_start = problem.cu_seqlens_q[batch];
    s.key_start = problem.cu_seqlens_k[batch];
    s.seqlen_q = problem.cu_seqlens_q[batch + 1] - s.query_start;
    s.seqlen_k = problem.cu_seqlens_k[batch + 1] - s.key_start;
  }
  s.key_begin = problem.key_begin ? std::clamp<std::int64_t>(problem.key_begin[batch], 0, s.seqlen_k) : 0;
  s.key_end = problem.key_end ? std::clamp<std::int64_t>(problem.key_end[batch], 0, s.seqlen_k) : s.seqlen_k;
  s.diagonal = problem.top_left ? 0 : s.seqlen_k - s.seqlen_q;
  return s;
}

// Visible keys [begin, end) of query row i; empty when begin ≥ end.
struct KeyRange {
  std::int64_t begin, end;
};

inline KeyRange visible_keys(const Problem& problem, const Sequence& s, std::int64_t query) {
  KeyRange range{s.key_begin, s.key_end};
  const std::int64_t center = query + s.diagonal;
  if (problem.window_left != kUnbounded) range.begin = std::max(range.begin, center - problem.window_left);
  if (problem.window_right != kUnbounded) range.end = std::min(range.end, center + problem.window_right + 1);
  return range;
}

// First token after the last sequence, and the end of the tensor: rows that belong to nobody.
inline KeyRange unowned_queries(const Problem& problem) {
  return {problem.ragged() ? problem.cu_seqlens_q[problem.batch] : problem.total_q, problem.total_q};
}
inline KeyRange unowned_keys(const Problem& problem) {
  return {problem.ragged() ? problem.cu_seqlens_k[problem.batch] : problem.total_k, problem.total_k};
}

}  // namespace onepass
