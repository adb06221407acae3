// cuda/portable/forward.cuh: the forward kernel. One block computes one tile of query rows of one head; it walks the
// visible keys from the last block to the first, with K and V each single-buffered: V of a block is on its way during
// Q·Kᵀ, K of the next during P·V.
#pragma once

#include "cuda/common/score.cuh"
#include "cuda/portable/float_product.cuh"
#include "cuda/portable/fragment_tile.cuh"
#include "cuda/portable/not_finite.cuh"
#include "cuda/portable/row_end.cuh"

namespace onepass::cuda {

template <class T_, int kHeadDim_, bool kTerms_>
struct ForwardConfig {
  using T = T_;
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kHeadDim = kHeadDim_;
  // With an output of 128 or more columns, registers are too few to keep the addresses of copies, or to start the next
  // keys' copy while scores are there; a longer product then hides it.
  static constexpr bool kCrowded = !kFloat && kHeadDim_ > 64;
  // Whether the product with V sums the denominator, as one more column that holds ones: numerator and denominator then
  // round the same way, and values of 1 give 1, however many keys there are. bfloat16 outputs are too coarse to show
  // it, and at 64 columns the additional product costs 5 % (3 % saved elsewhere at 128).
  static constexpr bool kProductSums = kHeadDim_ > 64 || !std::is_same_v<T, __nv_bfloat16>;
  static constexpr bool kTerms = kTerms_;  // logits have terms beyond scale·q·k, or weights are dropped
  using Shape = ForwardTile<kFloat, kHeadDim, kTerms>;
  static constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys, kWarps = Shape::kWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowsPerWarp = kQueries / kWarps;
  static constexpr int R = kRowsPerWarp / 16;  // m16 tiles of a warp
  static constexpr int C = kKeys / 8;          // n8 tiles of its scores
  static constexpr int CO = kHeadDim / 8;      // n8 tiles of its output
  static constexpr bool kQueriesInRegisters = Shape::kQueriesInRegisters;

  using QueryTile = SharedTile<T, kQueries, kHeadDim>;
  using KeyTile = SharedTile<T, kKeys, kHeadDim>;
  using WeightTile = FloatTile<kQueries, kKeys>;  // float32 only: P passes through shared memory
  static constexpr int kKeyOffset = QueryTile::kBytes;
  static constexpr int kValueOffset = kKeyOffset + KeyTile::kBytes;
  static constexpr int kWeightOffset = kValueOffset + KeyTile::kBytes;
  static constexpr int kSharedBytes = kWeightOffset + (kFloat ? WeightTile::kBytes : 0);
  static_assert(kSharedBytes == Shape::shared_bytes(), "the host asks for what the kernel uses");
};

// Running maximum of the rows of a warp, and this thread's part of their exact sums, which the log-sum-exp needs.
template <int kRows>
struct OnlineSoftmax {
  float largest[kRows], sum[kRows];
  bool beyond_fused = false;  // some row of the warp has passed kFusedLimit

  ONEPASS_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) largest[i] = -kInfinity, sum[i] = 0.0f;
  }
  // What is subtracted from a row's logits: its maximum, or 0 while every logit was −inf.
  ONEPASS_DEVICE float base(int i) const { return largest[i] == -kInfinity ? 0.0f : largest[i]; }

  // To be called when a maximum has changed.
  ONEPASS_DEVICE void compare_with_limit(float scale) {
    bool beyond = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) beyond |= fabsf(base(i) * scale) >= kFusedLimit;
    beyond_fused = __any_sync(~0u, beyond);
  }
};

// Replaces scores by weights 2^(scale·(s − max)). The accumulator, `sums` included, is rescaled only when a maximum of
// the warp has grown by more than 2^kSlack, so that most blocks skip that work; until then weights may reach 2^kSlack,
// far inside float16.
template <bool kFloat, int R, int C, int CO>
ONEPASS_DEVICE void softmax_step(float (&s)[R][C][4], float (&o)[R][CO][4], float (&sums)[R][4],
                                 OnlineSoftmax<2 * R>& state, float scale, bool exact_sums) {
  constexpr float kSlack = 8.0f;
  float largest[2 * R];
  bool grown = false;
#pragma unroll
  for (int i = 0; i < 2 * R; ++i) {
    float row = -kInfinity;
#pragma unroll
    for (int c = 0; c < C; ++c) row = fmaxf(row, fmaxf(s[i / 2][c][2 * (i % 2)], s[i / 2][c][2 * (i % 2) + 1]));
    largest[i] = fmaxf(state.largest[i], quad_max(row));
    grown |= (largest[i] - state.largest[i]) * scale > kSlack;
  }
  if (__any_sync(~0u, grown)) {
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
      const float previous = state.largest[i];
      state.largest[i] = largest[i];
      const float factor = exp2_approx((previous - state.base(i)) * scale);
      state.sum[i] *= factor;
      sums[i / 2][2 * (i % 2)] *= factor;
      sums[i / 2][2 * (i % 2) + 1] *= factor;
#pragma unroll
      for (int c = 0; c < CO; ++c) {
        o[i / 2][c][2 * (i % 2)] *= factor;
        o[i / 2][c][2 * (i % 2) + 1] *= factor;
      }
    }
    state.compare_with_limit(scale);
  }
  const bool difference_first = kFloat || state.beyond_fused;  // float32 is worth one more rounding
  if (difference_first) for_each_element(s, [&](float& x, int r, int, int e) { x -= state.base(2 * r + e / 2); });
#pragma unroll
  for (int i = 0; i < 2 * R; ++i) {
    const float base = difference_first ? 0.0f : state.base(i) * scale;
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int e = 2 * (i % 2); e < 2 * (i % 2) + 2; ++e) {
        s[i / 2][c][e] = exp2_approx(fmaf(s[i / 2][c][e], scale, -base));
      }
  }
  if (exact_sums) for_each_element(s, [&](float& x, int r, int, int e) { state.sum[2 * r + e / 2] += x; });
}

// Writes the weights of a warp's rows for FloatProduct::rows_by_columns; −1 marks a masked one.
template <class Config, int R, int C>
ONEPASS_DEVICE void store_weights(float (&p)[R][C][4], unsigned char* weight_tile, int warp_row, bool masked,
                                  const RowRanges<R>& ranges, int key0) {
  if (masked) mask_scores(p, ranges, key0, -1.0f);
  store_fragment<float, typename Config::WeightTile>(weight_tile, warp_row, p);
}

// Divides the rows by their sums (`from_exact`: not those of the product, which dropout would miss) and writes their
// log-sum-exp.
template <class Config, int R, int CO>
ONEPASS_DEVICE void finish_rows(const ForwardArguments& arguments, float (&o)[R][CO][4], const float (&sums)[R][4],
                                const OnlineSoftmax<2 * R>& state, bool from_exact, float survivor_scale, int batch,
                                int head, const DeviceSequence& sequence, int first_row) {
#pragma unroll
  for (int i = 0; i < 2 * R; ++i) {
    const float exact = quad_sum(state.sum[i]);
    const RowEnd end = finish_row(arguments.problem, head, state.base(i), arguments.scale_log2,
                                  Config::kTerms ? 1.0f : arguments.problem.softmax_scale, !Config::kFloat,
                                  from_exact ? exact : sums[i / 2][2 * (i % 2)], exact, state.largest[i] == -kInfinity,
                                  survivor_scale);
#pragma unroll
    for (int c = 0; c < CO; ++c) {
      o[i / 2][c][2 * (i % 2)] *= end.factor;
      o[i / 2][c][2 * (i % 2) + 1] *= end.factor;
    }
    const int row = first_row + 8 * i;
    if (lane_id() % 4 == 0 && row < sequence.seqlen_q) {
      store_lse(arguments.problem, batch, head, sequence.query_start + row, end.lse);
    }
  }
}

// Takes up where the attention over other keys has ended: its rows lie in a tile, and its log-sum-exp is the maximum of
// a sum of 1, but for the rounding of that maximum.
template <class Config, int R, int CO>
ONEPASS_DEVICE void resume_rows(const ForwardArguments& arguments, float (&o)[R][CO][4], float (&sums)[R][4],
                                OnlineSoftmax<2 * R>& state, float survivor_scale, const unsigned char* tile,
                                int warp_row, int batch, int head, const DeviceSequence& sequence, int first_row) {
  using T = typename Config::T;
  using Tile = typename Config::QueryTile;
  const int g = lane_id() / 4, t = lane_id() % 4;
  const Problem& problem = arguments.problem;
  const float unit = Config::kTerms ? 1.0f : problem.softmax_scale, factor = 1.0f / survivor_scale;
  const float* const lse = static_cast<const float*>(problem.lse.data) + batch * problem.lse.batch_stride +
                           head * problem.lse.head_stride + sequence.query_start * problem.lse.token_stride;
#pragma unroll
  for (int i = 0; i < 2 * R; ++i) {
    const int query = first_row + 8 * i;
    const float of_row = query < sequence.seqlen_q ? lse[query * problem.lse.token_stride] : -kInfinity;
    if (of_row == -kInfinity) continue;
    state.largest[i] = of_row / unit;
    const float base = state.largest[i] * arguments.scale_log2;  // rounded, as it is subtracted from logits
    const bool fused = !Config::kFloat && fabsf(base) < kFusedLimit;
    const float weight = fused ? expf(fmaf(of_row, kLog2e, -base) * kLn2) : 1.0f;
    state.sum[i] = 0.25f * weight;  // of four lanes
    sums[i / 2][2 * (i % 2)] = sums[i / 2][2 * (i % 2) + 1] = weight;
#pragma unroll
    for (int c = 0; c < CO; ++c) {
      const unsigned char* const row = tile + Tile::offset(warp_row + 8 * i + g, Config::kFloat ? 2 * c + t / 2 : c);
      const T* const pair = reinterpret_cast<const T*>(row + (Config::kFloat ? 8 * (t % 2) : 4 * t));
      o[i / 2][c][2 * (i % 2)] = to_float(pair[0]) * (weight * factor);
      o[i / 2][c][2 * (i % 2) + 1] = to_float(pair[1]) * (weight * factor);
    }
  }
  state.compare_with_limit(arguments.scale_log2);
}

// Puts a warp's output rows where its query rows were.
template <class Config, int R, int CO>
ONEPASS_DEVICE void store_output(const float (&o)[R][CO][4], unsigned char* tile, int warp_row) {
  __syncwarp();  // the warp's last reads of its queries
  store_fragment<typename Config::T, typename Config::QueryTile>(tile, warp_row, o);
}

struct ForwardPosition {
  int batch, head, row_tile;
};

// Blocks take the row tiles of a group of heads (as many as share the L2 cache) before the next group's; where a mask
// makes later rows longer, those come first.
ONEPASS_DEVICE ForwardPosition forward_position(const ForwardArguments& arguments, int index) {
  const int heads = static_cast<int>(arguments.problem.batch * arguments.problem.num_heads);
  const int per_group = arguments.row_tiles * arguments.heads_per_group;
  const int group = index / per_group, rest = index % per_group;
  const int first_head = group * arguments.heads_per_group;
  const int heads_here = min(arguments.heads_per_group, heads - first_head);
  const int row_tile = rest / heads_here, plane = first_head + rest % heads_here;
  const int num_heads = static_cast<int>(arguments.problem.num_heads);
  return {plane / num_heads, plane % num_heads,
          arguments.last_rows_first ? arguments.row_tiles - 1 - row_tile : row_tile};
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::Shape::kBlocksPerMultiprocessor)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  using T = typename Config::T;
  constexpr int R = Config::R, C = Config::C, CO = Config::CO;
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* const query_tile = shared;
  unsigned char* const key_tile = shared + Config::kKeyOffset;
  unsigned char* const value_tile = shared + Config::kValueOffset;

  const std::uint32_t query_address = shared_address(query_tile), key_address = shared_address(key_tile),
                      value_address = shared_address(value_tile);

  const Problem& problem = arguments.problem;
  const auto [batch, head, row_tile] = forward_position(arguments, blockIdx.x);
  const DeviceSequence sequence = device_sequence(problem, batch);
  const int first_query = row_tile * Config::kQueries;
  if (first_query >= sequence.seqlen_q) return;
  const int live_queries = min(Config::kQueries, sequence.seqlen_q - first_query);
  const TileKeys keys = tile_keys(problem, sequence, first_query, first_query + live_queries - 1);

  const int head_kv = head / arguments.group_size;
  const int head_dim = static_cast<int>(problem.head_dim), head_dim_v = static_cast<int>(problem.head_dim_v);
  const VectorizedForward& vectorized = arguments.vectorized;
  const auto q = global_rows<const T>(problem.q, batch, head, sequence.query_start, head_dim, vectorized.q);
  const auto k = global_rows<const T>(problem.k, batch, head_kv, sequence.key_start, head_dim, vectorized.k);
  const auto v = global_rows<const T>(problem.v, batch, head_kv, sequence.key_start, head_dim_v, vectorized.v);

  const int warp_row = (threadIdx.x / 32) * Config::kRowsPerWarp;
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int first_row = first_query + warp_row + g;  // of this thread
  const ScoreTerms terms = score_terms(problem, batch, head);
  const DropoutRule dropout = dropout_rule(problem, batch, head);
  const float scale = arguments.scale_log2;

  float o[R][CO][4];
  clear(o);
  OnlineSoftmax<2 * R> state;
  float sums[R][4] = {};
  const bool exact_sums = !Config::kProductSums || problem.lse.data != nullptr || (Config::kTerms && dropout.active);
  bool repaired = false;  // some block's values were made finite
  if (arguments.resume) {
    const auto before =
        global_rows<const T>(problem.out, batch, head, sequence.query_start, head_dim_v, vectorized.out);
    load_tile<typename Config::QueryTile, Config::kQueries, Config::kThreads>(query_address, before, first_query, 0,
                                                                              sequence.seqlen_q);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    resume_rows<Config>(arguments, o, sums, state, Config::kTerms ? dropout.survivor_scale : 1.0f, query_tile, warp_row,
                        batch, head, sequence, first_row);
    __syncthreads();  // the queries take the tile
  }
  [[maybe_unused]] std::uint32_t query_fragments[Config::kQueriesInRegisters ? Config::kHeadDim / 16 : 1][R][4];

  const int first_block = keys.any.begin / Config::kKeys;
  const int end_block =
      keys.any.begin < keys.any.end ? (keys.any.end + Config::kKeys - 1) / Config::kKeys : first_block;
  const auto load_keys = [&](int block) {
    load_tile<typename Config::KeyTile, Config::kKeys, Config::kThreads, Config::kCrowded>(
        key_address, k, block * Config::kKeys, sequence.key_begin, sequence.key_end);
    cp_async_commit();
  };
  if (first_block < end_block) {
    load_tile<typename Config::QueryTile, Config::kQueries, Config::kThreads>(query_address, q, first_query, 0,
                                                                              sequence.seqlen_q);
    load_keys(end_block - 1);
  }

  for (int block = end_block - 1; block >= first_block; --block) {
    const int block_key = block * Config::kKeys;
    cp_async_wait<0>();
    __syncthreads();  // K of this block is there, and nobody reads V of the last one any more
    load_tile<typename Config::KeyTile, Config::kKeys, Config::kThreads, Config::kCrowded>(
        value_address, v, block_key, sequence.key_begin, sequence.key_end);
    cp_async_commit();

    float s[R][C][4];
    clear(s);
    if constexpr (Config::kFloat) {
      FloatProduct::rows_by_rows<typename Config::QueryTile, typename Config::KeyTile, Config::kHeadDim>(
          s, query_tile, warp_row, key_tile);
    } else if constexpr (Config::kQueriesInRegisters) {
      if (block == end_block - 1) {
#pragma unroll
        for (int step = 0; step < Config::kHeadDim / 16; ++step)
#pragma unroll
          for (int r = 0; r < R; ++r) {
            HalfProduct<T>::template load_a<typename Config::QueryTile>(query_fragments[step][r], query_address,
                                                                        warp_row + 16 * r, step);
          }
      }
      HalfProduct<T>::template fragments_by_rows<typename Config::KeyTile>(s, query_fragments, key_address);
    } else {
      HalfProduct<T>::template rows_by_rows<typename Config::QueryTile, typename Config::KeyTile, Config::kHeadDim>(
          s, query_address, warp_row, key_address);
    }

    const QueryRows at{first_row, block_key + 2 * t};
    if constexpr (Config::kTerms) apply_terms<Config::kFloat>(s, terms, at, sequence);
    const bool masked = block_key < keys.all.begin || block_key + Config::kKeys > keys.all.end;
    if (masked) mask_scores(s, keys_of_rows<R>(problem, sequence, first_row), at.key0);

    cp_async_wait<0>();
    __syncthreads();  // V of this block is there, and nobody reads its K any more
    if constexpr (!Config::kFloat) {
      if (masked) {
        repaired |= __syncthreads_or(
            make_tile_finite<T, typename Config::KeyTile, Config::kKeys, Config::kThreads>(value_address));
      }
    }
    if (!Config::kCrowded && block > first_block) load_keys(block - 1);

    softmax_step<Config::kFloat>(s, o, sums, state, scale, exact_sums);
    if constexpr (Config::kTerms) {
      if (dropout.active) {
        for_each_dropout<R, C>(dropout, at, [&](int r, int c, int e, bool survives) {
          if (!survives) s[r][c][e] = 0.0f;
        });
      }
    }

    if constexpr (Config::kFloat) {
      store_weights<Config>(s, shared + Config::kWeightOffset, warp_row, masked,
                            keys_of_rows<R>(problem, sequence, first_row), at.key0);
      __syncwarp();
      FloatProduct::add_row_sums<typename Config::WeightTile, Config::kKeys>(sums, shared + Config::kWeightOffset,
                                                                             warp_row);
      FloatProduct::rows_by_columns<typename Config::WeightTile, typename Config::KeyTile, Config::kKeys, true>(
          o, shared + Config::kWeightOffset, warp_row, value_tile);
      __syncwarp();
    } else {
      std::uint32_t p[C / 2][R][4];
      HalfProduct<T>::as_a(p, s);
      if (Config::kCrowded && block > first_block) load_keys(block - 1);
      HalfProduct<T>::template fragments_by_columns<typename Config::KeyTile>(o, p, value_address);
      if constexpr (Config::kProductSums) HalfProduct<T>::add_row_sums(sums, p);
    }
  }

  // A sum that starts from 1 loses more to equal small addends than its parts do.
  const bool from_exact =
      !Config::kProductSums || (Config::kTerms && dropout.active) || (Config::kFloat && arguments.resume);
  finish_rows<Config>(arguments, o, sums, state, from_exact, Config::kTerms ? dropout.survivor_scale : 1.0f, batch,
                      head, sequence, first_row);
  store_output<Config>(o, query_tile, warp_row);
  __syncwarp();
  const auto out = global_rows<T>(problem.out, batch, head, sequence.query_start, head_dim_v, vectorized.out);
  store_tile<typename Config::QueryTile, 32>(query_address + warp_row * Config::QueryTile::kRowBytes, out,
                                             first_query + warp_row, min(Config::kRowsPerWarp, live_queries - warp_row),
                                             lane_id());
  if (repaired) {
    __syncwarp();
    restore_not_finite<T>(arguments, batch, head, first_query + warp_row,
                          min(Config::kRowsPerWarp, live_queries - warp_row));
  }
}

}  // namespace onepass::cuda
