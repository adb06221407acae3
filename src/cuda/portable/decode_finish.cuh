// cuda/portable/decode_finish.cuh: from the states of a block's warps to output rows or partial results.
#pragma once

#include "cuda/portable/decode_rows.cuh"

namespace onepass::cuda {

// Merges the warps' states of up to eight rows and writes the rows, or this part of them: into partial rows from
// slot_row on unless that is −1. One warp a row, the first of them `first_warp`: others go on at once.
template <class Config>
ONEPASS_DEVICE void finish_rows(const DecodeArguments& a, std::int64_t query_start, int batch, int head_kv,
                                int first_row, int rows, std::int64_t slot_row, int first_warp,
                                const PartialState* states, const float* out) {
  constexpr int kWarps = Config::kWarps, kChunks = (Config::kHeadDim + 127) / 128;  // of four channels a lane
  constexpr int kUnroll = Config::kRows > 8 ? 2 : 4;  // registers still hold other rows, or the next keys

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, end = min(8, rows - first_row);
#pragma unroll 1
  for (int row = (warp + kWarps - first_warp) % kWarps; row < end; row += kWarps) {
    PartialState merged{-kInfinity, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) merged.largest = fmaxf(merged.largest, states[8 * w + row].largest);
    const float base = merged.largest == -kInfinity ? 0.0f : merged.largest;
    float4 x[kChunks] = {};
#pragma unroll kUnroll
    for (int w = 0; w < kWarps; ++w) {
      const PartialState part = states[8 * w + row];
      const float f = part.sum == 0.0f ? 0.0f : exp2_approx((part.largest == -kInfinity ? 0.0f : part.largest) - base);
      merged.sum += f * part.sum;
      merged.rounded += f * part.rounded;
      merged.repaired += part.repaired;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = 4 * lane + 128 * c;
        if (d >= Config::kHeadDim) continue;
        const float4 y = *reinterpret_cast<const float4*>(out + (8 * w + row) * Config::kOutputPitch + d);
        x[c] = {fmaf(f, y.x, x[c].x), fmaf(f, y.y, x[c].y), fmaf(f, y.z, x[c].z), fmaf(f, y.w, x[c].w)};
      }
    }
    const RowPlace place = place_of(a, head_kv, first_row + row);
    const RowEnd end_of_row = end_of(merged, a, place.head);
    const std::int64_t token = query_start + place.query;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = 4 * lane + 128 * c;
      if (d >= Config::kHeadDim) continue;
      if (slot_row >= 0) {
        *reinterpret_cast<float4*>(a.partials + (slot_row + row) * a.columns + d) = x[c];
      } else {
        const float f = end_of_row.factor;
        store_output<Config::kPlain>(a, batch, place.head, token, d, {f * x[c].x, f * x[c].y, f * x[c].z, f * x[c].w});
      }
    }
    if (slot_row >= 0) {
      if (lane == 0) a.states[slot_row + row] = merged;
      continue;
    }
    if (lane == 0) store_lse(a.lse, batch, place.head, token, end_of_row.lse);
    if (merged.repaired != 0.0f) {
      __syncwarp();
      restore_values(a, batch, head_kv, first_row + row, false);
    }
  }
}

}  // namespace onepass::cuda
