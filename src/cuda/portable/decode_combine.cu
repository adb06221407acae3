// cuda/portable/decode_combine.cu: exact merge of the parts of a row, always in the same order. One block a pair.
#include "cuda/portable/decode_rows.cuh"
#include "cuda/portable/decode_share.cuh"

namespace onepass::cuda {
namespace {

constexpr int kWarps = 16;

// Merges `parts` parts of rows [first_row, first_row + rows) of a pair; slot(i): of part i. Warps share the rows, then
// the parts of a row. kChunks: of 128 columns.
template <int kChunks, class Slot>
ONEPASS_DEVICE void combine_rows(const DecodeArguments& a, const DeviceSequence& sequence, int batch, int head_kv,
                                 int first_row, int rows, int parts, const Slot& slot) {
  __shared__ PartialState states[kWarps];
  __shared__ float4 outputs[kWarps][32 * kChunks];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int splits = max(kWarps / rows, 1), split = warp % splits;
  for (int row = warp / splits; row < rows || splits > 1; row += kWarps / splits) {
    PartialState merged{-kInfinity, 0.0f, 0.0f, 0.0f};
    float4 x[kChunks] = {};
#pragma unroll 4
    for (int i = row < rows ? split : parts; i < parts; i += splits) {
      const std::int64_t index = slot(i) * a.rows + row;
      const PartialState part = a.states[index];
      float4 y[kChunks];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = 4 * lane + 128 * c;
        if (d < a.columns) y[c] = *reinterpret_cast<const float4*>(a.partials + index * a.columns + d);
      }
      if (part.sum == 0.0f) continue;
      const float2 f = add_part(merged, part);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        x[c] = {f.x * x[c].x + f.y * y[c].x, f.x * x[c].y + f.y * y[c].y, f.x * x[c].z + f.y * y[c].z,
                f.x * x[c].w + f.y * y[c].w};
      }
    }
    if (splits > 1) {
      if (lane == 0) states[warp] = merged;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) outputs[warp][lane + 32 * c] = x[c];
      __syncthreads();
      if (split > 0 || row >= rows) return;
      for (int i = 1; i < splits; ++i) {
        if (states[warp + i].sum == 0.0f) continue;
        const float2 f = add_part(merged, states[warp + i]);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const float4 y = outputs[warp + i][lane + 32 * c];
          x[c] = {f.x * x[c].x + f.y * y.x, f.x * x[c].y + f.y * y.y, f.x * x[c].z + f.y * y.z,
                  f.x * x[c].w + f.y * y.w};
        }
      }
    }
    const RowPlace place = place_of(a, head_kv, first_row + row);
    const std::int64_t token = sequence.query_start + place.query;
    const RowEnd end = end_of(merged, a, place.head);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = 4 * lane + 128 * c;
      if (d < a.columns) {
        store_output(a, batch, place.head, token, d,
                     {end.factor * x[c].x, end.factor * x[c].y, end.factor * x[c].z, end.factor * x[c].w});
      }
    }
    if (lane == 0) store_lse(a.lse, batch, place.head, token, end.lse);
    __syncwarp();
    if (merged.repaired != 0.0f) restore_values(a, batch, head_kv, first_row + row, false);
    if (splits > 1) return;
  }
}

// A pair broken over several blocks has its first part in slot 2i + 1 of the block i that begins it.
__global__ void __launch_bounds__(32 * kWarps) combine_shares(const __grid_constant__ DecodeArguments a) {
  allow_next_grid();
  wait_for_previous_grid();
  const int first = blockIdx.x;
  const BrokenPair pair = a.broken[first];
  if (pair.parts < 2) return;
  combine_rows<2>(a, cached_sequence(a, pair.batch), pair.batch, pair.head, 0, pair.rows, pair.parts,
                  [&](int i) { return 2 * (std::int64_t{first} + i) + (i == 0 ? 1 : 0); });
}

// Fixed numbers of parts, those without units included.
__global__ void __launch_bounds__(32 * kWarps) combine_parts(const __grid_constant__ DecodeArguments a) {
  allow_next_grid();
  wait_for_previous_grid();
  const int pair = blockIdx.x / a.row_blocks, first_row = blockIdx.x % a.row_blocks * a.rows;
  const int batch = pair / a.heads_kv, head_kv = pair % a.heads_kv;
  const DeviceSequence sequence = cached_sequence(a, batch);
  const int units = units_of(a, sequence, first_row, a.unit_tokens).count, parts = min(a.parts, units);
  if (parts < 2) return;
  const std::int64_t slots = std::int64_t{blockIdx.x} * a.parts;
  const int rows = min(a.rows, sequence.seqlen_q * a.group_size - first_row);
  // Part i of those that have units: with fewer units than parts, the one that holds unit i.
  combine_rows<4>(a, sequence, batch, head_kv, first_row, rows, parts, [&](int i) {
    return slots + (units >= a.parts ? i : (std::int64_t{i} * a.parts + a.parts - 1) / units);
  });
}

}  // namespace

CombineKernel combine_kernel(bool equal_shares) { return {equal_shares ? combine_shares : combine_parts, 32 * kWarps}; }

}  // namespace onepass::cuda
