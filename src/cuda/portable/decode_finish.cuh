// cuda/portable/decode_finish.cuh: from the states of a block's warps to output rows or partial results.
#pragma once

#include "cuda/portable/decode_parts.cuh"

namespace onepass::cuda {

template <class Config>
ONEPASS_DEVICE void write_row(const DecodeArguments& a, const PartialState& state,
                              const float4 (&x)[kRowChunks<Config>], std::int64_t query_start, int batch, int head_kv,
                              int row) {
  const int lane = threadIdx.x % 32;
  const RowPlace place = place_of(a, head_kv, row);
  const RowEnd end = end_of(state, a, place.head);
  const std::int64_t token = query_start + place.query;
#pragma unroll
  for (int c = 0; c < kRowChunks<Config>; ++c) {
    const int d = 4 * lane + 128 * c;
    if (d >= Config::kHeadDim) continue;
    const float f = end.factor;
    store_output<Config::kPlain>(a, batch, place.head, token, d, {f * x[c].x, f * x[c].y, f * x[c].z, f * x[c].w});
  }
  if (lane == 0) store_lse(a.lse, batch, place.head, token, end.lse);
  if (state.repaired != 0.0f) {
    __syncwarp();
    restore_values(a, batch, head_kv, row, false);
  }
}

// Where parts of a row of `rows` come to: to that row of the kStates warps, and to those that have none.
template <class Config, int kStates = Config::kWarps>
ONEPASS_DEVICE SharedStates places_of(PartialState* states, float* out, int row, int rows) {
  const int step = rows <= 4 ? 4 : 8;
  return {states + row, out + row * Config::kOutputPitch, step, kStates * 8 / step};
}

// Merges the states of kStates warps of up to eight rows and writes the rows, or this part of them. One warp a row, the
// first of them `first_warp`: others go on at once. One state: the calling warp's own. Parts are merged here, too,
// unless registers still hold other rows.
template <class Config, int kStates = Config::kWarps>
ONEPASS_DEVICE void finish_rows(const DecodeArguments& a, std::int64_t query_start, int batch, int head_kv,
                                int first_row, int rows, const Parts& parts, int first_warp, PartialState* states,
                                float* out) {
  constexpr int kWarps = Config::kWarps, kChunks = kRowChunks<Config>;
  constexpr bool kMergesParts = Config::kRows == 8;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, end = min(8, rows - first_row);
#pragma unroll 1
  for (int row = kStates == 1 ? 0 : (warp + kWarps - first_warp) % kWarps; row < end;
       row += kStates == 1 ? 1 : kWarps) {
    const int slot_row = (first_row + row) % Config::kRows;
    std::uint64_t* const counter = arrivals_of<Config>(a, parts, slot_row);
    std::uint64_t found = 0;
    if (kMergesParts && parts.count > 1) found = load_counter(counter);  // there when the part is
    PartialState merged{-kInfinity, 0.0f, 0.0f, 0.0f};
    float4 x[kChunks] = {};
    add_states<Config>(merged, x, {states + row, out + row * Config::kOutputPitch, 8, kStates});
    if (parts.count > 1) {
      const int slot = parts.slot(parts.index);
      float* const partial = partial_row<Config>(a, slot, slot_row);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = 4 * lane + 128 * c;
        if (merged.sum == 0.0f) x[c] = {0.0f, 0.0f, 0.0f, 0.0f};  // weights of 0 times infinities are not 0
        if (d < Config::kHeadDim) __stcg(reinterpret_cast<float4*>(partial + d), x[c]);
      }
      if (lane == 0) {
        const float4 state{merged.largest, merged.sum, merged.rounded, merged.repaired};
        __stcg(reinterpret_cast<float4*>(partial_state<Config>(a, slot, slot_row)), state);
      }
      if constexpr (!kMergesParts) continue;
      if (!arrives_last(counter, found, a.ticket, parts.count)) continue;
      merge_parts<Config>(merged, x, a, parts, slot_row, places_of<Config, kStates>(states, out, row, end));
    }
    write_row<Config>(a, merged, x, query_start, batch, head_kv, first_row + row);
  }
}

// Merges the parts of rows that finish_rows() has left.
template <class Config>
ONEPASS_DEVICE void merge_rows(const DecodeArguments& a, std::int64_t query_start, int batch, int head_kv, int rows,
                               const Parts& parts, int first_warp, PartialState* states, float* out) {
  constexpr int kWarps = Config::kWarps;
  static_assert(kWarps >= 8);  // a warp has the same row of every eight
  const int first = (threadIdx.x / 32 + kWarps - first_warp) % kWarps;
#pragma unroll 1
  for (int row = first < 8 ? first : rows; row < rows; row += 8) {
    std::uint64_t* const counter = arrivals_of<Config>(a, parts, row);
    if (!arrives_last(counter, load_counter(counter), a.ticket, parts.count)) continue;
    PartialState merged;
    float4 x[kRowChunks<Config>];
    merge_parts<Config>(merged, x, a, parts, row, places_of<Config>(states, out, first, rows));
    write_row<Config>(a, merged, x, query_start, batch, head_kv, row);
  }
}

}  // namespace onepass::cuda
