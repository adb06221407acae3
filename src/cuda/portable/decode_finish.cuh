// cuda/portable/decode_finish.cuh: from the states of a block's warps to output rows or partial results.
#pragma once

#include "cuda/portable/decode_rows.cuh"

namespace onepass::cuda {

// Merges the warps' states of eight rows and writes the rows, or this part of them: into partial rows from slot_row on
// unless that is −1.
template <class Config>
ONEPASS_DEVICE void finish_rows(const DecodeArguments& a, const DeviceSequence& sequence, int batch, int head_kv,
                                int first_row, int rows, std::int64_t slot_row, const unsigned char* shared) {
  const auto* const states = reinterpret_cast<const PartialState*>(shared + Config::kStateOffset);
  const auto* const out = reinterpret_cast<const float*>(shared + Config::kOutputOffset);
  constexpr int kChunks = Config::kHeadDim / 4;
  const int end = min(8, rows - first_row);
  bool repaired = false;
  for (int item = threadIdx.x; item < end * kChunks; item += Config::kThreads) {
    const int row = item / kChunks, d = item % kChunks * 4;
    float4 x{0.0f, 0.0f, 0.0f, 0.0f};
    PartialState merged{-kInfinity, 0.0f, 0.0f, 0.0f};
    for (int w = 0; w < Config::kWarps; ++w) merged.largest = fmaxf(merged.largest, states[8 * w + row].largest);
    const float base = merged.largest == -kInfinity ? 0.0f : merged.largest;
#pragma unroll 2
    for (int w = 0; w < Config::kWarps; ++w) {
      const PartialState part = states[8 * w + row];
      if (part.sum == 0.0f) continue;
      const float f = exp2_approx((part.largest == -kInfinity ? 0.0f : part.largest) - base);
      merged.sum += f * part.sum;
      merged.rounded += f * part.rounded;
      merged.repaired += part.repaired;
      const float4 y = *reinterpret_cast<const float4*>(out + (8 * w + row) * Config::kOutputPitch + d);
      x = {x.x + f * y.x, x.y + f * y.y, x.z + f * y.z, x.w + f * y.w};
    }
    if (slot_row >= 0) {
      const std::int64_t index = slot_row + row;
      *reinterpret_cast<float4*>(a.partials + index * a.columns + d) = x;
      if (d == 0) a.states[index] = merged;
      continue;
    }
    const RowPlace place = place_of(a, head_kv, first_row + row);
    const RowEnd end_of_row = end_of(merged, a, place.head);
    const float f = end_of_row.factor;
    const std::int64_t token = sequence.query_start + place.query;
    store_output<Config::kPlain>(a, batch, place.head, token, d, {f * x.x, f * x.y, f * x.z, f * x.w});
    if (d == 0) store_lse(a.lse, batch, place.head, token, end_of_row.lse);
    repaired |= merged.repaired != 0.0f;
  }
  if (__syncthreads_or(repaired)) {
    for (int row = threadIdx.x / 32; row < end; row += Config::kWarps) {
      restore_values(a, batch, head_kv, first_row + row, false);
    }
  }
}

}  // namespace onepass::cuda
