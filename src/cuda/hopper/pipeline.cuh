// cuda/hopper/pipeline.cuh: rings of shared-memory slots and their barriers.
#pragma once

#include "cuda/hopper/config.cuh"
#include "cuda/hopper/ptx.cuh"

namespace onepass::cuda::hopper {

// A position in a ring of kDepth slots. Consumers wait for `phase`, the producer for its complement: a fresh barrier
// counts as having completed phase 1.
template <int kDepth>
struct Ring {
  int slot = 0;
  std::uint32_t phase = 0;

  ONEPASS_DEVICE void advance() {
    if (++slot == kDepth) {
      slot = 0;
      phase ^= 1;
    }
  }
  ONEPASS_DEVICE Ring next() const {
    Ring ring = *this;
    ring.advance();
    return ring;
  }
};

// In a tile's slot, behind the tile, written by consumers: not 0: the tile must be repeated carefully; its first block
// with values that are not finite, and minus its last one; of each warp the lanes whose upper and lower row need care.
inline constexpr int kRepeatAt = 52, kFirstBadAt = 56, kLastBadAt = 60, kBadRowsAt = 64;

// Addresses of everything in shared memory.
template <class Config>
struct SharedLayout {
  std::uint32_t base;  // 1024-byte aligned, as the 128-byte swizzle asks

  ONEPASS_DEVICE explicit SharedLayout(std::uint32_t start) : base((start + 1023u) & ~1023u) {}
  ONEPASS_DEVICE std::uint32_t query(int slot) const { return base + slot * Config::kQueryBytes; }
  ONEPASS_DEVICE std::uint32_t block(int slot) const { return base + Config::kBlocksAt + slot * Config::kBlockBytes; }
  ONEPASS_DEVICE std::uint32_t tile(int slot) const { return base + Config::kTilesAt + slot * Config::kTileBytes; }
  ONEPASS_DEVICE std::uint32_t next_tile() const { return tile(Config::kTileSlots); }  // the producer's
  ONEPASS_DEVICE std::uint32_t query_full(int slot) const { return base + Config::kBarriersAt + 8 * slot; }
  ONEPASS_DEVICE std::uint32_t query_empty(int slot) const { return query_full(Config::kQuerySlots + slot); }
  ONEPASS_DEVICE std::uint32_t block_full(int slot) const { return query_full(2 * Config::kQuerySlots + slot); }
  ONEPASS_DEVICE std::uint32_t block_empty(int slot) const { return block_full(Config::kBlockSlots + slot); }

  ONEPASS_DEVICE std::uint32_t next_full() const { return block_full(2 * Config::kBlockSlots); }
  ONEPASS_DEVICE std::uint32_t next_empty() const { return next_full() + 8; }
  // Between the producer's warps: the tile is there; who loads its blocks has read it.
  ONEPASS_DEVICE std::uint32_t tile_full(int slot) const { return next_empty() + 8 + 8 * slot; }
  ONEPASS_DEVICE std::uint32_t tile_read(int slot) const { return tile_full(Config::kTileSlots + slot); }

  // One thread, before the block's first __syncthreads.
  ONEPASS_DEVICE void init_barriers() const {
    for (int i = 0; i < Config::kQuerySlots; ++i) {
      barrier_init(query_full(i), 1);
      barrier_init(query_empty(i), Config::kConsumers);
    }
    for (int i = 0; i < Config::kBlockSlots; ++i) {
      barrier_init(block_full(i), 1);
      barrier_init(block_empty(i), 4 * Config::kConsumers);  // every consumer warp
    }
    barrier_init(next_full(), 1);
    barrier_init(next_empty(), 1);
    for (int i = 0; i < Config::kTileSlots; ++i) {
      barrier_init(tile_full(i), 1);
      barrier_init(tile_read(i), 1);
      store_shared(tile(i) + kRepeatAt, 0);
    }
    barrier_init_fence();
  }
};

}  // namespace onepass::cuda::hopper
