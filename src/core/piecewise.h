// core/piecewise.h: piecewise attention is two attentions over disjoint keys that share one softmax: the near pair's
// with a window that begins dist_threshold − 1 keys back, the far pair's with one that ends dist_threshold keys back.
// The gradients of either are those of a window with the LSE of all keys; dV is the sum of both.
#pragma once

#include <algorithm>
#include <span>

#include "core/problem.h"

namespace onepass {

// Attentions over disjoint keys that share values and one softmax: the near and the far part, or plain attention alone.
using Parts = std::span<const Problem>;
inline constexpr std::size_t kMaxParts = 2;

// No distance i' − j is larger than the longer sequence, so that this threshold means the same.
inline std::int64_t clamped_threshold(const PiecewiseProblem& problem) {
  const std::int64_t longest = std::max(problem.near.seqlen_q, problem.near.seqlen_k);
  return std::clamp(problem.far.dist_threshold, -longest, longest);
}

// Keys with i' − j < dist_threshold, scored by the near pair.
inline Problem near_part(const PiecewiseProblem& problem) {
  Problem part = problem.near;
  const std::int64_t left = clamped_threshold(problem) - 1;
  part.window_left = part.window_left == kUnbounded ? left : std::min(part.window_left, left);
  return part;
}

// Keys with i' − j ≥ dist_threshold, scored by the far pair.
inline Problem far_part(const PiecewiseProblem& problem) {
  Problem part = problem.near;
  part.q = problem.far.q;
  part.k = problem.far.k;
  const std::int64_t right = -clamped_threshold(problem);
  part.window_right = part.window_right == kUnbounded ? right : std::min(part.window_right, right);
  return part;
}

}  // namespace onepass
