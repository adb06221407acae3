// cuda/portable/decode_queries.cuh: the queries of a pair, and what its rows need beside them.
#pragma once

#include "cuda/portable/decode_config.cuh"
#include "cuda/portable/fragment.cuh"

namespace onepass::cuda {

// The queries of a pair as T, rotated, scaled by a power of two into T's range where they are of another type; zeros
// behind the last row and channel. One warp a row.
template <class Config>
ONEPASS_DEVICE void prepare_rows(const DecodeArguments& a, const DeviceSequence& sequence, int batch, int head_kv,
                                 int rows, unsigned char* shared) {
  const int lane = lane_id();
  const int head_dim = Config::kPlain ? Config::kHeadDim : static_cast<int>(a.problem.attention.head_dim);
  constexpr int kPerLane = Config::kHeadDim / 32;
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < Config::kRows; r += Config::kWarps) {
    auto* const row = reinterpret_cast<typename Config::T*>(shared + r * Config::kQueryPitch);
    auto* const terms = reinterpret_cast<RowTerms*>(shared + Config::kTermsOffset) + r;
    if (r >= rows) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) row[lane + 32 * i] = from_float<typename Config::T>(0.0f);
      if (lane == 0) *terms = RowTerms{};
      continue;
    }
    const RowPlace place = place_of(a, head_kv, r);
    const auto* const source = static_cast<const unsigned short*>(a.q.data) + batch * a.q.batch_stride +
                               place.head * a.q.head_stride + (sequence.query_start + place.query) * a.q.token_stride;
    float x[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + 32 * i;
      const unsigned short bits = d < head_dim ? source[d] : 0;
      x[i] = a.dtype == DType::kBFloat16 ? __uint_as_float(std::uint32_t{bits} << 16)
                                         : __half2float(__ushort_as_half(bits));
    }
    if (!Config::kPlain && a.problem.rotary.cos != nullptr) {
      // By way of shared memory, so that there is one copy of the code; nobody uses these rows yet.
      auto* const rotated =
          reinterpret_cast<float*>(shared + Config::kOutputOffset) + r % Config::kWarps * Config::kHeadDim;
      const int position = rotary_position(a.problem.rotary, a.problem.cache, sequence, batch, place.query);
#pragma unroll 1
      for (int d = lane; d < 2 * a.problem.rotary.pairs; d += 32) {
        rotated[d] = query_element(a, sequence, batch, place, position, d);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (lane + 32 * i < 2 * a.problem.rotary.pairs) x[i] = rotated[lane + 32 * i];
      }
    }
    float factor = a.softmax_scale;
    if (std::is_same_v<typename Config::T, __half> && a.dtype != DType::kFloat16) {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) largest = fmaxf(largest, fabsf(x[i]));
      const std::uint32_t exponent = __reduce_max_sync(~0u, __float_as_uint(largest)) & 0x7F800000u;
      // 2^e and 2^−e, for what has both as normal numbers.
      if (exponent > 0 && exponent < 0x7E800000u) {
        factor *= __uint_as_float(exponent);
        const float inverse = __uint_as_float(0x7F000000u - exponent);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) x[i] *= inverse;
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) row[lane + 32 * i] = from_float<typename Config::T>(x[i]);
    if (lane == 0) {
      const KVStorage& cache = a.problem.cache;
      if (Config::kBytes && cache.granularity == ScaleGranularity::kTensor) factor *= cache.k_scale.data[0];
      *terms = row_terms(a, sequence, batch, place, factor);
    }
  }
}

// Plain calls of queries that are T: asks for those of a pair, and zeros behind the last row, by all threads. The
// caller waits for the copies.
template <class Config>
ONEPASS_DEVICE void request_queries(const DecodeArguments& a, int batch, int head_kv, unsigned char* shared) {
  constexpr int kPieces = Config::kHeadDim / 8;  // of 16 bytes
  const int rows = a.seqlen_q * a.group_size;
#pragma unroll
  for (int i = 0; i < Config::kRows * kPieces; i += Config::kThreads) {
    const int r = (i + threadIdx.x) / kPieces, piece = (i + threadIdx.x) % kPieces;
    if (r >= Config::kRows) break;
    const RowPlace place = place_of(a, head_kv, min(r, rows - 1));
    const auto* const row = static_cast<const unsigned short*>(a.q.data) + batch * a.q.batch_stride +
                            place.head * a.q.head_stride + place.query * a.q.token_stride;
    cp_async_16(shared_address(shared + r * Config::kQueryPitch + 16 * piece), row + 8 * piece, r < rows);
  }
  cp_async_commit();
}

// Plain calls of queries that are T: of up to eight rows, the fragments of row lane/4, from where they are.
template <class Config>
ONEPASS_DEVICE void load_query_fragments(uint2 (&fragments)[Config::kHeadDim / 16], const DecodeArguments& a, int batch,
                                         int head_kv) {
  const RowPlace place = place_of(a, head_kv, min(lane_id() / 4, a.seqlen_q * a.group_size - 1));
  const auto* const row =
      static_cast<const uint4*>(a.q.data) +
      (batch * a.q.batch_stride + place.head * a.q.head_stride + place.query * a.q.token_stride) / 8;
#pragma unroll
  for (int piece = 0; piece < Config::kHeadDim / 32; ++piece) {
    const uint4 x = row[4 * piece + lane_id() % 4];
    fragments[2 * piece] = {x.x, x.y};
    fragments[2 * piece + 1] = {x.z, x.w};
  }
}

}  // namespace onepass::cuda
