// cuda/portable/backward_keys.cuh: the kernel in which keys stay. Layout of the computation: see backward.h.
#pragma once

#include "cuda/portable/key_tile_pass.cuh"

namespace onepass::cuda {

template <class T_, int kHeadDim_, bool kTerms_, Pass kPass_>
struct KeyPassConfig {
  using T = T_;
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kTerms = kTerms_;
  using Shape = KeyTileShape<kFloat, kHeadDim, kTerms, kPass_>;
  static constexpr bool kHoldsKey = Shape::kHoldsKey, kHoldsValue = Shape::kHoldsValue;
  static constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries, kThreads = 32 * Shape::kWarps;
  static constexpr int R = Shape::kRowTiles;  // m16 tiles of a warp's keys
  static constexpr int C = kQueries / 8;      // n8 tiles of Sᵀ
  static constexpr int CD = kHeadDim / 8;     // n8 tiles of dK and dV
  static constexpr int kColumnWarps = Shape::kWarps / Shape::kQueryWarps;
  static constexpr int RQ = kQueries / 16 / Shape::kQueryWarps;  // m16 tiles of a warp's part of dQ
  static constexpr int CQ = kHeadDim / 8 / kColumnWarps;         // and its n8 tiles
  ONEPASS_DEVICE static int dq_row(int warp) { return warp % Shape::kQueryWarps * (16 * RQ); }
  ONEPASS_DEVICE static int dq_column(int warp) { return warp / Shape::kQueryWarps * (8 * CQ); }

  using KeyTile = SharedTile<T, kKeys, kHeadDim>;
  using QueryTile = SharedTile<T, kQueries, kHeadDim>;
  using ScoreTile = SharedTile<T, kKeys, kQueries>;
  static constexpr int kValueOffset = KeyTile::kBytes;  // V: only where dK is held
  static constexpr int kQueryOffset = KeyTile::kBytes * (kHoldsKey ? 2 : 1);
  static constexpr int kGradientOffset = kQueryOffset + Shape::kStages * QueryTile::kBytes;
  static constexpr int kStatisticsOffset = kGradientOffset + Shape::kStages * QueryTile::kBytes;
  static constexpr int kNaturalOffset = kStatisticsOffset + Shape::kStages * kQueries * 8;
  static constexpr int kScoreOffset = kNaturalOffset + Shape::kStages * 16;
  static constexpr int kWeightOffset = kScoreOffset + (kHoldsKey ? ScoreTile::kBytes : 0);  // float32: P
  static constexpr int kSharedBytes = kWeightOffset + (kFloat && kHoldsValue ? ScoreTile::kBytes : 0);
  static_assert(kSharedBytes == Shape::shared_bytes(), "the host asks for what the kernel uses");
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    backward_keys_kernel(const __grid_constant__ BackwardArguments arguments) {
  using T = typename Config::T;
  using KeyTile = typename Config::KeyTile;
  using QueryTile = typename Config::QueryTile;
  using ScoreTile = typename Config::ScoreTile;
  constexpr int R = Config::R, C = Config::C, CD = Config::CD, kKeys = Config::kKeys, kQueries = Config::kQueries;
  constexpr int kHeadDim = Config::kHeadDim;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ std::uint32_t not_finite_queries[Config::Shape::kWarps];
  const std::uint32_t base = shared_address(shared);

  const BackwardProblem& backward = arguments.problem;
  const Problem& problem = backward.forward;
  const KeyTilePass<Config> pass(arguments);
  const int batch = pass.batch, head_kv = pass.head_kv, first_key = pass.first_key;
  const DeviceSequence& sequence = pass.sequence;
  if (first_key >= sequence.seqlen_k) return;
  const int live_keys = min(kKeys, sequence.seqlen_k - first_key);

  const int warp = threadIdx.x / 32, warp_row = 16 * R * warp, g = lane_id() / 4, t = lane_id() % 4;
  const int key = first_key + warp_row + g;  // of this thread's first row

  float dk[R][Config::kHoldsKey ? CD : 1][4], dv[R][Config::kHoldsValue ? CD : 1][4];
  clear(dk);
  clear(dv);
  std::uint32_t not_finite[R] = {};  // of the warp's keys, one bit each

  const int head_dim = static_cast<int>(problem.head_dim), head_dim_v = static_cast<int>(problem.head_dim_v);
  const VectorizedBackward& vectorized = arguments.vectorized;
  if (pass.steps > 0) {
    pass.load_keys(base, problem.k, head_dim, vectorized.k);
    if constexpr (Config::kHoldsKey) {
      pass.load_keys(base + Config::kValueOffset, problem.v, head_dim_v, vectorized.v);
    }
    pass.load_queries(base, 0);
  }

#pragma unroll 1
  for (int step = 0; step < pass.steps; ++step) {
    const int head = pass.head(step), first_query = pass.first_query(step);
    const int query_offset = pass.query_offset(step), gradient_offset = pass.gradient_offset(step);
    const RowStatistics* const statistics = pass.statistics(shared, step);
    cp_async_wait<0>();
    __syncthreads();  // this block of queries is there, and nobody works on the last one any more
    if (step + 1 < pass.steps) pass.load_queries(base, step + 1);
    if (step == 0) {  // dQ is a product with every key of the tile, seen or not
#pragma unroll
      for (int r = 0; r < R; ++r) not_finite[r] = make_rows_finite<T, KeyTile>(base, warp_row + 16 * r);
      __syncwarp();
    }
    const bool masked = pass.masked(step);
    const bool tainted = masked && pass.make_queries_finite(base, step, not_finite_queries);

    float s[R][C][4], dp[R][C][4];
    clear(s);
    clear(dp);
    if constexpr (Config::kFloat) {
      FloatProduct::rows_by_rows<KeyTile, QueryTile, kHeadDim>(s, shared, warp_row, shared + query_offset);
      if constexpr (Config::kHoldsKey) {
        FloatProduct::rows_by_rows<KeyTile, QueryTile, kHeadDim>(dp, shared + Config::kValueOffset, warp_row,
                                                                 shared + gradient_offset);
      }
    } else {
      HalfProduct<T>::template rows_by_rows<KeyTile, QueryTile, kHeadDim>(s, base, warp_row, base + query_offset);
      if constexpr (Config::kHoldsKey) {
        HalfProduct<T>::template rows_by_rows<KeyTile, QueryTile, kHeadDim>(dp, base + Config::kValueOffset, warp_row,
                                                                            base + gradient_offset);
      }
    }
    if ((not_finite[0] | not_finite[R - 1]) != 0) {
      for_each_element(s, [&](float& x, int r, int, int e) {
        if (not_finite[r] >> (g + 8 * (e / 2)) & 1) x = std::numeric_limits<float>::quiet_NaN();
      });
    }
    if (tainted) {
      for_each_element(s, [&](float& x, int, int c, int e) {
        if (pass.was_not_finite(not_finite_queries, 8 * c + 2 * t + e % 2)) x = std::numeric_limits<float>::quiet_NaN();
      });
    }
    const KeyRows at{first_query + 2 * t, key};
    weights_and_gradients<Config::kFloat, Config::kTerms, false>(
        s, dp, score_terms(problem, batch, head), dropout_rule(problem, batch, head), at, sequence,
        pass.units(shared, step), [&](int, int c, int e) { return statistics[8 * c + 2 * t + e % 2]; });
    if (masked) zero_hidden(s, dp, queries_of_rows<R>(problem, sequence, key), at.query0);

    if constexpr (Config::kFloat) {
      if constexpr (Config::kHoldsValue) store_fragment<float, ScoreTile>(shared + Config::kWeightOffset, warp_row, s);
      if constexpr (Config::kHoldsKey) store_fragment<float, ScoreTile>(shared + Config::kScoreOffset, warp_row, dp);
      __syncwarp();
      if constexpr (Config::kHoldsValue) {
        FloatProduct::rows_by_columns<ScoreTile, QueryTile, kQueries, false>(dv, shared + Config::kWeightOffset,
                                                                             warp_row, shared + gradient_offset);
      }
      if constexpr (Config::kHoldsKey) {
        FloatProduct::rows_by_columns<ScoreTile, QueryTile, kQueries, false>(dk, shared + Config::kScoreOffset,
                                                                             warp_row, shared + query_offset);
      }
    } else {
      std::uint32_t a[C / 2][R][4];
      if constexpr (Config::kHoldsValue) {
        HalfProduct<T>::as_a(a, s);
        HalfProduct<T>::template fragments_by_columns<QueryTile>(dv, a, base + gradient_offset);
      }
      if constexpr (Config::kHoldsKey) {
        HalfProduct<T>::as_a(a, dp);
        if (arguments.dq_sums != nullptr) store_packed<ScoreTile>(shared + Config::kScoreOffset, warp_row, a);
        HalfProduct<T>::template fragments_by_columns<QueryTile>(dk, a, base + query_offset);
      }
    }

    if constexpr (Config::kHoldsKey && !Config::kFloat) {
      if (arguments.dq_sums != nullptr) {
        __syncthreads();  // dS of all warps
        constexpr int RQ = Config::RQ, CQ = Config::CQ;
        float dq[RQ][CQ][4];
        clear(dq);
        HalfProduct<T>::template columns_by_columns<ScoreTile, KeyTile, kKeys>(
            dq, base + Config::kScoreOffset, Config::dq_row(warp), base, Config::dq_column(warp));
        float* const sums = pass.dq_sums(step);
        for_each_tile<RQ, CQ>(
            [&](int r, int c) { add_fragment(sums + fragment_offset<RQ, CQ>(warp, r, c), lane_id(), dq[r][c]); });
      }
    }
  }

  __syncthreads();  // K and V make room for dK and dV
  const int live_rows = min(16 * R, live_keys - warp_row);
  if constexpr (Config::kHoldsValue) {
    constexpr int kOffset = Config::kHoldsKey ? Config::kValueOffset : 0;
    const auto rows = global_rows<T>(backward.dv, batch, head_kv, sequence.key_start, head_dim_v, vectorized.dv);
    if (arguments.add) add_stored(dv, rows, first_key + warp_row, live_rows);
    store_fragment<T, KeyTile>(shared + kOffset, warp_row, dv);
    __syncwarp();
    store_tile<KeyTile, 32>(base + kOffset + warp_row * KeyTile::kRowBytes, rows, first_key + warp_row, live_rows,
                            lane_id());
  }
  if constexpr (Config::kHoldsKey) {
    store_fragment<T, KeyTile>(shared, warp_row, dk, problem.softmax_scale);
    __syncwarp();
    const auto rows = global_rows<T>(backward.dk, batch, head_kv, sequence.key_start, head_dim, vectorized.dk);
    store_tile<KeyTile, 32>(base + warp_row * KeyTile::kRowBytes, rows, first_key + warp_row, live_rows, lane_id());
  }
}

// dQ = softmax_scale · the sums that the kernel above has left in fragment order (16-bit operands). One block converts
// one of its tiles of queries.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    convert_dq_kernel(const __grid_constant__ BackwardArguments arguments) {
  using T = typename Config::T;
  using QueryTile = typename Config::QueryTile;
  constexpr int RQ = Config::RQ, CQ = Config::CQ;
  extern __shared__ __align__(128) unsigned char shared[];
  const Problem& problem = arguments.problem.forward;
  const int num_heads = static_cast<int>(problem.num_heads);
  const int tile = blockIdx.x % arguments.tiles, plane = blockIdx.x / arguments.tiles;
  const int batch = plane / num_heads, head = plane % num_heads;
  const DeviceSequence sequence = device_sequence(problem, batch);
  const int first_query = tile * Config::kQueries;
  if (first_query >= sequence.seqlen_q) return;

  const float* const sums =
      arguments.dq_sums +
      (head * arguments.padded_rows + padded_start(problem, sequence, batch) + first_query) * Config::kHeadDim;
  const int warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
  const float scale = problem.softmax_scale;
  for_each_tile<RQ, CQ>([&](int r, int c) {
    const float* const fragment = sums + fragment_offset<RQ, CQ>(warp, r, c);
    const int column = Config::dq_column(warp) + 8 * c;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Config::dq_row(warp) + 16 * r + 8 * half + g;
      const float x = fragment[fragment_element(lane, 2 * half)] * scale;
      const float y = fragment[fragment_element(lane, 2 * half + 1)] * scale;
      store_shared(shared_address(shared) + QueryTile::offset(row, column / 8) + 4 * t, pack<T>(x, y));
    }
  });
  __syncthreads();
  const auto rows = global_rows<T>(arguments.problem.dq, batch, head, sequence.query_start,
                                   static_cast<int>(problem.head_dim), arguments.vectorized.dq);
  store_tile<QueryTile, Config::kThreads>(shared_address(shared), rows, first_query,
                                          min(Config::kQueries, sequence.seqlen_q - first_query), threadIdx.x);
}

}  // namespace onepass::cuda
