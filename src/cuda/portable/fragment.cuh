// cuda/portable/fragment.cuh: masks and reductions on accumulator fragments (layout: common/score.cuh).
#pragma once

#include "cuda/common/quad.cuh"
#include "cuda/common/score.cuh"

namespace onepass::cuda {

ONEPASS_DEVICE int lane_id() { return threadIdx.x % 32; }

template <int R, int C>
ONEPASS_DEVICE void clear(float (&fragment)[R][C][4]) {
  for_each_element(fragment, [](float& x, int, int, int) { x = 0.0f; });
}

// Calls use(r, c) for every tile of a fragment.
template <int R, int C, class Use>
ONEPASS_DEVICE void for_each_tile(const Use& use) {
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int c = 0; c < C; ++c) use(r, c);
}

// The columns that each row of this thread may use; row i of 2R is 8i below its first.
template <int R>
struct RowRanges {
  Range row[2 * R];
};

// Rows are queries, columns keys.
template <int R>
ONEPASS_DEVICE RowRanges<R> keys_of_rows(const Problem& problem, const DeviceSequence& sequence, int first_query) {
  RowRanges<R> ranges;
  first_query = opaque(first_query);  // wanted in masked blocks only: hoisted, the ranges would hold 4R registers
#pragma unroll
  for (int i = 0; i < 2 * R; ++i) ranges.row[i] = visible_keys(problem, sequence, first_query + 8 * i);
  return ranges;
}

// Rows are keys, columns queries.
template <int R>
ONEPASS_DEVICE RowRanges<R> queries_of_rows(const Problem& problem, const DeviceSequence& sequence, int first_key) {
  RowRanges<R> ranges;
  first_key = opaque(first_key);
#pragma unroll
  for (int i = 0; i < 2 * R; ++i) {
    const int key = first_key + 8 * i;
    const bool live = key >= sequence.key_begin && key < sequence.key_end;
    ranges.row[i] = live ? seeing_queries(problem, sequence, key) : Range{0, 0};
  }
  return ranges;
}

// `hidden` outside the ranges; column0 is the column of the thread's first element.
template <int R, int C>
ONEPASS_DEVICE void mask_scores(float (&s)[R][C][4], const RowRanges<R>& ranges, int column0,
                                float hidden = -kInfinity) {
  for_each_element(s, [&](float& x, int r, int c, int e) {
    if (!ranges.row[2 * r + e / 2].contains(column0 + 8 * c + e % 2)) x = hidden;
  });
}

}  // namespace onepass::cuda
