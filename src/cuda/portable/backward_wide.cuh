// cuda/portable/backward_wide.cuh: the kernel in which keys stay, for 16-bit operands at head_dim 128 and plain logits,
// on devices with 161 KB of shared memory for a block. What limits this head dim is reading shared memory; here every
// fragment feeds two products. Two of the 8 warps share 32 keys: each computes half of their scores' columns (queries)
// and then half of the columns of their dV and dK. P and dS pass through shared memory in between.
#pragma once

#include "cuda/portable/key_tile_pass.cuh"

namespace onepass::cuda {

template <class T_, int kHeadDim_>
struct WideConfig {
  using T = T_;
  static constexpr bool kFloat = false, kTerms = false;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = 128, kQueries = 64, kWarps = 8, kThreads = 32 * kWarps;
  struct Shape {
    static constexpr int kStages = 2;
  };
  static constexpr int R = 2, C = 4;                // m16 and n8 tiles of a warp's scores: 32 keys × 32 queries
  static constexpr int CD = kHeadDim / 16;          // n8 tiles of its half of dK and dV
  static constexpr int RQ = 2, CQ = kHeadDim / 32;  // and of its part of dQ: 32 queries × a quarter of the columns
  ONEPASS_DEVICE static int dq_row(int warp) { return warp % 2 * (16 * RQ); }
  ONEPASS_DEVICE static int dq_column(int warp) { return warp / 2 * (8 * CQ); }

  using KeyTile = HalfTile<kKeys, kHeadDim>;
  using QueryTile = HalfTile<kQueries, kHeadDim>;
  using ScoreTile = HalfTile<kKeys, kQueries>;
  static constexpr int kValueOffset = KeyTile::kBytes;
  static constexpr int kQueryOffset = 2 * KeyTile::kBytes;
  static constexpr int kGradientOffset = kQueryOffset + Shape::kStages * QueryTile::kBytes;
  static constexpr int kWeightOffset = kGradientOffset + Shape::kStages * QueryTile::kBytes;
  static constexpr int kScoreOffset = kWeightOffset + ScoreTile::kBytes;
  static constexpr int kStatisticsOffset = kScoreOffset + ScoreTile::kBytes;
  static constexpr int kNaturalOffset = kStatisticsOffset + Shape::kStages * kQueries * 8;
  static constexpr int kSharedBytes = kNaturalOffset + Shape::kStages * 16;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_wide_kernel(const __grid_constant__ BackwardArguments arguments) {
  using T = typename Config::T;
  using Product = HalfProduct<T>;
  using KeyTile = typename Config::KeyTile;
  using QueryTile = typename Config::QueryTile;
  using ScoreTile = typename Config::ScoreTile;
  constexpr int R = Config::R, C = Config::C, CD = Config::CD, RQ = Config::RQ, CQ = Config::CQ;
  constexpr int kKeys = Config::kKeys, kQueries = Config::kQueries, kHeadDim = Config::kHeadDim;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ std::uint32_t not_finite_queries[Config::kWarps], not_finite_keys[Config::kWarps];
  const std::uint32_t base = shared_address(shared);

  const BackwardProblem& backward = arguments.problem;
  const Problem& problem = backward.forward;
  const KeyTilePass<Config> pass(arguments);
  const int batch = pass.batch, head_kv = pass.head_kv, first_key = pass.first_key;
  const DeviceSequence& sequence = pass.sequence;
  if (first_key >= sequence.seqlen_k) return;
  const int live_keys = min(kKeys, sequence.seqlen_k - first_key);

  const int warp = threadIdx.x / 32, g = lane_id() / 4, t = lane_id() % 4;
  const int warp_key = warp / 2 * (16 * R), warp_query = warp % 2 * (8 * C), warp_column = warp % 2 * (8 * CD);
  const int key = first_key + warp_key + g;  // of this thread's first row

  float dk[R][CD][4], dv[R][CD][4];
  clear(dk);
  clear(dv);
  bool keys_tainted = false;

  const int head_dim = static_cast<int>(problem.head_dim), head_dim_v = static_cast<int>(problem.head_dim_v);
  const VectorizedBackward& vectorized = arguments.vectorized;
  if (pass.steps > 0) {
    pass.load_keys(base, problem.k, head_dim, vectorized.k);
    pass.load_keys(base + Config::kValueOffset, problem.v, head_dim_v, vectorized.v);
    pass.load_queries(base, 0);
    cp_async_wait<0>();
    __syncthreads();
    // dQ is a product with every key of the tile, seen or not.
    const std::uint32_t rows = make_rows_finite<T, KeyTile>(base, 16 * warp);
    if (lane_id() == 0) not_finite_keys[warp] = rows;
    keys_tainted = __syncthreads_or(rows != 0);
  }

#pragma unroll 1
  for (int step = 0; step < pass.steps; ++step) {
    const int first_query = pass.first_query(step);
    const int query_offset = pass.query_offset(step), gradient_offset = pass.gradient_offset(step);
    const RowStatistics* const statistics = pass.statistics(shared, step) + warp_query;
    cp_async_wait<0>();
    __syncthreads();  // this block of queries is there, and nobody works on the last one any more
    if (step + 1 < pass.steps) pass.load_queries(base, step + 1);
    const bool masked = pass.masked(step);
    const bool tainted = masked && pass.make_queries_finite(base, step, not_finite_queries);

    float s[R][C][4], dp[R][C][4];
    clear(s);
    clear(dp);
    const int rows_before = warp_query * QueryTile::kRowBytes;
    Product::template rows_by_rows<KeyTile, QueryTile, kHeadDim>(s, base, warp_key, base + query_offset + rows_before);
    Product::template rows_by_rows<KeyTile, QueryTile, kHeadDim>(dp, base + Config::kValueOffset, warp_key,
                                                                 base + gradient_offset + rows_before);
    if (keys_tainted || tainted) {
      for_each_element(s, [&](float& x, int r, int c, int e) {
        const bool of_key = keys_tainted && not_finite_keys[warp_key / 16 + r] >> (g + 8 * (e / 2)) & 1;
        const int query = warp_query + 8 * c + 2 * t + e % 2;
        if (of_key || (tainted && pass.was_not_finite(not_finite_queries, query))) {
          x = std::numeric_limits<float>::quiet_NaN();
        }
      });
    }
    const KeyRows at{first_query + warp_query + 2 * t, key};
    weights_and_gradients<false, false, false>(s, dp, ScoreTerms{}, DropoutRule{}, at, sequence,
                                               pass.units(shared, step),
                                               [&](int, int c, int e) { return statistics[8 * c + 2 * t + e % 2]; });
    if (masked) zero_hidden(s, dp, queries_of_rows<R>(problem, sequence, key), at.query0);
    store_fragment<T, ScoreTile>(shared + Config::kWeightOffset, warp_key, s, 1.0f, warp_query);
    store_fragment<T, ScoreTile>(shared + Config::kScoreOffset, warp_key, dp, 1.0f, warp_query);
    __syncthreads();  // P and dS of all warps

    Product::template rows_by_columns<ScoreTile, QueryTile, kQueries>(dv, base + Config::kWeightOffset, warp_key,
                                                                      base + gradient_offset, warp_column);
    Product::template rows_by_columns<ScoreTile, QueryTile, kQueries>(dk, base + Config::kScoreOffset, warp_key,
                                                                      base + query_offset, warp_column);
    if (arguments.dq_sums != nullptr) {
      float dq[RQ][CQ][4];
      clear(dq);
      Product::template columns_by_columns<ScoreTile, KeyTile, kKeys>(
          dq, base + Config::kScoreOffset, Config::dq_row(warp), base, Config::dq_column(warp));
      float* const sums = pass.dq_sums(step);
      for_each_tile<RQ, CQ>(
          [&](int r, int c) { add_fragment(sums + fragment_offset<RQ, CQ>(warp, r, c), lane_id(), dq[r][c]); });
    }
  }

  __syncthreads();  // K and V make room for dK and dV
  const auto dv_rows = global_rows<T>(backward.dv, batch, head_kv, sequence.key_start, head_dim_v, vectorized.dv);
  const auto dk_rows = global_rows<T>(backward.dk, batch, head_kv, sequence.key_start, head_dim, vectorized.dk);
  if (arguments.add) add_stored(dv, dv_rows, first_key + warp_key, live_keys - warp_key, warp_column);
  store_fragment<T, KeyTile>(shared + Config::kValueOffset, warp_key, dv, 1.0f, warp_column);
  store_fragment<T, KeyTile>(shared, warp_key, dk, problem.softmax_scale, warp_column);
  __syncthreads();
  store_tile<KeyTile, Config::kThreads>(base + Config::kValueOffset, dv_rows, first_key, live_keys, threadIdx.x);
  store_tile<KeyTile, Config::kThreads>(base, dk_rows, first_key, live_keys, threadIdx.x);
}

}  // namespace onepass::cuda
