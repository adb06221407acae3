// cuda/portable/decode.cuh: few query rows over many cached keys. What counts is how many bytes are on their way: a
// warp loads 4 KB of K and 4 KB of V of its next unit straight into the registers that hold mma fragments while it
// computes, from whatever addresses the rows have.
//
// Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ: tokens, then channels, fill the 16 rows of the mma, query rows its 8 columns. The order of
// channels within a product is free, so that a lane's 16 bytes of a row are fragments as they stand. 8-bit storage is
// widened to float16, which holds every int8, e4m3 and e5m2; its queries are scaled into float16's range.
#pragma once

#include <algorithm>

#include "cuda/portable/decode_finish.cuh"
#include "cuda/portable/decode_share.cuh"
#include "cuda/portable/fragment.cuh"

namespace onepass::cuda {

// T: what the tensor cores multiply. kColumnTiles: of 8 query rows. kPlain: a call without options beyond causality. At
// small sizes most of the time goes into fetching instructions that run once, so those calls have less of them.
template <class T_, DType kStorage_, int kHeadDim_, int kColumnTiles_, bool kPlain_>
struct DecodeConfig {
  using T = T_;
  static constexpr DType kStorage = kStorage_;
  static constexpr int kHeadDim = kHeadDim_, kColumnTiles = kColumnTiles_;
  static constexpr bool kPlain = kPlain_;
  static constexpr bool kBytes = kStorage != DType::kFloat16 && kStorage != DType::kBFloat16;
  static constexpr int kRowBytes = kHeadDim * (kBytes ? 1 : 2);
  static constexpr int kTokens = kRowBytes > 128 || kColumnTiles > 1 ? 16 : 32;  // of a unit
  static constexpr int kTokenTiles = kTokens / 16;
  // Of the channels, loaded one after the other: registers hold 4 KB of K a warp, or 2 KB beside large outputs.
  static constexpr int kSlices = std::max(1, kTokens* kRowBytes / (kColumnTiles * kHeadDim > 256 ? 2048 : 4096));
  static constexpr int kKeyPieces = kRowBytes / 64 / kSlices;                 // 16 bytes of a row, a lane and slice
  static constexpr int kValueBytes = std::min(16, kRowBytes / 8 / kSlices);   // of a piece
  static constexpr int kValuePieces = kRowBytes / 8 / kValueBytes / kSlices;  // of a row, a lane and slice
  static constexpr int kChannels = kValueBytes / (kBytes ? 1 : 2);            // of a value piece
  static constexpr int kPairs = kChannels / 2;
  static constexpr int kOutputTiles = kHeadDim / 16;  // [slice][piece][pair of channels]
  static constexpr bool kQueriesInRegisters = kColumnTiles == 1 && kHeadDim <= 128;
  static constexpr bool kProductSums = !kBytes;  // see ForwardConfig; 8-bit weights carry the values' scales

  static constexpr int kWarps = 4;
  // A multiprocessor holds three blocks where 168 registers are enough; int8's scales with every option need more.
  static constexpr int kBlocks = kColumnTiles * kHeadDim > 128 ||
                                         (kStorage == DType::kInt8 && kHeadDim == 128 && !kPlain)
                                     ? 2
                                     : 3;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 8 * kColumnTiles;
  static constexpr int kQueryPitch = kHeadDim * 2 + (kBytes ? 16 : 64);  // bytes: eight rows hit different banks
  static constexpr int kOutputPitch = kHeadDim + 4;                      // floats

  static constexpr int kTermsOffset = kRows * kQueryPitch;
  static constexpr int kSegmentOffset = (kTermsOffset + kRows * static_cast<int>(sizeof(RowTerms)) + 15) / 16 * 16;
  static constexpr int kReaderOffset = kSegmentOffset + 64;
  static constexpr int kStateOffset = kReaderOffset + kWarps * 32;
  static constexpr int kOutputOffset =
      (kStateOffset + kWarps * 8 * static_cast<int>(sizeof(PartialState)) + 15) / 16 * 16;
  static constexpr int kSharedBytes = kOutputOffset + kWarps * 8 * kOutputPitch * 4;
};

// The pair that the block works on, in shared memory: the loop over its units needs few of these.
struct Segment {
  DeviceSequence sequence;
  int rows, here, count;  // units of this block, and of the pair
};

// A warp's next unit. Its units are kWarps apart; the pair that holds the next one is in shared memory.
struct ReaderPair {
  PairUnits units;
  int batch, head;
};
struct Reader {
  int token;    // of this lane, in that unit
  int in_pair;  // units of the pair from that one on
  int left;     // units of the block's share from that one on; none: ≤ 0
};

// Keys of a unit: each of the first kTokens lanes knows one.
struct UnitSlots {
  std::int64_t key, value;  // bytes from the storage's begin
  std::uint32_t live;       // bit t: token t exists and some row sees it
  float key_scale, value_scale;
};

// To the pair that has the unit.
template <class Config>
ONEPASS_DEVICE void settle(Reader& reader, ReaderPair* shared, const DecodeArguments& a) {
  if (reader.in_pair > 0 || reader.left <= 0) return;
  ReaderPair pair = *shared;
#pragma unroll 1
  do {
    if (++pair.head == a.problem.cache.num_heads_kv) {
      pair.head = 0;
      do {
        pair.units = units_of(a, ++pair.batch);  // the share ends before the batch does
      } while (pair.units.count == 0);
    }
    reader.in_pair += pair.units.count;
  } while (reader.in_pair <= 0);
  __syncwarp();
  *shared = pair;
  __syncwarp();
  reader.token = (pair.units.first + pair.units.count - reader.in_pair) * Config::kTokens + lane_id();
}

template <class Config>
ONEPASS_DEVICE UnitSlots find_unit(const DecodeArguments& a, const Reader& reader, const ReaderPair& pair) {
  const KVStorage& cache = a.problem.cache;
  bool live = lane_id() < Config::kTokens && reader.left > 0 && pair.units.keys.contains(reader.token);
  TokenSlot slot{0, 0};
  if (live) slot = slot_of(cache, a.block_tokens, pair.batch, reader.token);
  live = live && slot.block >= 0;
  constexpr int kElementBytes = Config::kBytes ? 1 : 2;
  // A token that is nowhere must not raise the accumulator's unit: its scale is 0 where tokens have scales of their
  // own.
  const float scale = cache.granularity == ScaleGranularity::kTensor ? 1.0f : 0.0f;
  UnitSlots unit{0, 0, __ballot_sync(~0u, live), scale, scale};
  if (live) {
    unit.key = offset_in(cache.k, slot, pair.head) * kElementBytes;
    unit.value = offset_in(cache.v, slot, pair.head) * kElementBytes;
    if constexpr (Config::kStorage == DType::kInt8) {
      if (cache.granularity != ScaleGranularity::kTensor) {
        unit.key_scale = cache.k_scale.data[offset_in(cache.k_scale, slot, pair.head)];
        unit.value_scale = cache.v_scale.data[offset_in(cache.v_scale, slot, pair.head)];
      }
    }
  }
  return unit;
}

// Token rows g, 8 + g, … of a unit; lane t of a quad takes every fourth piece.
template <class Config>
ONEPASS_DEVICE void request_keys(uint4 (&data)[Config::kTokens / 8][Config::kKeyPieces], const KVStorage& cache,
                                 const UnitSlots& unit, int slice) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int row_bytes = static_cast<int>(cache.head_dim) * (Config::kBytes ? 1 : 2);
#pragma unroll
  for (int r = 0; r < Config::kTokens / 8; ++r) {
    const std::int64_t offset = __shfl_sync(~0u, unit.key, 8 * r + g);
    const bool live = unit.live >> (8 * r + g) & 1;
#pragma unroll
    for (int c = 0; c < Config::kKeyPieces; ++c) {
      const int column = (slice * Config::kKeyPieces + c) * 64 + 16 * t;
      load_streamed<16>(data[r][c], static_cast<const char*>(cache.k.data) + offset + column,
                        live && column < row_bytes);
    }
  }
}

// Tokens 2t, 2t + 1, 8 + 2t and 9 + 2t of every 16; lane g takes every eighth piece.
template <class Config>
ONEPASS_DEVICE void request_values(uint4 (&data)[Config::kTokenTiles][4][Config::kValuePieces], const KVStorage& cache,
                                   const UnitSlots& unit, int slice) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int row_bytes = static_cast<int>(cache.head_dim_v) * (Config::kBytes ? 1 : 2);
#pragma unroll
  for (int m = 0; m < Config::kTokenTiles; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 16 * m + 8 * (i / 2) + 2 * t + i % 2;
      const std::int64_t offset = __shfl_sync(~0u, unit.value, token);
      const bool live = unit.live >> token & 1;
#pragma unroll
      for (int c = 0; c < Config::kValuePieces; ++c) {
        const int column = ((slice * Config::kValuePieces + c) * 8 + g) * Config::kValueBytes;
        load_streamed<Config::kValueBytes>(data[m][i][c], static_cast<const char*>(cache.v.data) + offset + column,
                                           live && column < row_bytes);
      }
    }
}

// The queries of a pair as T, rotated, scaled by a power of two into T's range where they are of another type; zeros
// behind the last row and channel. One warp a row.
template <class Config>
ONEPASS_DEVICE void prepare_rows(const DecodeArguments& a, const DeviceSequence& sequence, int batch, int head_kv,
                                 int rows, unsigned char* shared) {
  const Problem& p = a.problem.attention;
  const KVStorage& cache = a.problem.cache;
  const int lane = lane_id();
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
    const auto* const source = static_cast<const unsigned short*>(p.q.data) + batch * p.q.batch_stride +
                               place.head * p.q.head_stride + (sequence.query_start + place.query) * p.q.token_stride;
    float x[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + 32 * i;
      const unsigned short bits = d < p.head_dim ? source[d] : 0;
      x[i] = p.dtype == DType::kBFloat16 ? __uint_as_float(std::uint32_t{bits} << 16)
                                         : __half2float(__ushort_as_half(bits));
    }
    if (a.problem.rotary.cos != nullptr) {
      // By way of shared memory, so that there is one copy of the code; nobody uses these rows yet.
      auto* const rotated =
          reinterpret_cast<float*>(shared + Config::kOutputOffset) + r % Config::kWarps * Config::kHeadDim;
      const int position = rotary_position(a.problem.rotary, cache, sequence, batch, place.query);
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
    float factor = p.softmax_scale;
    if (std::is_same_v<typename Config::T, __half> && p.dtype != DType::kFloat16) {
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
      if (Config::kBytes && cache.granularity == ScaleGranularity::kTensor) factor *= cache.k_scale.data[0];
      *terms = row_terms(a, sequence, batch, place, factor);
    }
  }
}

// What a warp accumulates over its units of one pair. A lane's columns are query rows 8n + 2·(lane%4) + e.
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

// Four channels of a query: those of one step of a lane's piece of a key.
template <class Config>
ONEPASS_DEVICE uint2 query_fragment(const unsigned char* shared, int row, int step) {
  return *reinterpret_cast<const uint2*>(shared + row * Config::kQueryPitch + 8 * step);
}

template <class Config>
ONEPASS_DEVICE void multiply_keys(float (&s)[Config::kTokenTiles][Config::kColumnTiles][4],
                                  const uint4 (&keys)[Config::kTokens / 8][Config::kKeyPieces], int slice, int tiles,
                                  const uint2* query_fragments, const unsigned char* shared) {
  using T = typename Config::T;
  constexpr int M = Config::kTokenTiles, kSteps = Config::kBytes ? 4 : 2;  // mma of one piece
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int c = 0; c < Config::kKeyPieces; ++c)
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int piece = slice * Config::kKeyPieces + c;
      std::uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const auto* const upper = &keys[2 * m][c].x;
        const auto* const lower = &keys[2 * m + 1][c].x;
        if constexpr (Config::kBytes) {
          const HalfQuad up = widen<Config::kStorage>(upper[step]), low = widen<Config::kStorage>(lower[step]);
          a[m][0] = up.x, a[m][1] = low.x, a[m][2] = up.y, a[m][3] = low.y;
        } else {
          a[m][0] = upper[2 * step], a[m][1] = lower[2 * step];
          a[m][2] = upper[2 * step + 1], a[m][3] = lower[2 * step + 1];
        }
      }
#pragma unroll
      for (int n = 0; n < Config::kColumnTiles; ++n) {
        if (n >= tiles) break;
        uint2 q;
        if constexpr (Config::kQueriesInRegisters) {
          q = query_fragments[piece * kSteps + step];
        } else {
          q = query_fragment<Config>(shared, 8 * n + g, (piece * 4 + t) * kSteps + step);
        }
#pragma unroll
        for (int m = 0; m < M; ++m) mma<T>(s[m][n], a[m], q.x, q.y);
      }
    }
}

// weights[n][2m + i]: of tokens 16m + 8i + 2t + {0, 1} for query row 8n + g.
template <class Config>
ONEPASS_DEVICE void multiply_values(DecodeState<Config>& state,
                                    const uint4 (&values)[Config::kTokenTiles][4][Config::kValuePieces], int slice,
                                    int tiles,
                                    const std::uint32_t (&weights)[Config::kColumnTiles][2 * Config::kTokenTiles]) {
  using T = typename Config::T;
#pragma unroll
  for (int m = 0; m < Config::kTokenTiles; ++m)
#pragma unroll
    for (int c = 0; c < Config::kValuePieces; ++c)
#pragma unroll
      for (int w = 0; w < Config::kValueBytes / 4; ++w) {
        const auto word = [&](int i) {
          const uint4& x = values[m][i][c];
          return w == 0 ? x.x : w == 1 ? x.y : w == 2 ? x.z : x.w;
        };
        constexpr int kOfWord = Config::kBytes ? 2 : 1;  // mma of one word
        const int tile = (slice * Config::kValuePieces + c) * Config::kPairs + w * kOfWord;
#pragma unroll
        for (int i = 0; i < kOfWord; ++i) {
          // Rows g and 8 + g of the mma are two neighbouring channels; each register pairs two tokens.
          std::uint32_t a[4];
          if constexpr (Config::kBytes) {
            const int select = i == 0 ? 0x5140 : 0x7362;
            const HalfQuad low = widen<Config::kStorage>(__byte_perm(word(0), word(1), select));
            const HalfQuad high = widen<Config::kStorage>(__byte_perm(word(2), word(3), select));
            a[0] = low.x, a[1] = low.y, a[2] = high.x, a[3] = high.y;
          } else {
            a[0] = __byte_perm(word(0), word(1), 0x5410), a[1] = __byte_perm(word(0), word(1), 0x7632);
            a[2] = __byte_perm(word(2), word(3), 0x5410), a[3] = __byte_perm(word(2), word(3), 0x7632);
          }
#pragma unroll
          for (int n = 0; n < Config::kColumnTiles; ++n) {
            if (n < tiles) mma<T>(state.out[n][tile + i], a, weights[n][2 * m], weights[n][2 * m + 1]);
          }
        }
      }
}

// The first channel of [slice][piece] for this lane.
template <class Config>
ONEPASS_DEVICE int first_channel(int piece) {
  return (piece * 8 + lane_id() / 4) * Config::kChannels;
}

// Puts eight rows of every warp's state into shared memory.
template <class Config>
ONEPASS_DEVICE void share_state(const DecodeState<Config>& state, int n, unsigned char* shared) {
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
    float* const row = out + (2 * t + e) * Config::kOutputPitch;
#pragma unroll
    for (int piece = 0; piece < Config::kOutputTiles / Config::kPairs; ++piece)
#pragma unroll
      for (int i = 0; i < Config::kPairs; i += 2) {
        const float(&x)[4] = state.out[n][piece * Config::kPairs + i];
        const float(&y)[4] = state.out[n][piece * Config::kPairs + i + 1];
        *reinterpret_cast<float4*>(row + first_channel<Config>(piece) + 2 * i) = {x[e] * unit, x[2 + e] * unit,
                                                                                  y[e] * unit, y[2 + e] * unit};
      }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    decode_kernel(const __grid_constant__ DecodeArguments arguments) {
  using T = typename Config::T;
  constexpr int M = Config::kTokenTiles, N = Config::kColumnTiles, kSlices = Config::kSlices;
  extern __shared__ __align__(128) unsigned char shared[];
  const ArgumentView<Config::kPlain> a = view_of<Config::kPlain>(arguments);
  const KVStorage& cache = a.problem.cache;
  const Problem& p = a.problem.attention;
  const int lane = lane_id(), warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

  wait_for_previous_grid();
  allow_next_grid();
  const Share share = a.parts > 0 ? fixed_share(a) : equal_share(a, Config::kWarps);
  if (share.left == 0) return;

  static_assert(sizeof(Segment) <= 64 && sizeof(ReaderPair) <= 32);
  auto* const segment = reinterpret_cast<Segment*>(shared + Config::kSegmentOffset);
  auto* const reading = reinterpret_cast<ReaderPair*>(shared + Config::kReaderOffset) + warp;
  const auto* const terms = reinterpret_cast<const RowTerms*>(shared + Config::kTermsOffset);
  // One unit before the first: the loop below begins with a turn that only requests.
  Reader reader{(share.pair.first + share.unit + warp - Config::kWarps) * Config::kTokens + lane,
                share.pair.count - share.unit - warp + Config::kWarps, share.left - warp + Config::kWarps};
  *reading = {share.pair, share.batch, share.head};
  __syncwarp();
  uint4 keys[Config::kTokens / 8][Config::kKeyPieces], values[M][4][Config::kValuePieces];
  UnitSlots next{};

  int batch = share.batch, head = share.head, first_unit = share.unit;
  int done = -1;  // units of the share in earlier pairs; −1: nothing has been requested yet
  do {
    Range all{0, 0};
    bool differ = false;
    const bool computes = done >= 0;
    int tiles = 0, units = 1;  // of this warp in this pair
    uint2 query_fragments[Config::kQueriesInRegisters ? Config::kHeadDim / 16 : 1] = {};
    float factor[2] = {};
    DecodeState<Config> state;
    const bool own_scales = Config::kStorage == DType::kInt8 && cache.granularity != ScaleGranularity::kTensor;
    if (computes) {
      const DeviceSequence sequence = cached_sequence(a, batch);
      const PairUnits pair = units_of(a, sequence, 0);
      if (pair.count == 0) {
        ++batch;
        continue;
      }
      const int rows = sequence.seqlen_q * a.group_size, here = min(pair.count - first_unit, share.left - done);
      all = tile_keys(a, sequence, 0, sequence.seqlen_q - 1).all;
      differ = all.begin != pair.keys.begin || all.end != pair.keys.end;
      tiles = (rows + 7) / 8;
      constexpr int W = Config::kWarps;
      units = (done + here - warp + W - 1) / W - (done - warp + W - 1) / W;
      if (threadIdx.x == 0) *segment = {sequence, rows, here, pair.count};
      prepare_rows<Config>(a, sequence, batch, head, rows, shared);
      __syncthreads();
      if constexpr (Config::kQueriesInRegisters) {
        constexpr int kSteps = Config::kBytes ? 4 : 2;
#pragma unroll
        for (int i = 0; i < Config::kHeadDim / 16; ++i) {
          query_fragments[i] = query_fragment<Config>(shared, g, (i / kSteps * 4 + t) * kSteps + i % kSteps);
        }
      }
      if constexpr (N == 1) factor[0] = terms[2 * t].factor, factor[1] = terms[2 * t + 1].factor;
      if (!own_scales) {
        state.unit = Config::kBytes && cache.granularity == ScaleGranularity::kTensor ? cache.v_scale.data[0] : 1.0f;
      }
    }
    const auto* const lane_terms = terms + 2 * t;  // of the lane's first column

#pragma unroll 1
    for (; units > 0; --units) {
      const UnitSlots unit = next;
      const int first_token = __shfl_sync(~0u, reader.token, 0);
      reader.token += Config::kWarps * Config::kTokens;
      reader.in_pair -= Config::kWarps;
      reader.left -= Config::kWarps;
      settle<Config>(reader, reading, a);
      next = find_unit<Config>(a, reader, *reading);

      float s[M][N][4] = {};
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        if (computes) multiply_keys<Config>(s, keys, slice, tiles, query_fragments, shared);
        // With many columns the registers of keys are needed until the weights are packed.
        if (N == 1 || slice + 1 < kSlices) {
          request_keys<Config>(keys, cache, slice + 1 < kSlices ? unit : next, (slice + 1) % kSlices);
        }
      }

      bool masked = false;
      std::uint32_t weights[N][2 * M];
      if (computes) {
        masked = first_token < all.begin || first_token + Config::kTokens > all.end ||
                 (Config::kTokens == 32 ? unit.live != ~0u : unit.live != 0xFFFFu);
        [[maybe_unused]] float value_scales[M][2];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float key_scale = 1.0f;
            if constexpr (Config::kStorage == DType::kInt8) {
              key_scale = __shfl_sync(~0u, unit.key_scale, 16 * m + 8 * half + g);
              value_scales[m][half] = __shfl_sync(~0u, unit.value_scale, 16 * m + 8 * half + g);
            }
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const float of_row = N == 1 ? factor[e] : lane_terms[8 * n + e].factor;
                s[m][n][2 * half + e] *= of_row * key_scale;
              }
          }
        if (a.has_terms || masked) {
#pragma unroll
          for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const RowTerms row = lane_terms[8 * n + e];
#pragma unroll
              for (int i = 0; i < 2 * M; ++i) {
                const int token = 8 * i + g, key = first_token + token;
                float& x = s[i / 2][n][2 * (i % 2) + e];
                if (a.has_terms) x = with_terms<false>(p, row, key, x);
                if (key < row.begin || key >= row.end || !(unit.live >> token & 1)) x = -kInfinity;
              }
            }
        }

        weigh(state, s);

        if constexpr (Config::kStorage == DType::kInt8) {
          if (own_scales) {
            follow_scales(state, unit.value_scale);
            const float inverse = state.unit > 0.0f ? 1.0f / state.unit : 1.0f;
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
              for (int n = 0; n < N; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                  const float x = s[m][n][i] * (value_scales[m][i / 2] * inverse);
                  s[m][n][i] = s[m][n][i] == 0.0f ? 0.0f : x;  // a hidden token's scale may be anything
                }
          }
        }
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 0; i < 2 * M; ++i) {
            const std::uint32_t packed = pack<T>(s[i / 2][n][2 * (i % 2)], s[i / 2][n][2 * (i % 2) + 1]);
            if constexpr (Config::kProductSums) add_pair<T>(state.rounded[n], packed);
            weights[n][i] = transpose_matrix(packed);
          }
      }

      if constexpr (N > 1) request_keys<Config>(keys, cache, next, 0);
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        if (Config::kStorage != DType::kInt8 && masked && differ) {
          bool found = false;
#pragma unroll
          for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int c = 0; c < Config::kValuePieces; ++c) {
                uint4& x = values[m][i][c];
                found |= make_word_finite<Config::kStorage>(x.x) | make_word_finite<Config::kStorage>(x.y) |
                         make_word_finite<Config::kStorage>(x.z) | make_word_finite<Config::kStorage>(x.w);
              }
          state.repaired |= __any_sync(~0u, found);
        }
        if (computes) multiply_values<Config>(state, values, slice, tiles, weights);
        request_values<Config>(values, cache, slice + 1 < kSlices ? unit : next, (slice + 1) % kSlices);
      }
    }

    if (!computes) {
      done = 0;
      continue;
    }

    // A part of the pair that others continue: its first block has it in slot 2i + 1, all others in 2i.
    const int here = segment->here;
    std::int64_t slot = -1;
    if (here < segment->count) {
      slot = a.parts > 0 ? blockIdx.x : 2 * std::int64_t{blockIdx.x} + (first_unit == 0 ? 1 : 0);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n >= tiles) break;
      if (n > 0) __syncthreads();
      share_state(state, n, shared);
      __syncthreads();
      finish_rows<Config>(a, arguments, segment->sequence, batch, head, 8 * n, segment->rows,
                          slot < 0 ? -1 : slot * a.rows + 8 * n, shared);
    }
    done += here;
    first_unit = 0;
    if (++head == cache.num_heads_kv) {
      head = 0;
      ++batch;
    }
  } while (done < share.left);
}

}  // namespace onepass::cuda
