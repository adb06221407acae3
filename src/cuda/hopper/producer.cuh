// cuda/hopper/producer.cuh: what keeps the consumers busy, a warp each: one draws and decodes tiles, one hands them
// over and loads their queries, one loads their blocks of keys and values. All loads are TMA's.
#pragma once

#include "cuda/common/grid_order.cuh"
#include "cuda/hopper/kernels.h"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/scheduler.cuh"

namespace onepass::cuda::hopper {

template <class Config>
class Producer {
 public:
  ONEPASS_DEVICE Producer(const Problem& problem, const Plan& plan, const TensorMaps& maps,
                          const SharedLayout<Config>& shared)
      : problem_(problem), maps_(maps), shared_(shared), plan_(plan) {}

  // A whole warp. Decoding a tile takes as long as working through a short one.
  ONEPASS_DEVICE void draw_tiles() const {
    TileStream<Config> stream(problem_, plan_);
    if (has_bounds_in_memory(problem_)) wait_for_previous_grid();
    for (std::uint32_t phase = 1;; phase ^= 1) {
      barrier_wait(shared_.next_empty(), phase);
      const bool found = stream.next(shared_.next_tile());
      wait_for_previous_grid();  // only the first tile is decoded before; nobody reads memory without a tile
      if (threadIdx.x % 32 == 0) barrier_arrive(shared_.next_full());
      __syncwarp();
      if (!found) return;
    }
  }

  // One thread.
  ONEPASS_DEVICE void load_queries() const {
    Ring<Config::kTileSlots> tiles;
    Ring<Config::kQuerySlots> queries;
    std::uint32_t next_phase = 0;
    bool none_left = false;
    for (int idle = 0; idle < Config::kTileSlots; tiles.advance()) {
      const std::uint32_t slot = shared_.tile(tiles.slot);
      // The consumers let go of a tile with its last queries, which lay where the new tile's first ones will.
      barrier_wait(shared_.query_empty(queries.slot), queries.phase ^ 1);
      barrier_wait(shared_.tile_read(tiles.slot), tiles.phase ^ 1);
      Tile tile;
      if (load_shared(slot + 48).y != 0) {  // asked for a second attempt
        tile = load_tile(slot);
        tile.mode |= kCareful;
        idle = 0;
      } else if (!none_left) {
        barrier_wait(shared_.next_full(), next_phase);
        next_phase ^= 1;
        tile = load_tile(shared_.next_tile());
        none_left = !tile.valid();
        idle = none_left ? 1 : 0;
      } else {
        ++idle;
      }
      // A tile without rows makes the consumers let go of the slots before, whose tiles may have to be repeated.
      if (idle > 0) tile = Tile{.split = idle < Config::kTileSlots ? 0 : -1, .mode = kCareful};
      store_tile(slot, tile);
      barrier_arrive(shared_.tile_full(tiles.slot));
      if (!tile.valid()) {
        barrier_arrive(shared_.query_full(queries.slot));
        continue;
      }
      load_queries(maps_.q, queries.slot, tile);
      queries.advance();
      if constexpr (Config::kPiecewise) {
        barrier_wait(shared_.query_empty(queries.slot), queries.phase ^ 1);
        load_queries(maps_.q_far, queries.slot, tile);
        queries.advance();
      }
    }
  }

  // One thread.
  ONEPASS_DEVICE void load_blocks() const {
    Ring<Config::kTileSlots> tiles;
    Ring<Config::kBlockSlots> ring;
    const int group_size = static_cast<int>(problem_.group_size());
    for (;; tiles.advance()) {
      barrier_wait(shared_.tile_full(tiles.slot), tiles.phase);
      const Tile tile = load_tile(shared_.tile(tiles.slot));
      barrier_arrive(shared_.tile_read(tiles.slot));
      if (!tile.valid()) return;
      // Not earlier, so that no SM has drawn more tiles than need be when the others run out of them.
      if ((tile.mode & kCareful) == 0) barrier_arrive(shared_.next_empty());
      const int head = tile.head / group_size;
#pragma unroll
      for (int pair = 0; pair < Config::kPairs; ++pair) {
        load_blocks(ring, tile, head, blocks_of<Config>(plan_, tile, pair == 1), pair == 0 ? maps_.k : maps_.k_far);
      }
    }
  }

 private:
  // K of the last block, then K and V in turn, then V of the first block: the order in which they are used.
  ONEPASS_DEVICE void load_blocks(Ring<Config::kBlockSlots>& ring, const Tile& tile, int head, const Blocks& blocks,
                                  const CUtensorMap& keys) const {
    const int loads = 2 * blocks.count();
#pragma unroll 1
    for (int i = 0; i < loads; ++i) {
      const bool values = i % 2 == 0 ? i > 0 : i == loads - 1;
      const int block = blocks.end - 1 - ((i + 1) / 2 - values);
      const std::uint32_t full = shared_.block_full(ring.slot);
      barrier_wait(shared_.block_empty(ring.slot), ring.phase ^ 1);
      barrier_expect(full, Config::kBlockBytes);
      load_rows<Config::kKeys>(values ? maps_.v : keys, full, shared_.block(ring.slot), tile,
                               tile.key_start + block * Config::kKeys, head);
      ring.advance();
    }
  }

  ONEPASS_DEVICE void load_queries(const CUtensorMap& map, int slot, const Tile& tile) const {
    const std::uint32_t full = shared_.query_full(slot);
    barrier_expect(full, Config::kQueryBytes);
    load_rows<Config::kRows>(map, full, shared_.query(slot), tile, tile.query_start + tile.row, tile.head);
  }

  template <int kRows>
  ONEPASS_DEVICE void load_rows(const CUtensorMap& map, std::uint32_t barrier, std::uint32_t to, const Tile& tile,
                                int token, int head) const {
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      tma_load(to + slab * (kRows * 128), &map, barrier, slab * kSlabColumns, token, head,
               problem_.ragged() ? 0 : tile.batch);
    }
  }

  const Problem& problem_;
  const TensorMaps& maps_;
  const SharedLayout<Config> shared_;
  const Plan& plan_;
};

}  // namespace onepass::cuda::hopper
