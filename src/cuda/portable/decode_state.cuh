// cuda/portable/decode_state.cuh: what a warp accumulates over its units of one pair, and the softmax step of a unit.
#pragma once

#include "cuda/portable/decode_config.cuh"
#include "cuda/portable/fragment.cuh"

namespace onepass::cuda {

// A lane's columns are query rows 8n + 2·(lane%4) + e.
template <class Config>
struct DecodeState {
  static constexpr int N = Config::kColumnTiles;
  float out[N][Config::kOutputTiles][4] = {};
  float largest[N][2], sum[N][2];
  float rounded[N][2] = {};  // sums of the weights as packed for the product
  float unit = 0.0f;         // the accumulator is in multiples of it: a power of two near the values' scales
  bool repaired = false;

  ONEPASS_DEVICE DecodeState() {
#pragma unroll
    for (int n = 0; n < N; ++n) largest[n][0] = largest[n][1] = -kInfinity, sum[n][0] = sum[n][1] = 0.0f;
  }
  ONEPASS_DEVICE static float base_of(float x) { return x == -kInfinity ? 0.0f : x; }

  ONEPASS_DEVICE void rescale(int n, const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < Config::kOutputTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[n][i][e] *= factor[e % 2];
  }
};

// sums += two packed elements.
template <class T>
ONEPASS_DEVICE void add_pair(float (&sums)[2], std::uint32_t packed) {
  if constexpr (std::is_same_v<T, __half>) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&packed));
    sums[0] += pair.x, sums[1] += pair.y;
  } else {
    sums[0] += __uint_as_float(packed << 16), sums[1] += __uint_as_float(packed & 0xFFFF0000u);
  }
}

// Over the eight lanes that hold the same columns.
ONEPASS_DEVICE float column_max(float x) {
#pragma unroll
  for (int apart = 4; apart < 32; apart *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, apart));
  return x;
}
ONEPASS_DEVICE float column_sum(float x) {
#pragma unroll
  for (int apart = 4; apart < 32; apart *= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}

// Products with the queries → weights. Maxima follow only when one has grown by 2^8 (see softmax_step of the forward
// pass).
template <class Config, class Scores>
ONEPASS_DEVICE void weigh(DecodeState<Config>& state, Scores& s) {
  constexpr int M = Config::kTokenTiles, N = Config::kColumnTiles;
  constexpr float kSlack = 8.0f;
  float largest[N][2];
  bool grown = false;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x = -kInfinity;
#pragma unroll
      for (int m = 0; m < M; ++m) x = fmaxf(x, fmaxf(s[m][n][e], s[m][n][2 + e]));
      largest[n][e] = x;
      grown |= x > state.largest[n][e] + kSlack;
    }
  if (__any_sync(~0u, grown)) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float factor[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float next = fmaxf(state.largest[n][e], column_max(largest[n][e]));
        factor[e] = exp2_approx(DecodeState<Config>::base_of(state.largest[n][e]) - DecodeState<Config>::base_of(next));
        if (state.largest[n][e] == -kInfinity && state.sum[n][e] == 0.0f) factor[e] = 0.0f;
        state.largest[n][e] = next;
        state.sum[n][e] *= factor[e];
        state.rounded[n][e] *= factor[e];
      }
      state.rescale(n, factor);
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float base = DecodeState<Config>::base_of(state.largest[n][e]);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[m][n][2 * half + e];
          x = exp2_approx(x - base);
          state.sum[n][e] += x;
        }
    }
}

// Makes the accumulator's unit follow the scales of values, so that weight · scale / unit stays within float16.
template <class Config>
ONEPASS_DEVICE void follow_scales(DecodeState<Config>& state, float value_scale) {
  constexpr float kSlack = 16.0f;
  if (!__any_sync(~0u, fabsf(value_scale) > state.unit * kSlack)) return;
  const float finite = fabsf(value_scale) < kInfinity ? fabsf(value_scale) : 0.0f;
  const float largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(fmaxf(finite, state.unit))));
  const float next = __uint_as_float(__float_as_uint(largest) & 0x7F800000u);
  const float ratio = next > 0.0f ? state.unit / next : 0.0f;
#pragma unroll
  for (int n = 0; n < Config::kColumnTiles; ++n) state.rescale(n, {ratio, ratio});
  state.unit = next;
}

// The first channel of [slice][piece] for this lane.
template <class Config>
ONEPASS_DEVICE int first_channel(int piece) {
  return (piece * 8 + lane_id() / 4) * Config::kChannels;
}

// Puts rows [8n, 8n + 8) of every warp's state into shared memory, as far as there are that many.
template <class Config>
ONEPASS_DEVICE void share_state(const DecodeState<Config>& state, int n, int rows, unsigned char* shared) {
  const int warp = threadIdx.x / 32, t = lane_id() % 4;
  auto* const states = reinterpret_cast<PartialState*>(shared + Config::kStateOffset) + warp * 8;
  auto* const out = reinterpret_cast<float*>(shared + Config::kOutputOffset) + warp * 8 * Config::kOutputPitch;
  const float unit = state.unit == 0.0f ? 1.0f : state.unit;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float sum = column_sum(state.sum[n][e]);
    const float rounded = Config::kProductSums ? column_sum(state.rounded[n][e]) : sum;
    if (lane_id() < 4) {
      states[2 * t + e] = {state.largest[n][e], sum, rounded, state.repaired ? 1.0f : 0.0f};
    }
    if (8 * n + 2 * t + e >= rows) continue;
    const bool nothing = sum == 0.0f;  // weights of 0 times infinities are not 0
    float* const row = out + (2 * t + e) * Config::kOutputPitch;
#pragma unroll
    for (int piece = 0; piece < Config::kOutputTiles / Config::kPairs; ++piece)
#pragma unroll
      for (int i = 0; i < Config::kPairs; i += 2) {
        const float(&x)[4] = state.out[n][piece * Config::kPairs + i];
        const float(&y)[4] = state.out[n][piece * Config::kPairs + i + 1];
        float4 four{x[e] * unit, x[2 + e] * unit, y[e] * unit, y[2 + e] * unit};
        if (nothing) four = {0.0f, 0.0f, 0.0f, 0.0f};
        *reinterpret_cast<float4*>(row + first_channel<Config>(piece) + 2 * i) = four;
      }
  }
}

}  // namespace onepass::cuda
