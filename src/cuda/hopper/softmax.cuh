// cuda/hopper/softmax.cuh: online softmax over accumulator fragments, in base 2.
//
// A lane owns two rows (r = 0, 1; see wgmma.cuh for the layout); a row's columns lie in the four lanes of a quad.
#pragma once

#include "cuda/common/scalar.cuh"

namespace onepass::cuda::hopper {

// Exponents are (score − max)·unit. `max` starts at a finite value below every score, so that the weight of a masked
// (−∞) score is 0 without a guard in the loop. Products q·k stay above −1e30; a bias may be anything down to −FLT_MAX.
template <bool kTerms>
inline constexpr float kLowestScore = kTerms ? -std::numeric_limits<float>::max() : -1e30f;

struct RowState {
  float max[2];
  float sum[2];  // of this lane's columns only, reduced over the quad at the end
};

ONEPASS_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
ONEPASS_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

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

// Takes the block's maxima into the state; alpha is the factor for everything summed before.
template <int kKeys, int R>
ONEPASS_DEVICE void update_max(const float (&s)[R], RowState& state, float (&alpha)[2], float unit) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top = row_max<kKeys>(s, r, state.max[r]);
    alpha[r] = exp2_approx((state.max[r] - top) * unit);
    state.max[r] = top;
  }
}

// x, but not before `gate` is in its register: ptxas moves an exponential that depends on the result behind gate's
// wait, which no fence makes it do. zero: a 0 that the compiler cannot see.
ONEPASS_DEVICE float wait_for(float gate, float x, std::uint32_t zero) {
  return __uint_as_float(__float_as_uint(x) | (__float_as_uint(gate) & zero));
}

// Column tiles [kFrom, kTo) of 8 keys each: scores become weights, their sums are added to `sum`.
template <int kFrom, int kTo, int R>
ONEPASS_DEVICE void exponentiate(float (&s)[R], const float (&shift)[2], float (&sum)[2], float unit) {
#pragma unroll
  for (int j = kFrom; j < kTo; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[4 * j + e] = exp2_approx(fmaf(s[4 * j + e], unit, -shift[e / 2]));
    sum[0] += s[4 * j] + s[4 * j + 1];
    sum[1] += s[4 * j + 2] + s[4 * j + 3];
  }
}

// The same for scores near float's end (a bias that serves as a mask): the difference first, its product cannot be NaN.
template <int kKeys, int R>
ONEPASS_DEVICE void exponentiate_guarded(float (&s)[R], const float (&max)[2], float (&sum)[2], float unit) {
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[4 * j + e] = exp2_approx((s[4 * j + e] - max[e / 2]) * unit);
    sum[0] += s[4 * j] + s[4 * j + 1];
    sum[1] += s[4 * j + 2] + s[4 * j + 3];
  }
}

}  // namespace onepass::cuda::hopper
