// cuda/hopper/backward_producer.cuh: the warps that draw tiles of keys and bring them and the blocks of queries that
// see them into shared memory.
#pragma once

#include "cuda/common/grid_order.cuh"
#include "cuda/hopper/backward_config.cuh"
#include "cuda/hopper/backward_plan.h"
#include "cuda/hopper/key_tiles.cuh"
#include "cuda/hopper/not_finite.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/portable/backward_common.cuh"

namespace onepass::cuda::hopper {

// What stands beside a block's LSEs and deltas: its first query, its mode, the address of the sums of its dQ. Bits of a
// mode; kHidden: no key of the first warpgroup is seen, a bit on: of the second.
inline constexpr int kCutByMask = 1, kNaturalUnits = 2, kHidden = 4;

// Where the number of query c lies among a block's LSEs or deltas: a lane's columns of two accumulator tiles are 16
// bytes.
ONEPASS_DEVICE int note_place(int c) { return c / 16 * 16 + c % 8 / 2 * 4 + c / 8 % 2 * 2 + c % 2; }

template <class Config>
class BackwardProducer {
 public:
  using Element = typename Config::Element;
  static constexpr int kQueries = Config::kQueries;

  ONEPASS_DEVICE BackwardProducer(const BackwardArguments& arguments, const BackwardPlan& plan,
                                  const BackwardMaps& maps, const BackwardLayout<Config>& shared)
      : arguments_(arguments), plan_(plan), problem_(arguments.problem.forward), maps_(maps), shared_(shared) {}

  // One warp draws tiles, whose heads are those of keys, and loads K and V.
  ONEPASS_DEVICE void load_keys() {
    KeyTileStream<Config> tiles(problem_, problem_.num_heads_kv, plan_.order);
    std::uint32_t phase = 1;
    for (;; phase ^= 1) {
      const KeyTile tile = tiles.next();
      barrier_wait(shared_.tile_empty(tiles_.slot), tiles_.phase ^ 1);
      if (lane() == 0) {
        store_key_tile(shared_.tile(tiles_.slot), tile);
        barrier_arrive(shared_.tile_full(tiles_.slot));
      }
      __syncwarp();
      tiles_.advance();
      if (!tile.valid()) return;
      if (lane() != 0) continue;
      barrier_wait(shared_.keys_empty(), phase);
      load_rows(shared_.keys(), &maps_.k, shared_.keys_full(), tile);
      barrier_wait(shared_.values_empty(), phase);
      load_rows(shared_.values(), &maps_.v, shared_.values_full(), tile);
    }
  }

  // One warp loads blocks of queries and what stands beside them.
  ONEPASS_DEVICE void load_blocks() {
    for_each_tile([&](std::uint32_t tile) {
      describe(tile);
      Statistics statistics = load_statistics(tile, 0, 0);
      for_each_block(tile, [&](int i, int block, bool last) {
        const int slot = queries_.slot, gradients = gradients_.slot;
        const int mode = mode_of(tile, block);
        const bool suspect = (mode & kCutByMask) != 0 && is_suspect(statistics, tile, block);
        const std::uint32_t full = suspect ? shared_.landed() : shared_.queries_full(slot);
        const std::uint32_t gradients_full = suspect ? full : shared_.gradients_full(gradients);
        barrier_wait(shared_.queries_empty(slot), queries_.phase ^ 1);
        load_block(shared_.queries(slot), &maps_.q, full, tile, i, block);
        store_notes(slot, statistics, mode, tile, i, block);
        __syncwarp();
        if (lane() == 0) barrier_expect(full, (suspect ? 2 : 1) * Config::kQueryBytes);
        barrier_wait(shared_.gradients_empty(gradients), gradients_.phase ^ 1);
        if (lane() == 0 && !suspect) barrier_expect(gradients_full, Config::kQueryBytes);
        load_block(shared_.gradients(gradients), &maps_.dout, gradients_full, tile, i, block);
        if (suspect) make_finite(slot, gradients);
        queries_.advance();
        gradients_.advance();
        // Of the next block, on its way while its slot is waited for.
        const bool turn = block + 1 == blocks_of(tile);
        if (!last) statistics = load_statistics(tile, i + turn, turn ? 0 : block + 1);
      });
    });
  }

 private:
  ONEPASS_DEVICE static int lane() { return threadIdx.x % 32; }

  // ---- tiles --------------------------------------------------------------------------------------------------------
  // Calls use(address) for every tile that is handed over.
  template <class Use>
  ONEPASS_DEVICE void for_each_tile(const Use& use) {
    for (;;) {
      const int slot = tiles_.slot;
      barrier_wait(shared_.tile_full(slot), tiles_.phase);
      tiles_.advance();
      const std::uint32_t tile = shared_.tile(slot);
      const bool valid = blocks_of(tile) >= 0;
      if (valid) use(tile);
      __syncwarp();
      if (lane() == 0) barrier_arrive(shared_.tile_empty(slot));
      if (!valid) return;
    }
  }
  // Calls use(head of the group, block, whether it is the last) for the blocks of queries that a tile meets.
  template <class Use>
  ONEPASS_DEVICE void for_each_block(std::uint32_t tile, const Use& use) {
    const int group_size = arguments_.group_size;
    for (int i = 0; i < group_size; ++i) {
      for (int block = 0; block < blocks_of(tile); ++block) {
        use(i, block, i + 1 == group_size && block + 1 == blocks_of(tile));
      }
    }
  }
  ONEPASS_DEVICE static int blocks_of(std::uint32_t tile) { return load_shared<int>(tile + 12); }

  ONEPASS_DEVICE static int first_query(std::uint32_t tile, int block) {
    return (load_shared<int>(tile + 16) + block) * kQueries;
  }

  // Queries that see all keys of the tile.
  ONEPASS_DEVICE Range clean_queries(std::uint32_t address) const {
    const KeyTile tile = load_key_tile(address);
    return tile_queries(problem_, tile.sequence(), tile.key, tile.key + Config::kKeys).all;
  }
  ONEPASS_DEVICE static bool is_cut(const Range& clean, int first) {
    return first < clean.begin || first + kQueries > clean.end;
  }

  // What who loads Q keeps behind the tile: the clean queries and the first row of the first block in statistics and
  // sums, in blocks; the queries that see any of either warpgroup's keys.
  static constexpr int kCleanAt = 48, kSeeingAt = 64;
  ONEPASS_DEVICE void describe(std::uint32_t address) const {
    const KeyTile tile = load_key_tile(address);
    const DeviceSequence sequence = tile.sequence();
    const Range clean = clean_queries(address);
    const int row_block = static_cast<int>(padded_start(problem_, sequence, tile.batch) / kQueries) + tile.first_block;
    const Range first = tile_queries(problem_, sequence, tile.key, tile.key + 64).any;
    const Range second = tile_queries(problem_, sequence, tile.key + 64, tile.key + 128).any;
    if (lane() == 0) {
      store_shared(address + kCleanAt, int4{clean.begin, clean.end, row_block, 0});
      store_shared(address + kSeeingAt, int4{first.begin, first.end, second.begin, second.end});
    }
    __syncwarp();
  }
  ONEPASS_DEVICE static int mode_of(std::uint32_t tile, int block) {
    const int first = first_query(tile, block);
    const int2 clean = load_shared<int2>(tile + kCleanAt);
    const int4 seeing = load_shared(tile + kSeeingAt);
    int mode = is_cut({clean.x, clean.y}, first) ? kCutByMask : 0;
    if (first >= seeing.y || first + kQueries <= seeing.x) mode |= kHidden;
    if (first >= seeing.w || first + kQueries <= seeing.z) mode |= kHidden << 1;
    return mode;
  }
  // In statistics and dQ sums.
  ONEPASS_DEVICE std::int64_t row_of(std::uint32_t tile, int i, int block) const {
    const std::int64_t head = load_shared<int>(tile + 4) * arguments_.group_size + i;
    return head * arguments_.padded_rows + std::int64_t{load_shared<int>(tile + kCleanAt + 8) + block} * kQueries;
  }

  // ---- copies -------------------------------------------------------------------------------------------------------
  ONEPASS_DEVICE void load_rows(std::uint32_t destination, const CUtensorMap* map, std::uint32_t full,
                                const KeyTile& tile) const {
    if (tile.blocks == 0) return barrier_arrive(full);
    barrier_expect(full, Config::kKeyBytes);
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      tma_load(destination + slab * Config::kKeySlabBytes, map, full, slab * kSlabColumns, tile.key_start + tile.key,
               tile.head, problem_.ragged() ? 0 : tile.batch);
    }
  }

  ONEPASS_DEVICE void load_block(std::uint32_t destination, const CUtensorMap* map, std::uint32_t full,
                                 std::uint32_t tile, int i, int block) const {
    if (lane() != 0) return;
    const int2 batch_and_head = load_shared<int2>(tile);
    const int token = load_shared<int>(tile + 20) + first_query(tile, block);
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      tma_load(destination + slab * Config::kQuerySlabBytes, map, full, slab * kSlabColumns, token,
               batch_and_head.y * arguments_.group_size + i, problem_.ragged() ? 0 : batch_and_head.x);
    }
  }

  struct Statistics {
    float4 rows;  // the lane's two
    bool natural;
  };
  ONEPASS_DEVICE Statistics load_statistics(std::uint32_t tile, int i, int block) const {
    const std::int64_t row = row_of(tile, i, block);
    return {reinterpret_cast<const float4*>(arguments_.statistics + row)[lane()],
            arguments_.natural[row / kStatisticsRows<false>] != 0};
  }

  ONEPASS_DEVICE void store_notes(int slot, const Statistics& statistics, int mode, std::uint32_t tile, int i,
                                  int block) const {
    const std::uint32_t notes = shared_.notes(slot), mine = notes + 4 * note_place(2 * lane());
    const bool natural = statistics.natural;
    const float4 rows = statistics.rows;
    const int2 lse = {__float_as_int(-rows.x), __float_as_int(-rows.z)};
    store_shared(mine, natural ? int2{0, 0} : lse);
    store_shared(mine + Config::kDeltasAt, int2{__float_as_int(rows.y), __float_as_int(rows.w)});
    if (natural) store_shared(mine + Config::kNaturalAt, lse);
    if (lane() != 0) return;
    const auto sums = reinterpret_cast<std::uint64_t>(arguments_.dq_sums + row_of(tile, i, block) * Config::kHeadDim);
    store_shared(notes + Config::kBlockNoteAt, int4{first_query(tile, block), mode | (natural ? kNaturalUnits : 0),
                                                    static_cast<int>(sums), static_cast<int>(sums >> 32)});
  }

  // Whether a row of Q or dO may hold what is not finite: its LSE or its delta is not, then. (An LSE of −∞, which
  // statistics have as +∞, may be that of an empty row, or come from an infinite query.) Rows beyond a ragged sequence
  // are its neighbour's, beyond others TMA has written zeros.
  ONEPASS_DEVICE bool is_suspect(const Statistics& statistics, std::uint32_t tile, int block) const {
    const float4 rows = statistics.rows;
    const int left = load_shared<int>(tile + 24) - first_query(tile, block) - 2 * lane();  // of the sequence
    const bool finite[2] = {fabsf(rows.x) < kInfinity && fabsf(rows.y) < kInfinity,
                            fabsf(rows.z) < kInfinity && fabsf(rows.w) < kInfinity};
    return __any_sync(
        ~0u, (!finite[0] && (left > 0 || problem_.ragged())) || (!finite[1] && (left > 1 || problem_.ragged())));
  }

  // A block that the mask cuts is made finite, because dK and dV are products with every row of it, seen or not. The
  // LSE of a row that was not becomes NaN, and so what it contributes to the keys that it does see.
  ONEPASS_DEVICE void make_finite(int slot, int gradients) {
    barrier_wait(shared_.landed(), landed_phase_);
    landed_phase_ ^= 1;
    make_rows_finite(shared_.queries(slot), slot);
    make_rows_finite(shared_.gradients(gradients), slot);
    async_proxy_fence();
    __syncwarp();
    if (lane() != 0) return;
    barrier_arrive(shared_.queries_full(slot));
    barrier_arrive(shared_.gradients_full(gradients));
  }
  ONEPASS_DEVICE void make_rows_finite(std::uint32_t block, int slot) const {
#pragma unroll 1
    for (int i = lane(); i < Config::kQueryBytes / 16; i += 32) {
      const int4 chunk = load_shared(block + 16 * i), finite = finite_elements<Element>(chunk);
      if (!differ(chunk, finite)) continue;
      store_shared(block + 16 * i, finite);
      store_shared(shared_.notes(slot) + 4 * note_place(i / 8 % kQueries), 0x7FFFFFFF);
    }
  }

  const BackwardArguments& arguments_;
  const BackwardPlan& plan_;
  const Problem& problem_;
  const BackwardMaps& maps_;
  const BackwardLayout<Config> shared_;
  Ring<Config::kTileSlots> tiles_;
  std::uint32_t landed_phase_ = 0;
  Ring<Config::kQuerySlots> queries_;
  Ring<Config::kGradientSlots> gradients_;
};

}  // namespace onepass::cuda::hopper
