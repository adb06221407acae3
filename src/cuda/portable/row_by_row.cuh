// cuda/portable/row_by_row.cuh: the rare tile whose values hold infinities or NaNs that only some of its rows see.
//
// On tensor cores a masked weight of 0 turns them into NaN in rows that must not notice. Such a tile is computed again
// here, one row at a time, touching visible keys only. It is slow and small on purpose: at most the tiles across the
// mask's edge of a sequence that holds a NaN come here.
#pragma once

#include "cuda/common/score.cuh"
#include "cuda/portable/forward.h"
#include "cuda/portable/row_end.cuh"
#include "cuda/portable/tile.cuh"

namespace onepass::cuda {

ONEPASS_DEVICE float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}
ONEPASS_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// Rows first_query + warp, + kWarps, … of one head. A lane scores one key of 32 and keeps kHeadDim/32 output columns.
template <class T, int kHeadDim, int kWarps>
__device__ __noinline__ void forward_row_by_row(const ForwardArguments& arguments, int batch, int head, int first_query,
                                                int live_queries) {
  const Problem& problem = arguments.problem;
  const DeviceSequence sequence = device_sequence(problem, batch);
  const int head_kv = head / arguments.group_size, lane = threadIdx.x % 32;
  const int head_dim = static_cast<int>(problem.head_dim), head_dim_v = static_cast<int>(problem.head_dim_v);
  const ScoreTerms terms = score_terms(problem, batch, head);
  const DropoutRule dropout = dropout_rule(problem, batch, head);
  const auto q = global_rows<const T>(problem.q, batch, head, sequence.query_start, head_dim, false);
  const auto k = global_rows<const T>(problem.k, batch, head_kv, sequence.key_start, head_dim, false);
  const auto v = global_rows<const T>(problem.v, batch, head_kv, sequence.key_start, head_dim_v, false);
  const auto out = global_rows<T>(problem.out, batch, head, sequence.query_start, head_dim_v, false);

  for (int i = threadIdx.x / 32; i < live_queries; i += kWarps) {
    const int query = first_query + i;
    const Range visible = visible_keys(problem, sequence, query);
    float largest = -kInfinity, sum = 0.0f, o[kHeadDim / 32] = {};
    for (int key0 = visible.begin; key0 < visible.end; key0 += 32) {
      const int key = key0 + lane;
      float s = -kInfinity;
      if (key < visible.end) {
        float product = 0.0f;
        for (int d = 0; d < head_dim; ++d) {
          product = fmaf(to_float(q.data[query * q.stride + d]), to_float(k.data[key * k.stride + d]), product);
        }
        s = logit<false>(terms, sequence, query, key, product);
      }
      const float grown = fmaxf(largest, warp_max(s));
      const float base = grown == -kInfinity ? 0.0f : grown;
      const float factor = expf(largest - base);
      largest = grown;
      float weight = expf(s - base);
      sum = sum * factor + warp_sum(weight);
      if (dropout.active && !survives(dropout, query, key)) weight = 0.0f;
#pragma unroll
      for (int c = 0; c < kHeadDim / 32; ++c) o[c] *= factor;
      for (int j = 0; j < min(32, visible.end - key0); ++j) {
        const float of_key = __shfl_sync(~0u, weight, j);
#pragma unroll
        for (int c = 0; c < kHeadDim / 32; ++c) {
          const int d = 32 * c + lane;
          if (d < head_dim_v) o[c] = fmaf(of_key, to_float(v.data[(key0 + j) * v.stride + d]), o[c]);
        }
      }
    }
    const RowEnd end = finish_row(problem, head, largest == -kInfinity ? 0.0f : largest * kLog2e, sum,
                                  largest == -kInfinity, dropout.survivor_scale);
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      const int d = 32 * c + lane;
      if (d < head_dim_v) out.data[query * out.stride + d] = from_float<T>(o[c] * end.factor);
    }
    if (lane == 0) store_lse(problem, batch, head, sequence.query_start + query, end.lse);
  }
}

}  // namespace onepass::cuda
