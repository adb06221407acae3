// cuda/portable/cached_tile.cuh: the forward kernel over a cache. One block computes a tile of a pair's rows, all heads
// of the group together, so that keys are read once for the group. Rows of the cache come through a list of slots, one
// block of keys ahead; storage of another type is converted to that of the queries on its way into shared memory.
#pragma once

#include "cuda/portable/cached_tile.h"
#include "cuda/portable/decode_rows.cuh"
#include "cuda/portable/forward.cuh"

namespace onepass::cuda {

template <class T_, int kHeadDim_>
struct CachedTileConfig {
  using T = T_;
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kHeadDim = kHeadDim_;
  using Shape = ForwardTile<kFloat, kHeadDim, false>;
  static constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys, kWarps = Shape::kWarps;
  static constexpr int kThreads = 32 * kWarps, kRowsPerWarp = kQueries / kWarps;
  static constexpr int R = kRowsPerWarp / 16, C = kKeys / 8, CO = kHeadDim / 8;
  // As in ForwardConfig.
  static constexpr bool kCrowded = !kFloat && kHeadDim > 64;
  static constexpr bool kProductSums = kHeadDim > 64 || !std::is_same_v<T, __nv_bfloat16>;

  using QueryTile = SharedTile<T, kQueries, kHeadDim>;
  using KeyTile = SharedTile<T, kKeys, kHeadDim>;
  using WeightTile = FloatTile<kQueries, kKeys>;
  static constexpr int kKeyOffset = QueryTile::kBytes;
  static constexpr int kValueOffset = kKeyOffset + KeyTile::kBytes;
  static constexpr int kWeightOffset = kValueOffset + KeyTile::kBytes;
  static constexpr int kTermsOffset = kWeightOffset + (kFloat ? WeightTile::kBytes : 0);
  static constexpr int kSlotOffset = kTermsOffset + kQueries * static_cast<int>(sizeof(RowTerms));
  static constexpr int kSharedBytes = kSlotOffset + 2 * kKeys * static_cast<int>(sizeof(TokenSlot));
};

// One of K and V of a pair.
struct CachedRows {
  const Operand& stored;
  const CacheScale& scale;
  int head, columns;
  bool direct, aligned;
};

// Elements [column, column + kElements) of a stored row, scaled, as T.
template <class T, int kElements>
ONEPASS_DEVICE uint4 convert_chunk(const KVStorage& cache, const CachedRows& rows, TokenSlot slot, int column) {
  const std::int64_t offset = offset_in(rows.stored, slot, rows.head);
  const float* const scales =
      rows.scale.data != nullptr ? rows.scale.data + offset_in(rows.scale, slot, rows.head) : nullptr;
  float x[kElements];
  if (rows.aligned) {
    const auto* const source = static_cast<const unsigned char*>(rows.stored.data) + offset + column;
    std::uint32_t words[kElements / 4];
#pragma unroll
    for (int w = 0; w < kElements / 4; ++w) words[w] = reinterpret_cast<const std::uint32_t*>(source)[w];
#pragma unroll
    for (int w = 0; w < kElements / 4; ++w) {
      const HalfQuad quad = cache.dtype == DType::kInt8         ? widen<DType::kInt8>(words[w])
                            : cache.dtype == DType::kFloat8E4M3 ? widen<DType::kFloat8E4M3>(words[w])
                                                                : widen<DType::kFloat8E5M2>(words[w]);
      const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&quad.x));
      const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&quad.y));
      x[4 * w] = low.x, x[4 * w + 1] = low.y, x[4 * w + 2] = high.x, x[4 * w + 3] = high.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      x[i] = column + i < rows.columns ? stored_element(rows.stored.data, cache.dtype, offset + column + i) : 0.0f;
    }
  }
  if (scales != nullptr) {
    const bool grouped = cache.granularity == ScaleGranularity::kGroup;
    const int group = static_cast<int>(cache.group_channels);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (column + i < rows.columns) x[i] *= scales[grouped ? (column + i) / group : 0];
    }
  }
  uint4 chunk;
  if constexpr (kElements == 4) {
    chunk = {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  } else {
    chunk = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
  }
  return chunk;
}

// Fills a tile with the rows of a block of keys; slots that are nowhere give zeros. Complete after cp_async_wait and
// __syncthreads.
template <class Config>
ONEPASS_DEVICE void load_cached(std::uint32_t tile, const KVStorage& cache, const CachedRows& rows,
                                const TokenSlot* slots) {
  using T = typename Config::T;
  using Tile = typename Config::KeyTile;
  constexpr int kElements = Tile::kElementsPerChunk;
#pragma unroll 4
  for (int index = opaque(threadIdx.x); index < Config::kKeys * Tile::kChunks; index += Config::kThreads) {
    const int row = index / Tile::kChunks, chunk = index % Tile::kChunks, column = chunk * kElements;
    const TokenSlot slot = slots[row];
    const bool live = slot.block >= 0 && column < rows.columns;
    const std::uint32_t destination = tile + Tile::offset(row, chunk);
    if (rows.direct) {
      const std::int64_t offset = live ? offset_in(rows.stored, slot, rows.head) + column : 0;
      cp_async_16(destination, static_cast<const T*>(rows.stored.data) + offset, live);
    } else {
      store_shared(destination, live ? convert_chunk<T, kElements>(cache, rows, slot, column) : uint4{0, 0, 0, 0});
    }
  }
}

// Queries of a tile's rows, rotated in float32, and what their logits need.
template <class Config>
ONEPASS_DEVICE void load_queries(const CachedTileArguments& arguments, const DeviceSequence& sequence, int batch,
                                 int head_kv, int first_row, int live_rows, unsigned char* shared) {
  using T = typename Config::T;
  using Tile = typename Config::QueryTile;
  constexpr int kElements = Tile::kElementsPerChunk;
  const DecodeArguments& a = arguments.rows;
  const Problem& p = a.problem.attention;
  const std::uint32_t tile = shared_address(shared);
  const bool rotated = a.problem.rotary.cos != nullptr;
#pragma unroll 1
  for (int index = threadIdx.x; index < Config::kQueries * Tile::kChunks; index += Config::kThreads) {
    const int row = index / Tile::kChunks, chunk = index % Tile::kChunks, column = chunk * kElements;
    const bool live = row < live_rows && column < p.head_dim;
    const RowPlace place = place_of(a, head_kv, first_row + min(row, live_rows - 1));
    const std::uint32_t destination = tile + Tile::offset(row, chunk);
    if (arguments.vectorized_q && !rotated) {
      const std::int64_t offset = batch * p.q.batch_stride + place.head * p.q.head_stride +
                                  (sequence.query_start + place.query) * p.q.token_stride + column;
      cp_async_16(destination, static_cast<const T*>(p.q.data) + (live ? offset : 0), live);
      continue;
    }
    const int position = rotated ? rotary_position(a.problem.rotary, a.problem.cache, sequence, batch, place.query) : 0;
    uint4 packed;
    T* const elements = reinterpret_cast<T*>(&packed);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const bool inside = live && column + i < p.head_dim;
      elements[i] = from_float<T>(inside ? query_element(a, sequence, batch, place, position, column + i) : 0.0f);
    }
    store_shared(destination, packed);
  }
  auto* const terms = reinterpret_cast<RowTerms*>(shared + Config::kTermsOffset);
  for (int row = threadIdx.x; row < Config::kQueries; row += Config::kThreads) {
    const RowPlace place = place_of(a, head_kv, first_row + min(row, live_rows - 1));
    terms[row] =
        row < live_rows ? row_terms(a, sequence, batch, place, static_cast<float>(p.softmax_scale)) : RowTerms{};
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::Shape::kBlocksPerMultiprocessor)
    cached_tile_kernel(const __grid_constant__ CachedTileArguments arguments) {
  using T = typename Config::T;
  using KeyTile = typename Config::KeyTile;
  constexpr int R = Config::R, C = Config::C, CO = Config::CO, kKeys = Config::kKeys;
  extern __shared__ __align__(128) unsigned char shared[];
  allow_next_grid();
  wait_for_previous_grid();
  const DecodeArguments& a = arguments.rows;
  const Problem& p = a.problem.attention;
  const KVStorage& cache = a.problem.cache;
  // A tile of every pair before the next tile; where a mask makes later rows longer, those come first.
  const int heads = static_cast<int>(cache.num_heads_kv), pairs = static_cast<int>(p.batch) * heads;
  const int tile = blockIdx.x / pairs, pair = blockIdx.x % pairs;
  const int batch = pair / heads, head_kv = pair % heads;
  const DeviceSequence sequence = cached_sequence(a, batch);
  const int rows = sequence.seqlen_q * a.group_size;
  const int first_row = (arguments.last_rows_first ? arguments.row_tiles - 1 - tile : tile) * Config::kQueries;
  if (rows < arguments.min_rows || first_row >= rows) return;
  const int live_rows = min(Config::kQueries, rows - first_row);
  const TileKeys visible = tile_keys(a, sequence, a.group(first_row), a.group(first_row + live_rows - 1));

  const CachedRows k{
      cache.k, cache.k_scale, head_kv, static_cast<int>(cache.head_dim), arguments.direct_keys, arguments.aligned_keys};
  const CachedRows v{cache.v,
                     cache.v_scale,
                     head_kv,
                     static_cast<int>(cache.head_dim_v),
                     arguments.direct_values,
                     arguments.aligned_values};
  unsigned char* const key_tile = shared + Config::kKeyOffset;
  unsigned char* const value_tile = shared + Config::kValueOffset;
  const std::uint32_t query_address = shared_address(shared), key_address = shared_address(key_tile),
                      value_address = shared_address(value_tile);
  auto* const slots = reinterpret_cast<TokenSlot*>(shared + Config::kSlotOffset);
  const auto* const terms = reinterpret_cast<const RowTerms*>(shared + Config::kTermsOffset);

  const int warp_row = threadIdx.x / 32 * Config::kRowsPerWarp, g = lane_id() / 4, t = lane_id() % 4;
  const int thread_row = warp_row + g;  // its first row in the tile
  const int first_block = visible.any.begin / kKeys;
  const int end_block = visible.any.begin < visible.any.end ? (visible.any.end + kKeys - 1) / kKeys : first_block;

  // Whether some token of a block is nowhere.
  const auto find_slots = [&](int block) {
    bool missing = false;
    if (threadIdx.x < kKeys) {
      const int key = block * kKeys + static_cast<int>(threadIdx.x);
      TokenSlot slot{-1, 0};
      if (key >= visible.any.begin && key < visible.any.end) {
        slot = slot_of(cache, a.block_tokens, batch, key);
        missing = slot.block < 0;
      }
      slots[block % 2 * kKeys + threadIdx.x] = slot;
    }
    return __syncthreads_or(missing);
  };

  load_queries<Config>(arguments, sequence, batch, head_kv, first_row, live_rows, shared);
  bool missing = false, next_missing = false;
  if (first_block < end_block) {
    next_missing = find_slots(end_block - 1);
    load_cached<Config>(key_address, cache, k, slots + (end_block - 1) % 2 * kKeys);
  }
  cp_async_commit();

  float o[R][CO][4];
  clear(o);
  OnlineSoftmax<2 * R> state;
  float sums[R][4] = {};
  const bool exact_sums = !Config::kProductSums || p.lse.data != nullptr;
  bool repaired = false;

  for (int block = end_block - 1; block >= first_block; --block) {
    const int block_key = block * kKeys;
    missing = next_missing;
    cp_async_wait<0>();
    __syncthreads();  // K of this block is there, and nobody reads V of the last one any more
    load_cached<Config>(value_address, cache, v, slots + block % 2 * kKeys);
    cp_async_commit();

    float s[R][C][4];
    clear(s);
    if constexpr (Config::kFloat) {
      FloatProduct::rows_by_rows<typename Config::QueryTile, KeyTile, Config::kHeadDim>(s, shared, warp_row, key_tile);
    } else {
      HalfProduct<T>::template rows_by_rows<typename Config::QueryTile, KeyTile, Config::kHeadDim>(
          s, query_address, warp_row, key_address);
    }
    const bool masked = missing || block_key < visible.all.begin || block_key + kKeys > visible.all.end;
    if (a.has_terms || masked) {
#pragma unroll
      for (int i = 0; i < 2 * R; ++i) {
        const RowTerms row = terms[opaque(thread_row) + 8 * i];
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[i / 2][c][2 * (i % 2) + e];
            const int column = 8 * c + 2 * t + e, key = block_key + column;
            if (a.has_terms) x = with_terms<Config::kFloat>(p, row, key, x * row.factor);
            if (masked &&
                (key < row.begin || key >= row.end || (missing && slots[block % 2 * kKeys + column].block < 0))) {
              x = -kInfinity;
            }
          }
      }
    }

    cp_async_wait<0>();
    __syncthreads();  // V of this block is there, and nobody reads its K any more
    if constexpr (!Config::kFloat) {
      if (masked) {
        repaired |= __syncthreads_or(make_tile_finite<T, KeyTile, kKeys, Config::kThreads>(value_address));
      }
    }
    const auto load_next = [&] {
      if (block > first_block) {
        next_missing = find_slots(block - 1);
        load_cached<Config>(key_address, cache, k, slots + (block - 1) % 2 * kKeys);
        cp_async_commit();
      }
    };
    if constexpr (!Config::kCrowded) load_next();

    softmax_step<Config::kFloat>(s, o, sums, state, arguments.scale_log2, exact_sums);
    if constexpr (Config::kFloat) {
      RowRanges<R> ranges;
#pragma unroll
      for (int i = 0; i < 2 * R; ++i) {
        const RowTerms row = terms[opaque(thread_row) + 8 * i];
        ranges.row[i] = {row.begin, row.end};
      }
      store_weights<Config>(s, shared + Config::kWeightOffset, warp_row, masked, ranges, block_key + 2 * t);
      __syncwarp();
      FloatProduct::add_row_sums<typename Config::WeightTile, kKeys>(sums, shared + Config::kWeightOffset, warp_row);
      FloatProduct::rows_by_columns<typename Config::WeightTile, KeyTile, kKeys, true>(
          o, shared + Config::kWeightOffset, warp_row, value_tile);
      __syncwarp();
    } else {
      std::uint32_t weights[C / 2][R][4];
      HalfProduct<T>::as_a(weights, s);
      if constexpr (Config::kCrowded) load_next();
      HalfProduct<T>::template fragments_by_columns<KeyTile>(o, weights, value_address);
      if constexpr (Config::kProductSums) HalfProduct<T>::add_row_sums(sums, weights);
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int i = 0; i < 2 * R; ++i) {
    const int row = first_row + thread_row + 8 * i;
    const RowPlace place = place_of(a, head_kv, min(row, rows - 1));
    const float exact = quad_sum(state.sum[i]);
    const RowEnd end = finish_row(
        p, place.head, state.base(i), arguments.scale_log2, a.has_terms ? kLn2 : p.softmax_scale, !Config::kFloat,
        Config::kProductSums ? sums[i / 2][2 * (i % 2)] : exact, exact, state.largest[i] == -kInfinity, 1.0f);
#pragma unroll
    for (int c = 0; c < CO; ++c) {
      o[i / 2][c][2 * (i % 2)] *= end.factor;
      o[i / 2][c][2 * (i % 2) + 1] *= end.factor;
    }
    if (t == 0 && row < rows) store_lse(p, batch, place.head, sequence.query_start + place.query, end.lse);
  }
  __syncthreads();  // with no keys, other warps may still be filling these rows
  store_output<Config>(o, shared, warp_row);
  __syncwarp();
  using Tile = typename Config::QueryTile;
  for (int index = lane_id(); index < Config::kRowsPerWarp * Tile::kChunks; index += 32) {
    const int row = warp_row + index / Tile::kChunks, column = index % Tile::kChunks * Tile::kElementsPerChunk;
    if (row >= live_rows || column >= p.head_dim_v) continue;
    const RowPlace place = place_of(a, head_kv, first_row + row);
    T* const out = static_cast<T*>(p.out.data) + batch * p.out.batch_stride + place.head * p.out.head_stride +
                   (sequence.query_start + place.query) * p.out.token_stride + column;
    const uint4 chunk = load_shared<uint4>(query_address + Tile::offset(row, index % Tile::kChunks));
    if (a.vectorized_out) {
      *reinterpret_cast<uint4*>(out) = chunk;
    } else {
      const T* const elements = reinterpret_cast<const T*>(&chunk);
#pragma unroll
      for (int i = 0; i < Tile::kElementsPerChunk; ++i) {
        if (column + i < p.head_dim_v) out[i] = elements[i];
      }
    }
  }
  if (repaired) {
    __syncwarp();
    for (int row = warp_row; row < min(warp_row + Config::kRowsPerWarp, live_rows); ++row) {
      restore_values(a, batch, head_kv, first_row + row, !arguments.direct_values);
    }
  }
}

template <class T, int kHeadDim>
CachedTileKernel describe_cached_tile() {
  using Config = CachedTileConfig<T, kHeadDim>;
  return {cached_tile_kernel<Config>, Config::kQueries, Config::kThreads, Config::kSharedBytes};
}

template <int kHeadDim>
CachedTileKernel cached_tile_kernel_for(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return describe_cached_tile<__half, kHeadDim>();
    case DType::kBFloat16: return describe_cached_tile<__nv_bfloat16, kHeadDim>();
    default: return describe_cached_tile<float, kHeadDim>();
  }
}

}  // namespace onepass::cuda
