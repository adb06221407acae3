// cuda/portable/backward_common.cuh: parts that the backward kernels share.
#pragma once

#include "cuda/portable/backward.h"
#include "cuda/portable/float_product.cuh"
#include "cuda/portable/fragment_tile.cuh"
#include "cuda/portable/not_finite.cuh"
#include "cuda/portable/schedule.cuh"

namespace onepass::cuda {

// Where the rows of a sequence begin in statistics and dQ sums: sequences are padded to whole blocks of kPadding.
// Ragged: floor(start/kPadding) + batch blocks lie before, which never overlaps, whatever the lengths.
ONEPASS_DEVICE std::int64_t padded_start(const Problem& problem, const DeviceSequence& sequence, int batch) {
  const std::int64_t blocks = problem.cu_seqlens_q != nullptr ? sequence.query_start / kPadding + batch
                                                              : batch * ((problem.seqlen_q + kPadding - 1) / kPadding);
  return blocks * kPadding;
}

// Fragment (r, c) of warp w's part of a dQ tile, as the lanes hold it: 128 consecutive floats, so that a warp's
// additions cover whole cache lines.
template <int R, int C>
ONEPASS_DEVICE constexpr int fragment_offset(int warp, int r, int c) {
  return ((warp * R + r) * C + c) * 128;
}

// Lane l owns floats 4l … 4l+3 where four can be added at once (sm_90), else l, 32+l, 64+l, 96+l.
ONEPASS_DEVICE int fragment_element(int lane, int e) {
#if __CUDA_ARCH__ >= 900
  return 4 * lane + e;
#else
  return 32 * e + lane;
#endif
}

ONEPASS_DEVICE void add_fragment(float* sums, int lane, const float (&d)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums + 4 * lane), "f"(d[0]), "f"(d[1]), "f"(d[2]),
               "f"(d[3])
               : "memory");
#else
#pragma unroll
  for (int e = 0; e < 4; ++e) atomicAdd(sums + fragment_element(lane, e), d[e]);
#endif
}

// How scores and LSEs meet: 2^(scale_log2·s − lse) in one FMA, or e^(unit·s − lse) where LSEs are natural.
struct ScoreUnits {
  float scale_log2, unit;
  bool natural;
};

// Weights and their gradients of one fragment, given S (products q·k), dP (products dO·v), and each element's row
// statistics. Leaves the dropped-out weights in s and the gradient by softmax_scale·q·k (or by the logit, with
// kOfLogit) in dp. Hidden pairs are zeroed at the end, whatever NaN their operands or statistics hold.
template <bool kExact, bool kTerms, bool kOfLogit, class Layout, int R, int C, class StatisticsOf>
ONEPASS_DEVICE void weights_and_gradients(float (&s)[R][C][4], float (&dp)[R][C][4], const ScoreTerms& terms,
                                          const DropoutRule& dropout, const Layout& at, const DeviceSequence& sequence,
                                          const ScoreUnits& units, const StatisticsOf& statistics_of) {
  constexpr bool kSlopes = kTerms && !kOfLogit;
  [[maybe_unused]] float slopes[kSlopes ? R : 1][kSlopes ? C : 1][4];
  if constexpr (kTerms && kOfLogit) apply_terms<kExact>(s, terms, at, sequence);
  if constexpr (kSlopes) apply_terms<kExact>(s, slopes, terms, at, sequence);
  if (units.natural) {
    for_each_element(
        s, [&](float& x, int r, int c, int e) { x = (x * units.unit - statistics_of(r, c, e).lse) * kLog2e; });
  } else {
    for_each_element(
        s, [&](float& x, int r, int c, int e) { x = fmaf(x, units.scale_log2, -statistics_of(r, c, e).lse); });
  }
  for_each_element(s, [&](float& x, int, int, int) { x = exp2_approx(x); });
  if (kTerms && dropout.active) {
    for_each_dropout<R, C>(dropout, at, [&](int r, int c, int e, bool survives) {
      const float factor = survives ? dropout.survivor_scale : 0.0f;
      const float weight = s[r][c][e];
      dp[r][c][e] = weight * (dp[r][c][e] * factor - statistics_of(r, c, e).delta);
      s[r][c][e] = weight * factor;
    });
  } else {
    for_each_element(dp, [&](float& x, int r, int c, int e) { x = s[r][c][e] * (x - statistics_of(r, c, e).delta); });
  }
  if constexpr (kSlopes) for_each_element(dp, [&](float& x, int r, int c, int e) { x *= slopes[r][c][e]; });
}

template <int R, int C>
ONEPASS_DEVICE void zero_hidden(float (&s)[R][C][4], float (&dp)[R][C][4], const RowRanges<R>& ranges, int column0) {
  for_each_element(s, [&](float& x, int r, int c, int e) {
    const bool visible = ranges.row[2 * r + e / 2].contains(column0 + 8 * c + e % 2);
    x = visible ? x : 0.0f;
    dp[r][c][e] = visible ? dp[r][c][e] : 0.0f;
  });
}

// d += the rows [first, first + count) as they stand in global memory, from column `column0` on.
template <class T, int R, int C>
ONEPASS_DEVICE void add_stored(float (&d)[R][C][4], const GlobalRows<T>& rows, int first, int count, int column0 = 0) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  for_each_element(d, [&](float& x, int r, int c, int e) {
    const int row = 16 * r + 8 * (e / 2) + g, column = column0 + 8 * c + 2 * t + e % 2;
    if (row < count && column < rows.columns) x += to_float(rows.data[(first + row) * rows.stride + column]);
  });
}

}  // namespace onepass::cuda
