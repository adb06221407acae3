// cuda/hopper/producer.cuh: one warp that draws tiles and keeps the rings of Q, K and V full through TMA.
#pragma once

#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/scheduler.cuh"

namespace onepass::cuda::hopper {

struct OperandMaps {
  const CUtensorMap *q, *k, *v;
};

template <class Config>
class Producer {
 public:
  ONEPASS_DEVICE Producer(const Problem& problem, const Plan& plan, const OperandMaps& maps,
                          const SharedLayout<Config>& shared)
      : problem_(problem),
        group_size_(static_cast<int>(problem.group_size())),
        maps_(maps),
        shared_(shared),
        stream_(problem, plan) {}

  ONEPASS_DEVICE void run() {
    fetch_next();
    for (int idle = 0; idle < Config::kQuerySlots;) {
      const std::uint32_t slot = shared_.tile(queries_.slot);
      barrier_wait(shared_.query_empty(queries_.slot), queries_.phase ^ 1);
      const bool repeat = load_shared(slot + 48).y != 0;
      Tile tile = load_tile(repeat ? slot : shared_.next_tile());
      const bool fresh = !repeat && tile.valid();
      if (repeat) tile.mode |= kCareful;
      idle = repeat || fresh ? 0 : idle + 1;
      // A tile without rows makes the consumers let go of the slots before, whose tiles may have to be repeated.
      if (idle > 0 && idle < Config::kQuerySlots) tile = Tile{.mode = kCareful};
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        hand_over(tile);
        if (tile.valid()) load_blocks(tile);
      }
      queries_.advance();
      __syncwarp();
      if (fresh) fetch_next();
    }
  }

 private:
  // Kept in shared memory: registers are too few for it and the tile that is being served.
  ONEPASS_DEVICE void fetch_next() {
    const Tile tile = stream_.next();
    if (threadIdx.x % 32 == 0) store_tile(shared_.next_tile(), tile);
    __syncwarp();
  }

  ONEPASS_DEVICE void hand_over(const Tile& tile) {
    const int slot = queries_.slot;
    store_tile(shared_.tile(slot), tile);
    if (!tile.valid()) {
      barrier_arrive(shared_.query_full(slot));
      return;
    }
    barrier_expect(shared_.query_full(slot), Config::kQueryBytes);
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      tma_load(shared_.query(slot) + slab * (Config::kRows * 128), maps_.q, shared_.query_full(slot),
               slab * kSlabColumns, tile.query_start + tile.row, tile.head, batch_index(tile));
    }
  }

  // K of the last block, then K and V in turn, then V of the first block: the order in which they are used.
  ONEPASS_DEVICE void load_blocks(const Tile& tile) {
    if (tile.blocks == 0) return;
    const int head = tile.head / group_size_;
    const int last = tile.first_block + tile.blocks - 1;
    load(tile, head, maps_.k, last);
#pragma unroll 1
    for (int block = last - 1; block >= tile.first_block; --block) {
      load(tile, head, maps_.k, block);
      load(tile, head, maps_.v, block + 1);
    }
    load(tile, head, maps_.v, tile.first_block);
  }

  ONEPASS_DEVICE void load(const Tile& tile, int head, const CUtensorMap* map, int block) {
    const int slot = blocks_.slot;
    barrier_wait(shared_.block_empty(slot), blocks_.phase ^ 1);
    barrier_expect(shared_.block_full(slot), Config::kBlockBytes);
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      tma_load(shared_.block(slot) + slab * (Config::kKeys * 128), map, shared_.block_full(slot), slab * kSlabColumns,
               tile.key_start + block * Config::kKeys, head, batch_index(tile));
    }
    blocks_.advance();
  }

  ONEPASS_DEVICE int batch_index(const Tile& tile) const { return problem_.ragged() ? 0 : tile.batch; }

  const Problem& problem_;
  const int group_size_;
  const OperandMaps maps_;
  const SharedLayout<Config> shared_;
  TileStream<Config> stream_;
  Ring<Config::kQuerySlots> queries_;
  Ring<Config::kBlockSlots> blocks_;
};

}  // namespace onepass::cuda::hopper
