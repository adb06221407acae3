// cuda/portable/key_tile_pass.cuh: what the kernels in which keys stay have in common: one block's tile of keys, the
// steps in which queries stream past it, and their copies into shared memory.
#pragma once

#include "cuda/portable/backward_common.cuh"

namespace onepass::cuda {

// Copies 4 or 8 bytes.
template <int kBytes>
ONEPASS_DEVICE void cp_async_small(std::uint32_t destination, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(destination), "l"(source), "n"(kBytes) : "memory");
}

// Config: T, the tiles, their offsets in shared memory, and how many warps and stages there are.
template <class Config>
struct KeyTilePass {
  using T = typename Config::T;
  using KeyTile = typename Config::KeyTile;
  using QueryTile = typename Config::QueryTile;
  static constexpr int kKeys = Config::kKeys, kQueries = Config::kQueries, kThreads = Config::kThreads;
  static constexpr bool kRecompute = !Config::kFloat && Config::kHeadDim > 64;  // too few registers for addresses

  const BackwardArguments& arguments;
  const Problem& problem;
  int batch, head_kv, first_key;
  DeviceSequence sequence;
  TileQueries queries;
  int first_block, blocks, steps;  // query blocks: the first, how many a head, and those of every head of the group
  std::int64_t first_row;          // in statistics and dQ sums

  ONEPASS_DEVICE explicit KeyTilePass(const BackwardArguments& arguments_)
      : arguments(arguments_), problem(arguments_.problem.forward) {
    const int num_heads_kv = static_cast<int>(problem.num_heads_kv);
    const auto [plane, tile] = tile_position(
        blockIdx.x, arguments.tiles, static_cast<int>(problem.batch) * num_heads_kv, arguments.planes_per_group);
    batch = plane / num_heads_kv;
    head_kv = plane % num_heads_kv;
    first_key = tile * kKeys;
    sequence = device_sequence(problem, batch);
    queries = tile_queries(problem, sequence, first_key, first_key + kKeys);
    first_block = queries.any.begin / kQueries;
    blocks = queries.any.begin < queries.any.end ? (queries.any.end + kQueries - 1) / kQueries - first_block : 0;
    steps = blocks * arguments.group_size;
    first_row = padded_start(problem, sequence, batch);
  }

  ONEPASS_DEVICE int head(int step) const { return head_kv * arguments.group_size + step / blocks; }
  ONEPASS_DEVICE int first_query(int step) const { return (first_block + step % blocks) * kQueries; }
  ONEPASS_DEVICE static int stage(int step) { return step % Config::Shape::kStages; }
  ONEPASS_DEVICE static int query_offset(int step) { return Config::kQueryOffset + stage(step) * QueryTile::kBytes; }
  ONEPASS_DEVICE static int gradient_offset(int step) {
    return Config::kGradientOffset + stage(step) * QueryTile::kBytes;
  }
  // Whether the mask cuts the step's block of queries.
  ONEPASS_DEVICE bool masked(int step) const {
    const int first = first_query(step);
    return first < queries.all.begin || first + kQueries > queries.all.end;
  }
  ONEPASS_DEVICE const RowStatistics* statistics(const unsigned char* shared, int step) const {
    return reinterpret_cast<const RowStatistics*>(shared + Config::kStatisticsOffset) + stage(step) * kQueries;
  }
  ONEPASS_DEVICE ScoreUnits units(const unsigned char* shared, int step) const {
    return {arguments.scale_log2, Config::kTerms ? 1.0f : problem.softmax_scale,
            *reinterpret_cast<const std::int32_t*>(shared + Config::kNaturalOffset + stage(step) * 16) != 0};
  }
  ONEPASS_DEVICE float* dq_sums(int step) const {
    return arguments.dq_sums + (head(step) * arguments.padded_rows + first_row + first_query(step)) * Config::kHeadDim;
  }

  ONEPASS_DEVICE void load_keys(std::uint32_t tile, const Operand& operand, std::int64_t dim, bool vectorized) const {
    const auto rows =
        global_rows<const T>(operand, batch, head_kv, sequence.key_start, static_cast<int>(dim), vectorized);
    load_tile<KeyTile, kKeys, kThreads>(tile, rows, first_key, sequence.key_begin, sequence.key_end);
  }

  // Q, dO, the rows' statistics (8 bytes each) and their unit (4 bytes).
  ONEPASS_DEVICE void load_queries(std::uint32_t base, int step) const {
    const auto q = global_rows<const T>(problem.q, batch, head(step), sequence.query_start,
                                        static_cast<int>(problem.head_dim), arguments.vectorized.q);
    const auto dout = global_rows<const T>(arguments.problem.dout, batch, head(step), sequence.query_start,
                                           static_cast<int>(problem.head_dim_v), arguments.vectorized.dout);
    load_tile<QueryTile, kQueries, kThreads, kRecompute>(base + query_offset(step), q, first_query(step), 0,
                                                         sequence.seqlen_q);
    load_tile<QueryTile, kQueries, kThreads, kRecompute>(base + gradient_offset(step), dout, first_query(step), 0,
                                                         sequence.seqlen_q);
    const std::int64_t row = head(step) * arguments.padded_rows + first_row + first_query(step);
    if (threadIdx.x < kQueries) {
      cp_async_small<8>(base + Config::kStatisticsOffset + (stage(step) * kQueries + threadIdx.x) * 8,
                        arguments.statistics + row + threadIdx.x);
    }
    if (threadIdx.x == 0) {
      cp_async_small<4>(base + Config::kNaturalOffset + stage(step) * 16,
                        arguments.natural + row / kStatisticsRows<Config::kFloat>);
    }
    cp_async_commit();
  }

  // Makes a block of queries and of dO finite in shared memory, because dK and dV are products with every row of it,
  // seen or not. Whether some row was not; bit q % kRows of found[q / kRows] says which, for kRows = kQueries / warps.
  ONEPASS_DEVICE static bool make_queries_finite(std::uint32_t base, int step, std::uint32_t* found) {
    constexpr int kRows = kQueries * 32 / kThreads;
    const int warp = threadIdx.x / 32;
    const std::uint32_t rows = make_rows_finite<T, QueryTile, kRows>(base + query_offset(step), kRows * warp) |
                               make_rows_finite<T, QueryTile, kRows>(base + gradient_offset(step), kRows * warp);
    if (lane_id() == 0) found[warp] = rows;
    return __syncthreads_or(rows != 0);
  }
  ONEPASS_DEVICE static bool was_not_finite(const std::uint32_t* found, int query) {
    constexpr int kRows = kQueries * 32 / kThreads;
    return found[query / kRows] >> query % kRows & 1;
  }
};

}  // namespace onepass::cuda
