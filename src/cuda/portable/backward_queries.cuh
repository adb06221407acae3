// cuda/portable/backward_queries.cuh: the kernels in which queries stay and keys stream past: dQ without atomic
// additions, and the gradient of a bias.
#pragma once

#include "cuda/portable/backward_common.cuh"

namespace onepass::cuda {

template <class T_, int kHeadDim_>
struct QueryPassConfig {
  using T = T_;
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kHeadDim = kHeadDim_;
  using Shape = QueryTileShape<kFloat, kHeadDim>;
  static constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries, kThreads = 32 * Shape::kWarps;
  static constexpr int C = kKeys / 8, CD = kHeadDim / 8;
  static constexpr int kKeyBlocks = (kKeys + 15) / 16;  // of 16 keys

  using QueryTile = SharedTile<T, kQueries, kHeadDim>;
  using KeyTile = SharedTile<T, kKeys, kHeadDim>;
  using ScoreTile = FloatTile<kQueries, kKeys>;  // float32 only
  static constexpr int kGradientOffset = QueryTile::kBytes;
  static constexpr int kKeyOffset = 2 * QueryTile::kBytes;
  static constexpr int kValueOffset = kKeyOffset + KeyTile::kBytes;
  static constexpr int kScoreOffset = kValueOffset + KeyTile::kBytes;
  static_assert(kScoreOffset + (kFloat ? ScoreTile::kBytes : 0) == Shape::shared_bytes());
};

// One warp's view of a tile of queries of one head, and what it computes for a block of keys.
template <class Config>
struct QueryTilePass {
  using T = typename Config::T;
  const BackwardArguments& arguments;
  const Problem& problem;
  unsigned char* shared;
  int batch, head, first_query;
  DeviceSequence sequence;
  ScoreTerms terms;
  DropoutRule dropout;
  RowStatistics statistics[2];
  bool natural;

  ONEPASS_DEVICE QueryTilePass(const BackwardArguments& arguments_, unsigned char* shared_, int batch_, int head_,
                               const DeviceSequence& sequence_, int first_query_)
      : arguments(arguments_),
        problem(arguments_.problem.forward),
        shared(shared_),
        batch(batch_),
        head(head_),
        first_query(first_query_),
        sequence(sequence_),
        terms(score_terms(problem, batch, head)),
        dropout(dropout_rule(problem, batch, head)) {}

  ONEPASS_DEVICE int warp_row() const { return 16 * (threadIdx.x / 32); }
  ONEPASS_DEVICE int query() const { return first_query + warp_row() + lane_id() / 4; }

  // Q, dO and the rows' statistics. Every tile starts within a padded block: kQueries divides kPadding.
  ONEPASS_DEVICE void load_queries() {
    const auto& vectorized = arguments.vectorized;
    const auto q = global_rows<const T>(problem.q, batch, head, sequence.query_start,
                                        static_cast<int>(problem.head_dim), vectorized.q);
    const auto dout = global_rows<const T>(arguments.problem.dout, batch, head, sequence.query_start,
                                           static_cast<int>(problem.head_dim_v), vectorized.dout);
    load_tile<typename Config::QueryTile, Config::kQueries, Config::kThreads>(shared_address(shared), q, first_query, 0,
                                                                              sequence.seqlen_q);
    load_tile<typename Config::QueryTile, Config::kQueries, Config::kThreads>(
        shared_address(shared + Config::kGradientOffset), dout, first_query, 0, sequence.seqlen_q);
    cp_async_commit();  // here, because no key may follow: a copy under way would land on what the tile is used for
                        // next
    const std::int64_t row = head * arguments.padded_rows + padded_start(problem, sequence, batch) + query();
    statistics[0] = arguments.statistics[row];
    statistics[1] = arguments.statistics[row + 8];
    natural = arguments.natural[row / kStatisticsRows<Config::kFloat>];
  }
  ONEPASS_DEVICE void load_keys(int first_key) {
    const int head_kv = head / arguments.group_size;
    const auto& vectorized = arguments.vectorized;
    const auto k = global_rows<const T>(problem.k, batch, head_kv, sequence.key_start,
                                        static_cast<int>(problem.head_dim), vectorized.k);
    const auto v = global_rows<const T>(problem.v, batch, head_kv, sequence.key_start,
                                        static_cast<int>(problem.head_dim_v), vectorized.v);
    load_tile<typename Config::KeyTile, Config::kKeys, Config::kThreads>(
        shared_address(shared + Config::kKeyOffset), k, first_key, sequence.key_begin, sequence.key_end);
    load_tile<typename Config::KeyTile, Config::kKeys, Config::kThreads>(
        shared_address(shared + Config::kValueOffset), v, first_key, sequence.key_begin, sequence.key_end);
    cp_async_commit();
  }

  // Waits for the keys and makes them finite: dQ is a product with every key of the tile, seen or not.
  ONEPASS_DEVICE void wait_for_keys(std::uint32_t (&not_finite)[Config::kKeyBlocks]) const {
    __shared__ std::uint32_t found[Config::kKeyBlocks];
    cp_async_wait<0>();
    __syncthreads();
    for (int block = threadIdx.x / 32; block < Config::kKeyBlocks; block += Config::Shape::kWarps) {
      const std::uint32_t rows = make_rows_finite<T, typename Config::KeyTile, (Config::kKeys < 16 ? 8 : 16)>(
          shared_address(shared + Config::kKeyOffset), 16 * block);
      if (lane_id() == 0) found[block] = rows;
    }
    __syncthreads();
#pragma unroll
    for (int block = 0; block < Config::kKeyBlocks; ++block) not_finite[block] = found[block];
  }

  // dS of the tile against the keys in shared memory, of which `not_finite` (one word a half-warp's 16 keys) are
  // zeroed.
  template <bool kOfLogit>
  ONEPASS_DEVICE void gradient(float (&ds)[1][Config::C][4], int first_key,
                               const std::uint32_t (&not_finite)[Config::kKeyBlocks]) const {
    constexpr int kHeadDim = Config::kHeadDim;
    using QueryTile = typename Config::QueryTile;
    using KeyTile = typename Config::KeyTile;
    float s[1][Config::C][4];
    clear(s);
    clear(ds);
    if constexpr (Config::kFloat) {
      FloatProduct::rows_by_rows<QueryTile, KeyTile, kHeadDim>(s, shared, warp_row(), shared + Config::kKeyOffset);
      FloatProduct::rows_by_rows<QueryTile, KeyTile, kHeadDim>(ds, shared + Config::kGradientOffset, warp_row(),
                                                               shared + Config::kValueOffset);
    } else {
      const std::uint32_t base = shared_address(shared);
      HalfProduct<T>::template rows_by_rows<QueryTile, KeyTile, kHeadDim>(s, base, warp_row(),
                                                                          base + Config::kKeyOffset);
      HalfProduct<T>::template rows_by_rows<QueryTile, KeyTile, kHeadDim>(ds, base + Config::kGradientOffset,
                                                                          warp_row(), base + Config::kValueOffset);
    }
    const int t = lane_id() % 4;
    for_each_element(s, [&](float& x, int, int c, int e) {
      if (not_finite[c / 2] >> (8 * (c % 2) + 2 * t + e % 2) & 1) x = std::numeric_limits<float>::quiet_NaN();
    });
    const QueryRows at{query(), first_key + 2 * t};
    weights_and_gradients<Config::kFloat, true, kOfLogit>(s, ds, terms, dropout, at, sequence, {kLog2e, 1.0f, natural},
                                                          [&](int, int, int e) { return statistics[e / 2]; });
    zero_hidden(s, ds, keys_of_rows<1>(problem, sequence, query()), at.key0);
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    backward_queries_kernel(const __grid_constant__ BackwardArguments arguments) {
  using T = typename Config::T;
  extern __shared__ __align__(128) unsigned char shared[];
  const Problem& problem = arguments.problem.forward;
  const int num_heads = static_cast<int>(problem.num_heads);
  const auto [plane, tile] = tile_position(blockIdx.x, arguments.tiles, static_cast<int>(problem.batch) * num_heads,
                                           arguments.planes_per_group);
  const int batch = plane / num_heads, head = plane % num_heads;
  const DeviceSequence sequence = device_sequence(problem, batch);
  const int first_query = tile * Config::kQueries;
  if (first_query >= sequence.seqlen_q) return;
  const int live_queries = min(Config::kQueries, sequence.seqlen_q - first_query);
  const Range keys = tile_keys(problem, sequence, first_query, first_query + live_queries - 1).any;

  QueryTilePass<Config> pass(arguments, shared, batch, head, sequence, first_query);
  pass.load_queries();
  float dq[1][Config::CD][4];
  clear(dq);
  for (int first_key = keys.begin / Config::kKeys * Config::kKeys; first_key < keys.end; first_key += Config::kKeys) {
    __syncthreads();  // nobody reads the last keys any more
    pass.load_keys(first_key);
    std::uint32_t not_finite[Config::kKeyBlocks];
    pass.wait_for_keys(not_finite);
    float ds[1][Config::C][4];
    pass.template gradient<false>(ds, first_key, not_finite);
    if constexpr (Config::kFloat) {
      store_fragment<float, typename Config::ScoreTile>(shared + Config::kScoreOffset, pass.warp_row(), ds);
      __syncwarp();
      FloatProduct::rows_by_columns<typename Config::ScoreTile, typename Config::KeyTile, Config::kKeys, false>(
          dq, shared + Config::kScoreOffset, pass.warp_row(), shared + Config::kKeyOffset);
      __syncwarp();
    } else {
      std::uint32_t a[Config::C / 2][1][4];
      HalfProduct<T>::as_a(a, ds);
      HalfProduct<T>::template fragments_by_columns<typename Config::KeyTile>(
          dq, a, shared_address(shared + Config::kKeyOffset));
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  using QueryTile = typename Config::QueryTile;
  store_fragment<T, QueryTile>(shared, pass.warp_row(), dq, problem.softmax_scale);
  __syncwarp();
  const auto rows = global_rows<T>(arguments.problem.dq, batch, head, sequence.query_start,
                                   static_cast<int>(problem.head_dim), arguments.vectorized.dq);
  store_tile<QueryTile, 32>(shared_address(shared) + pass.warp_row() * QueryTile::kRowBytes, rows,
                            first_query + pass.warp_row(), min(16, live_queries - pass.warp_row()), lane_id());
}

// One block owns one tile of dbias as it is stored and adds up everything that shares it: the batches and heads of
// broadcast dimensions, and all tiles of queries or keys where those are broadcast. The order is fixed.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    bias_gradient_kernel(const __grid_constant__ BackwardArguments arguments) {
  constexpr int C = Config::C;
  extern __shared__ __align__(128) unsigned char shared[];
  const Problem& problem = arguments.problem.forward;
  const BiasOperand& dbias = arguments.problem.dbias;
  const int batch_size = static_cast<int>(problem.batch), num_heads = static_cast<int>(problem.num_heads);
  const int seqlen_q = static_cast<int>(problem.seqlen_q), seqlen_k = static_cast<int>(problem.seqlen_k);
  const int query_tiles = (seqlen_q + Config::kQueries - 1) / Config::kQueries;
  const int key_tiles = (seqlen_k + Config::kKeys - 1) / Config::kKeys;
  const bool shared_queries = dbias.query_stride == 0, shared_keys = dbias.key_stride == 0;

  int index = blockIdx.x;
  const auto take = [&](bool broadcast, int size) {
    if (broadcast) return Range{0, size};
    const int mine = index % size;
    index /= size;
    return Range{mine, mine + 1};
  };
  const Range key_range = take(shared_keys, key_tiles), query_range = take(shared_queries, query_tiles);
  const Range heads = take(dbias.head_stride == 0, num_heads), batches = take(dbias.batch_stride == 0, batch_size);

  float sum[1][C][4];
  clear(sum);
  for (int batch = batches.begin; batch < batches.end; ++batch) {
    const DeviceSequence sequence = device_sequence(problem, batch);
    for (int head = heads.begin; head < heads.end; ++head) {
      for (int query_tile = query_range.begin; query_tile < query_range.end; ++query_tile) {
        const int first_query = query_tile * Config::kQueries;
        const int last_query = min(first_query + Config::kQueries, seqlen_q) - 1;
        const Range keys = tile_keys(problem, sequence, first_query, last_query).any;
        cp_async_wait<0>();  // of queries that met no key
        __syncthreads();
        QueryTilePass<Config> pass(arguments, shared, batch, head, sequence, first_query);
        pass.load_queries();
        for (int key_tile = key_range.begin; key_tile < key_range.end; ++key_tile) {
          const int first_key = key_tile * Config::kKeys;
          if (first_key >= keys.end || first_key + Config::kKeys <= keys.begin) continue;
          __syncthreads();
          pass.load_keys(first_key);
          std::uint32_t not_finite[Config::kKeyBlocks];
          pass.wait_for_keys(not_finite);
          float ds[1][C][4];
          pass.template gradient<true>(ds, first_key, not_finite);
          for_each_element(sum, [&](float& x, int r, int c, int e) { x += ds[r][c][e]; });
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  // The tile's sums go through shared memory, which the operands have left.
  using Tile = FloatTile<Config::kQueries, Config::kKeys>;
  static_assert(Tile::kBytes <= Config::Shape::shared_bytes());
  store_fragment<float, Tile>(shared, 16 * (threadIdx.x / 32), sum);
  __syncthreads();
  const int first_query = shared_queries ? 0 : query_range.begin * Config::kQueries;
  const int first_key = shared_keys ? 0 : key_range.begin * Config::kKeys;
  const int rows = shared_queries ? 1 : min(Config::kQueries, seqlen_q - first_query);
  const int columns = shared_keys ? 1 : min(Config::kKeys, seqlen_k - first_key);
  float* const plane =
      static_cast<float*>(dbias.data) + batches.begin * dbias.batch_stride + heads.begin * dbias.head_stride;
  for (int i = threadIdx.x; i < rows * columns; i += Config::kThreads) {
    const int row = i / columns, column = i % columns;
    double total = 0.0;  // up to a whole tile's sums, one after the other
    for (int y = row; y < (shared_queries ? Config::kQueries : row + 1); ++y) {
      for (int x = column; x < (shared_keys ? Config::kKeys : column + 1); ++x) {
        total += *reinterpret_cast<const float*>(shared + Tile::offset(y, 0) + 4 * x);
      }
    }
    float& stored = plane[(first_query + row) * dbias.query_stride + (first_key + column) * dbias.key_stride];
    stored = static_cast<float>(arguments.add ? stored + total : total);
  }
}

}  // namespace onepass::cuda
