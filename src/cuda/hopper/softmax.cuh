// cuda/hopper/softmax.cuh: online softmax over accumulator fragments, in base 2.
//
// A lane owns two rows (r = 0, 1; see wgmma.cuh for the layout); a row's columns lie in the four lanes of a quad.
#pragma once

#include "cuda/common/quad.cuh"
#include "cuda/hopper/ptx.cuh"

namespace onepass::cuda::hopper {

// Exponents are (score − max)·unit. Any `max` near or above the true one serves, so it is only looked for where there
// is reason to: in a tile's first block, in blocks that the mask cuts, and when weights have grown too large without
// it. `max` starts at a finite value below every score, so that the weight of a masked (−∞) score is 0 without a guard
// in the loop. Products q·k stay above −1e30; a bias may be anything down to −FLT_MAX.
template <bool kTerms>
inline constexpr float kLowestScore = kTerms ? -std::numeric_limits<float>::max() : -1e30f;

// Two sums of a lane's weights of a block stay below it together: float16 holds each weight.
inline constexpr float kSumLimit = 16384.0f;
// Sums that can be settled: 2^−log2(sum) is a normal number.
inline constexpr float kSettleLimit = 0x1p100f;
// A lane's sum of a block's weights that all are float16 numbers.
inline constexpr float kHalfLimit = 65504.0f;
// A row's sum stays below it unless weights beside an old maximum have grown too large. The sum of 2^30 products with V
// still fits a float for |V| up to 2^97.
inline constexpr float kTotalLimit = 1073741824.0f;
// Exponents of this size are rounded by up to 1 when they are formed by one FMA.
inline constexpr float kShiftLimit = 16777216.0f;

struct RowState {
  float max[2];
  float sum[2];  // of this lane's columns only, reduced over the quad at the end
};

// Largest of row r's first kKeys columns and `floor`, over the quad. Four chains: the latency of one max is hidden.
template <int kKeys, int R>
ONEPASS_DEVICE float row_max(const float (&s)[R], int r, float floor) {
  float x[4] = {floor, s[2 * r + 1], s[4 + 2 * r], s[5 + 2 * r]};
  x[0] = fmaxf(x[0], s[2 * r]);
#pragma unroll
  for (int j = 2; j < kKeys / 8; ++j) {
    x[j % 2 * 2] = fmaxf(x[j % 2 * 2], s[4 * j + 2 * r]);
    x[j % 2 * 2 + 1] = fmaxf(x[j % 2 * 2 + 1], s[4 * j + 2 * r + 1]);
  }
  return quad_max(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
}

// Takes the block's maxima into the state, of row r only where wanted[r]; alpha is the factor for all summed before.
template <int kKeys, int R>
ONEPASS_DEVICE void update_max(const float (&s)[R], RowState& state, const bool (&wanted)[2], float (&alpha)[2],
                               float unit) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = row_max<kKeys>(s, r, state.max[r]);
    if (!wanted[r]) top = state.max[r];
    alpha[r] = exp2_approx((state.max[r] - top) * unit);
    state.max[r] = top;
  }
}

// The first kKeys scores become weights 2^(score·unit − shift); their sums are returned in `sum`.
template <int kKeys, int R>
ONEPASS_DEVICE void exponentiate(float (&s)[R], const float (&shift)[2], float (&sum)[2], float unit) {
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[4 * j + e] = exp2_approx(fmaf(s[4 * j + e], unit, -shift[e / 2]));
    sum[0] += s[4 * j] + s[4 * j + 1];
    sum[1] += s[4 * j + 2] + s[4 * j + 3];
  }
}

// Takes `off` from the scores: with the maxima off, an exponent is exact where score and maximum are huge.
template <int kKeys, int R>
ONEPASS_DEVICE void subtract(float (&s)[R], const float (&off)[2]) {
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) s[i] -= off[i % 4 / 2];
}

// Brings the weights of a row that have grown beyond kSumLimit, because `max` is an old one, down to 1 and below, or
// makes their sum infinite where that is too late. alpha is the factor of each row, which O and the sums of earlier
// blocks still need; 1 for other rows.
template <int kKeys, int R>
ONEPASS_DEVICE void settle(float (&s)[R], RowState& state, float (&sum)[2], float (&alpha)[2], float unit) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = quad_max(sum[r]);
    if (!(top >= kSumLimit)) continue;
    if (!(top < kSettleLimit)) {
      sum[r] = kInfinity;
      continue;
    }
    const float excess = log2_approx(top), factor = exp2_approx(-excess);
    state.max[r] += __fdividef(excess, unit);
    alpha[r] *= factor;
    sum[r] *= factor;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      s[4 * j + 2 * r] *= factor;
      s[4 * j + 2 * r + 1] *= factor;
    }
  }
}

}  // namespace onepass::cuda::hopper
