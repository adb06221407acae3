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
      : problem_(problem), maps_(maps), shared_(shared), stream_(problem, plan) {}

  ONEPASS_DEVICE void run() {
    for (;;) {
      const Tile tile = stream_.next();
      if (threadIdx.x % 32 == 0) {
        hand_over(tile);
        if (tile.valid()) load_blocks(tile);
      }
      __syncwarp();
      if (!tile.valid()) return;
    }
  }

 private:
  ONEPASS_DEVICE void hand_over(const Tile& tile) {
    const int slot = queries_.slot;
    barrier_wait(shared_.query_empty(slot), queries_.phase ^ 1);
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
    queries_.advance();
  }

  // K of the last block, then K and V in turn, then V of the first block: the order in which they are used.
  ONEPASS_DEVICE void load_blocks(const Tile& tile) {
    if (tile.blocks == 0) return;
    const int last = tile.first_block + tile.blocks - 1;
    load(tile, maps_.k, last);
    for (int block = last - 1; block >= tile.first_block; --block) {
      load(tile, maps_.k, block);
      load(tile, maps_.v, block + 1);
    }
    load(tile, maps_.v, tile.first_block);
  }

  ONEPASS_DEVICE void load(const Tile& tile, const CUtensorMap* map, int block) {
    const int slot = blocks_.slot;
    barrier_wait(shared_.block_empty(slot), blocks_.phase ^ 1);
    barrier_expect(shared_.block_full(slot), Config::kBlockBytes);
    const int head = tile.head / static_cast<int>(problem_.group_size());
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      tma_load(shared_.block(slot) + slab * (Config::kKeys * 128), map, shared_.block_full(slot), slab * kSlabColumns,
               tile.key_start + block * Config::kKeys, head, batch_index(tile));
    }
    blocks_.advance();
  }

  ONEPASS_DEVICE int batch_index(const Tile& tile) const { return problem_.ragged() ? 0 : tile.batch; }

  const Problem& problem_;
  const OperandMaps maps_;
  const SharedLayout<Config> shared_;
  TileStream<Config> stream_;
  Ring<Config::kQuerySlots> queries_;
  Ring<Config::kBlockSlots> blocks_;
};

}  // namespace onepass::cuda::hopper
