// cuda/portable/decode_combine.cu: exact merge of the parts of a row, always in the same order. One block a row.
#include "cuda/portable/decode_rows.cuh"
#include "cuda/portable/decode_share.cuh"

namespace onepass::cuda {
namespace {

constexpr int kWarps = 4;           // part i is merged by warp i % kWarps
constexpr int kChunks = 512 / 128;  // of four columns a lane

// The parts of a pair's rows: slot_of(i) for i < count.
struct Parts {
  int count = 0;
  int first = 0;  // equal shares: block
  std::int64_t slots = 0;
  int fixed = 0;  // number of parts of each pair, the empty ones included
  int units = 0;

  ONEPASS_DEVICE std::int64_t slot(int i) const {
    if (fixed == 0) return 2 * (std::int64_t{first} + i) + (i == 0 ? 1 : 0);
    // Part i of those that have units: with fewer units than parts, the one that holds unit i.
    return slots + (units >= fixed ? i : (std::int64_t{i} * fixed + fixed - 1) / units);
  }
};

ONEPASS_DEVICE Parts parts_of(const DecodeArguments& a, const DeviceSequence& sequence, int batch, int head, int row) {
  Parts parts;
  if (a.parts > 0) {
    const int block = row / a.rows;
    parts.units = units_of(a, sequence, block * a.rows).count;
    parts.count = min(a.parts, parts.units);
    parts.fixed = a.parts;
    parts.slots = ((batch * a.problem.cache.num_heads_kv + head) * a.row_blocks + block) * a.parts;
    return parts;
  }
  const int heads = static_cast<int>(a.problem.cache.num_heads_kv), size = a.starts[a.problem.attention.batch + 1];
  const int units = (a.starts[batch + 1] - a.starts[batch]) / heads;
  const int begin = a.starts[batch] + head * units;
  parts.units = units;
  parts.first = begin / size;
  parts.count = units == 0 ? 0 : (begin + units - 1) / size - parts.first + 1;
  return parts;
}

__global__ void __launch_bounds__(32 * kWarps) combine_kernel_of_rows(const __grid_constant__ DecodeArguments a) {
  wait_for_previous_grid();
  allow_next_grid();
  const int rows = a.row_blocks * a.rows;
  const int row = blockIdx.x % rows, pair = blockIdx.x / rows;
  const int heads = static_cast<int>(a.problem.cache.num_heads_kv), batch = pair / heads, head_kv = pair % heads;
  const DeviceSequence sequence = cached_sequence(a, batch);
  if (row >= sequence.seqlen_q * a.group_size || sequence.seqlen_q * a.group_size > a.max_rows) return;
  const Parts parts = parts_of(a, sequence, batch, head_kv, row);
  if (parts.count < 2) return;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunks = a.columns / 128 + (a.columns % 128 != 0);
  PartialState merged{-kInfinity, 0.0f, 0.0f, 0.0f};
  float4 x[kChunks] = {};
#pragma unroll 4
  for (int i = warp; i < parts.count; i += kWarps) {
    const std::int64_t index = parts.slot(i) * a.rows + row % a.rows;
    const PartialState part = a.states[index];
    float4 y[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = 4 * lane + 128 * c;
      if (c < chunks && d < a.columns) y[c] = *reinterpret_cast<const float4*>(a.partials + index * a.columns + d);
    }
    if (part.sum == 0.0f) continue;
    const float2 f = add_part(merged, part);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c >= chunks || 4 * lane + 128 * c >= a.columns) continue;
      x[c] = {f.x * x[c].x + f.y * y[c].x, f.x * x[c].y + f.y * y[c].y, f.x * x[c].z + f.y * y[c].z,
              f.x * x[c].w + f.y * y[c].w};
    }
  }

  __shared__ PartialState states[kWarps];
  __shared__ float4 outputs[kWarps][32 * kChunks];
  if (lane == 0) states[warp] = merged;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (c < chunks) outputs[warp][lane + 32 * c] = x[c];
  }
  __syncthreads();
  const RowPlace place = place_of(a, head_kv, row);
  const std::int64_t token = sequence.query_start + place.query;
  bool repaired = false;
  for (int chunk = threadIdx.x; 4 * chunk < a.columns; chunk += 32 * kWarps) {
    PartialState whole{-kInfinity, 0.0f, 0.0f, 0.0f};
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (states[w].sum == 0.0f) continue;
      const float2 f = add_part(whole, states[w]);
      const float4 y = outputs[w][chunk];
      sum = {f.x * sum.x + f.y * y.x, f.x * sum.y + f.y * y.y, f.x * sum.z + f.y * y.z, f.x * sum.w + f.y * y.w};
    }
    const RowEnd end = end_of(whole, a.problem.attention, place.head);
    store_output(a, batch, place.head, token, 4 * chunk,
                 {end.factor * sum.x, end.factor * sum.y, end.factor * sum.z, end.factor * sum.w});
    if (chunk == 0) store_lse(a.problem.attention, batch, place.head, token, end.lse);
    repaired |= whole.repaired != 0.0f;
  }
  if (__syncthreads_or(repaired) && warp == 0) restore_values(a, sequence, batch, head_kv, place);
}

}  // namespace

CombineKernel combine_kernel() { return {combine_kernel_of_rows, 32 * kWarps}; }

}  // namespace onepass::cuda
