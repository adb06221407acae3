// cpu/empty_rows.h: what attention writes for queries that belong to no sequence.
#pragma once

#include <algorithm>
#include <limits>

#include "core/half.h"
#include "core/sequence.h"

namespace onepass::cpu {

// Packed tensors may be longer than their sequences: such rows are empty ones.
inline void write_unowned_queries(const Problem& problem) {
  const KeyRange queries = unowned_queries(problem);
  for (std::int64_t head = 0; head < problem.num_heads; ++head) {
    for (std::int64_t i = queries.begin; i < queries.end; ++i) {
      with_float_type(problem.dtype,
                      [&]<class T>(T) { std::fill_n(problem.out.row<T>(0, head, i), problem.head_dim_v, T{}); });
      if (problem.lse) problem.lse.at<float>(0, head, i) = -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace onepass::cpu
