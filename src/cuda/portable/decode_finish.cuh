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

// Rows of a pair that the calling warp finishes.
struct WarpRows {
  int first, step;
};

// Merges the states of kStates warps of up to eight rows and writes the rows, or this part of them. One state: the
// calling warp's own.
template <class Config, int kStates = Config::kWarps>
ONEPASS_DEVICE void finish_rows(const DecodeArguments& a, std::int64_t query_start, int batch, int head_kv,
                                int first_row, int rows, const Parts& parts, WarpRows own, PartialState* states,
                                float* out) {
  constexpr int kChunks = kRowChunks<Config>;
  const int lane = threadIdx.x % 32, end = min(8, rows - first_row);
#pragma unroll 1
  for (int row = own.first; row < end; row += own.step) {
    PartialState merged{-kInfinity, 0.0f, 0.0f, 0.0f};
    float4 x[kChunks] = {};
    add_states<Config>(merged, x, {states + row, out + row * Config::kOutputPitch, 8, kStates});
    if (parts.count == 1) {
      write_row<Config>(a, merged, x, query_start, batch, head_kv, first_row + row);
      continue;
    }
    const int slot = parts.slot(parts.index), slot_row = (first_row + row) % Config::kRows;
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
  }
}

// Merges the parts of rows [first_row, first_row + rows) that finish_rows() has left, if those of the calling warp are
// the last: its rows arrive together. Parts of as many rows as there are places for are on their way at once.
template <class Config>
ONEPASS_DEVICE void merge_rows(const DecodeArguments& a, std::int64_t query_start, int batch, int head_kv,
                               int first_row, int rows, const Parts& parts, WarpRows own, std::uint64_t found,
                               const SharedStates& places) {
  if (own.first >= min(rows, 8)) return;
  if (!arrives_last(arrivals_of<Config>(a, parts, own.first), found, a.ticket, parts.count)) return;
  const int of_row = min(parts.count, places.count);
  int row = own.first, asked = row, place = 0;
  bool asks = true;
  // Asks for rows as long as there are places, then merges them.
#pragma unroll 1
  while (row < rows) {
    const int ahead = place * places.step;
    const SharedStates here{places.states + ahead, places.out + ahead * Config::kOutputPitch, places.step, of_row};
    place += of_row;
    if (asks) {
      request_parts<Config>(a, parts, 0, asked, here);
      asked += own.step;
      if (asked >= rows || place + of_row > places.count) asks = false, place = 0;
      continue;
    }
    PartialState merged;
    float4 x[kRowChunks<Config>];
    merge_parts<Config>(merged, x, a, parts, row, here);
    write_row<Config>(a, merged, x, query_start, batch, head_kv, first_row + row);
    row += own.step;
    if (row == asked) asks = true, place = 0;
  }
}

}  // namespace onepass::cuda
