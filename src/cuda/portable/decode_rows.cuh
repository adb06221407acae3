// cuda/portable/decode_rows.cuh: what the kernels over caches share about rows of a pair: their queries, their part of
// the logits, and how a finished row is written.
#pragma once

#include "cuda/common/score.cuh"
#include "cuda/portable/cached_sequence.cuh"
#include "cuda/portable/decode_ptx.cuh"
#include "cuda/portable/row_end.cuh"

namespace onepass::cuda {

// Row r of a pair: query r / group of the sequence, query head r % group of the key head's.
struct RowPlace {
  int query, head;
};
ONEPASS_DEVICE RowPlace place_of(const DecodeArguments& a, int head_kv, int row) {
  const int query = a.group(row);
  return {query, head_kv * a.group_size + row - query * a.group_size};
}

// Of one row, in shared memory.
struct RowTerms {
  float factor;    // of the product with the stored key: to log2 units, or to natural ones where terms follow
  float slope;     // ALiBi
  int center;      // the key at the query's own position
  int begin, end;  // visible keys
};

// Softcap and ALiBi on a logit in natural units; the result is in log2 units. kExact: for float32 queries.
template <bool kExact>
ONEPASS_DEVICE float with_terms(const Problem& p, const RowTerms& row, int key, float logit) {
  if (p.softcap > 0) {
    const float cap = static_cast<float>(p.softcap);
    logit = cap * (kExact ? tanhf(logit / cap) : tanh_by_exp(logit / cap));
  }
  const int ahead = key - row.center;
  logit -= row.slope * static_cast<float>(p.alibi_zero_for_future ? max(-ahead, 0) : abs(ahead));
  return logit * kLog2e;
}

ONEPASS_DEVICE RowTerms row_terms(const DecodeArguments& a, const DeviceSequence& sequence, int batch, RowPlace place,
                                  float factor) {
  const Range keys = visible_keys(a, sequence, place.query);
  float slope = 0.0f;
  if (a.has_terms && a.problem.attention.alibi_slopes != nullptr) {
    const Problem& p = a.problem.attention;
    slope = p.alibi_slopes[batch * p.alibi_batch_stride + place.head];
  }
  return {factor * (a.has_terms ? 1.0f : kLog2e), slope, place.query + sequence.diagonal, keys.begin, keys.end};
}

// Channel d of a query, rotated in float32.
ONEPASS_DEVICE float query_element(const DecodeArguments& a, const DeviceSequence& sequence, int batch, RowPlace place,
                                   int position, int d) {
  const Problem& p = a.problem.attention;
  const std::int64_t row =
      batch * p.q.batch_stride + place.head * p.q.head_stride + (sequence.query_start + place.query) * p.q.token_stride;
  const float x = load_as_float(p.q.data, p.dtype, row + d);
  const RotaryTable& table = a.problem.rotary;
  if (table.cos == nullptr || d >= 2 * table.pairs) return x;
  const int pairs = static_cast<int>(table.pairs);
  const int pair = table.interleaved ? d / 2 : d % pairs;
  const bool second = table.interleaved ? d % 2 : d >= pairs;
  const int partner = table.interleaved ? d ^ 1 : second ? d - pairs : d + pairs;
  const float cosine = load_as_float(table.cos, table.dtype, position * table.cos_stride + pair);
  const float sine = load_as_float(table.sin, table.dtype, position * table.sin_stride + pair);
  const float other = load_as_float(p.q.data, p.dtype, row + partner);
  return second ? fmaf(other, sine, x * cosine) : fmaf(x, cosine, -other * sine);
}

ONEPASS_DEVICE void store_element(void* data, DType dtype, std::int64_t index, float x) {
  if (dtype == DType::kFloat16) {
    static_cast<__half*>(data)[index] = from_float<__half>(x);
  } else if (dtype == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(x);
  } else {
    static_cast<float*>(data)[index] = x;
  }
}

// Channels [d, d + 4) of an output row. kPlain: see is_plain().
template <bool kPlain = false>
ONEPASS_DEVICE void store_output(const DecodeArguments& a, int batch, int head, std::int64_t token, int d, float4 x) {
  const std::int64_t index = batch * a.out.batch_stride + head * a.out.head_stride + token * a.out.token_stride + d;
  if (kPlain || (d + 4 <= a.head_dim_v && a.vectorized_out)) {
    if (!kPlain && a.dtype == DType::kFloat32) {
      *reinterpret_cast<float4*>(static_cast<float*>(a.out.data) + index) = x;
    } else {
      const bool half = a.dtype == DType::kFloat16;
      const uint2 packed{half ? pack<__half>(x.x, x.y) : pack<__nv_bfloat16>(x.x, x.y),
                         half ? pack<__half>(x.z, x.w) : pack<__nv_bfloat16>(x.z, x.w)};
      *reinterpret_cast<uint2*>(static_cast<__half*>(a.out.data) + index) = packed;
    }
    return;
  }
  const float elements[] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (d + i < a.head_dim_v) store_element(a.out.data, a.dtype, index + i, elements[i]);
  }
}

ONEPASS_DEVICE RowEnd end_of(const PartialState& row, const DecodeArguments& a, int head) {
  const bool none = row.largest == -kInfinity;  // a row of NaNs has a sum, but no maximum
  return finish_row(a.sinks, a.sinks_dtype, head, none ? 0.0f : row.largest, 1.0f, kLn2, false, row.rounded, row.sum,
                    none, 1.0f);
}

// Takes one more part into a row; the factors of the output so far and of the part's.
ONEPASS_DEVICE float2 add_part(PartialState& row, const PartialState& part) {
  const float before = row.largest == -kInfinity ? 0.0f : row.largest;
  const float its_base = part.largest == -kInfinity ? 0.0f : part.largest;
  row.largest = fmaxf(row.largest, part.largest);
  const float base = row.largest == -kInfinity ? 0.0f : row.largest;
  const float mine = row.sum == 0.0f ? 0.0f : exp2_approx(before - base);
  const float its = part.sum == 0.0f ? 0.0f : exp2_approx(its_base - base);
  row.sum = mine * row.sum + its * part.sum;
  row.rounded = mine * row.rounded + its * part.rounded;
  row.repaired += part.repaired;
  return {mine, its};
}

// An element of a cache's storage, unscaled.
template <DType kStorage>
ONEPASS_DEVICE float stored_element(const void* data, std::int64_t index) {
  if constexpr (kStorage == DType::kInt8) {
    return static_cast<const std::int8_t*>(data)[index];
  } else if constexpr (kStorage == DType::kFloat8E4M3 || kStorage == DType::kFloat8E5M2) {
    const std::uint32_t halves = widen<kStorage>(static_cast<const std::uint8_t*>(data)[index]).x;
    return __half2float(__ushort_as_half(static_cast<unsigned short>(halves)));
  } else {
    return load_as_float(data, kStorage, index);
  }
}

ONEPASS_DEVICE float stored_element(const void* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::kInt8: return stored_element<DType::kInt8>(data, index);
    case DType::kFloat8E4M3: return stored_element<DType::kFloat8E4M3>(data, index);
    case DType::kFloat8E5M2: return stored_element<DType::kFloat8E5M2>(data, index);
    default: return load_as_float(data, dtype, index);
  }
}

// Adds to row pair_row of a pair, which the calling warp has written, the infinities and NaNs among the values that it
// sees, as they were left out: as stored, or after the scale and the conversion to the queries' type.
static __device__ __noinline__ void restore_values(const DecodeArguments& a, int batch, int head_kv, int pair_row,
                                                   bool converted) {
  const DeviceSequence sequence = cached_sequence(a, batch);
  const RowPlace place = place_of(a, head_kv, pair_row);
  const Problem& p = a.problem.attention;
  const KVStorage& cache = a.problem.cache;
  const Range keys = visible_keys(a, sequence, place.query);
  const std::int64_t row = batch * p.out.batch_stride + place.head * p.out.head_stride +
                           (sequence.query_start + place.query) * p.out.token_stride;
  const bool grouped = cache.granularity == ScaleGranularity::kGroup;
  for (int d = threadIdx.x % 32; d < p.head_dim_v; d += 32) {
    float sum = load_as_float(p.out.data, p.dtype, row + d);
    for (int key = keys.begin; key < keys.end; ++key) {
      const TokenSlot slot = slot_of(cache, a.block_tokens, batch, key);
      if (slot.block < 0) continue;
      float value = stored_element(cache.v.data, cache.dtype, offset_in(cache.v, slot, head_kv) + d);
      if (converted) {
        if (cache.v_scale.data != nullptr) {
          const int group = grouped ? d / static_cast<int>(cache.group_channels) : 0;
          value *= cache.v_scale.data[offset_in(cache.v_scale, slot, head_kv) + group];
        }
        if (p.dtype == DType::kFloat16) value = to_float(from_float<__half>(value));
        if (p.dtype == DType::kBFloat16) value = to_float(from_float<__nv_bfloat16>(value));
      }
      if (!(fabsf(value) < kInfinity)) sum += value;
    }
    store_element(p.out.data, p.dtype, row + d, sum);
  }
}

}  // namespace onepass::cuda
