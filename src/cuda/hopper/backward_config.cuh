// cuda/hopper/backward_config.cuh: tile sizes of the backward kernel and its shared memory.
//
// One CTA an SM, for tiles of 128 keys: two consumer warpgroups of 64 keys each, which compute dK, dV and dS; one that
// computes dQ from dS and K; and a producer, which loads a tile's K and V and keeps rings of blocks of 64 queries full:
// Q and notes in one, dO in the other.
#pragma once

#include "cuda/hopper/config.cuh"
#include "cuda/hopper/ptx.cuh"

namespace onepass::cuda::hopper {

template <class T, int kHeadDim_>
struct BackwardConfig {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;  // both head dims, zero-filled up to it
  static constexpr int kQueries = 64;         // of a block: the padding of statistics and dQ sums
  static constexpr int kConsumers = 2;
  static constexpr int kKeys = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 2);
  static constexpr int kConsumerRegisters = 208, kSumRegisters = 64, kProducerRegisters = 32;
  static constexpr bool kKeysInRegisters = kHeadDim <= 64;  // K and V for the products with Qᵀ and dOᵀ

  static constexpr int kSlabs = kHeadDim / kSlabColumns;
  static constexpr int kKeySlabBytes = kKeys * 128, kQuerySlabBytes = kQueries * 128;
  static constexpr int kKeyBytes = kSlabs * kKeySlabBytes, kQueryBytes = kSlabs * kQuerySlabBytes;
  static constexpr int kScoreBytes = kKeys * kQueries * 2;
  static constexpr int kSumBytes = kQueries / 4 * kSlabColumns * 4;  // of a slab of a block's dQ, that a warp computes
  static constexpr int kQuerySlots = kHeadDim <= 64 ? 4 : 3;
  static constexpr int kGradientSlots = kHeadDim <= 64 ? 4 : 2;  // a power of 2
  // Beside a slot of queries: negated LSEs in base 2, deltas, negated LSEs in natural units where those in base 2 would
  // be too large (0 then), and 16 bytes on the block (backward_producer.cuh).
  static constexpr int kDeltasAt = 4 * kQueries, kNaturalAt = 8 * kQueries, kBlockNoteAt = 12 * kQueries;
  static constexpr int kNoteBytes = kBlockNoteAt + 16;
  static constexpr int kTileBytes = 80, kTileSlots = 2;

  // Layout: K, V, Q, dO, dSᵀ twice, dQ by slabs, notes, tiles, notes on keys, barriers.
  static constexpr int kQueriesAt = 2 * kKeyBytes;
  static constexpr int kGradientsAt = kQueriesAt + kQuerySlots * kQueryBytes;
  static constexpr int kScoresAt = kGradientsAt + kGradientSlots * kQueryBytes;
  static constexpr int kSumsAt = kScoresAt + 2 * kScoreBytes;
  static constexpr int kNotesAt = kSumsAt + 4 * kSlabs * kSumBytes;
  static constexpr int kTilesAt = kNotesAt + kQuerySlots * kNoteBytes;
  static constexpr int kSumNotesAt = kTilesAt + kTileSlots * kTileBytes;  // where dQ of each dSᵀ goes
  static constexpr int kSeeingAt = kSumNotesAt + 16;                      // the queries that see each key
  static constexpr int kBadKeysAt = kSeeingAt + 8 * kKeys;                // a word of each consumer warp
  static constexpr int kBarriersAt = kBadKeysAt + 16 * kConsumers;
  static constexpr int kBarriers = 9 + 2 * kTileSlots + 2 * kQuerySlots + 2 * kGradientSlots;
  static constexpr int kSharedMemory = 1024 + kBarriersAt + 8 * kBarriers;  // 1024: alignment

  static_assert(kHeadDim % kSlabColumns == 0 && kHeadDim <= 128, "registers");
  static_assert(kSharedMemory <= kSharedMemoryLimit, "shared memory");
  static_assert((kGradientSlots & (kGradientSlots - 1)) == 0);
};

template <class Config>
struct BackwardLayout {
  std::uint32_t base;  // 1024-byte aligned, as the 128-byte swizzle asks

  ONEPASS_DEVICE explicit BackwardLayout(std::uint32_t start) : base((start + 1023u) & ~1023u) {}
  ONEPASS_DEVICE std::uint32_t keys() const { return base; }
  ONEPASS_DEVICE std::uint32_t values() const { return base + Config::kKeyBytes; }
  ONEPASS_DEVICE std::uint32_t queries(int slot) const {
    return base + Config::kQueriesAt + slot * Config::kQueryBytes;
  }
  ONEPASS_DEVICE std::uint32_t gradients(int slot) const {
    return base + Config::kGradientsAt + slot * Config::kQueryBytes;
  }
  ONEPASS_DEVICE std::uint32_t scores(int parity) const {
    return base + Config::kScoresAt + parity * Config::kScoreBytes;
  }
  ONEPASS_DEVICE std::uint32_t sums(int slab, int warp) const {
    return base + Config::kSumsAt + (4 * slab + warp) * Config::kSumBytes;
  }
  ONEPASS_DEVICE std::uint32_t sum_note(int parity) const { return base + Config::kSumNotesAt + 8 * parity; }
  ONEPASS_DEVICE std::uint32_t notes(int slot) const { return base + Config::kNotesAt + slot * Config::kNoteBytes; }
  ONEPASS_DEVICE std::uint32_t tile(int slot) const { return base + Config::kTilesAt + slot * Config::kTileBytes; }
  ONEPASS_DEVICE std::uint32_t seeing(int key) const { return base + Config::kSeeingAt + 8 * key; }
  ONEPASS_DEVICE std::uint32_t bad_keys(int warp) const { return base + Config::kBadKeysAt + 4 * warp; }

  ONEPASS_DEVICE std::uint32_t keys_full() const { return base + Config::kBarriersAt; }
  ONEPASS_DEVICE std::uint32_t keys_empty() const { return keys_full() + 8; }
  ONEPASS_DEVICE std::uint32_t values_full() const { return keys_full() + 16; }
  ONEPASS_DEVICE std::uint32_t values_empty() const { return keys_full() + 24; }
  ONEPASS_DEVICE std::uint32_t scores_full(int parity) const { return keys_full() + 32 + 8 * parity; }
  ONEPASS_DEVICE std::uint32_t scores_empty(int parity) const { return keys_full() + 48 + 8 * parity; }
  ONEPASS_DEVICE std::uint32_t tile_full(int slot) const { return keys_full() + 64 + 8 * slot; }
  ONEPASS_DEVICE std::uint32_t tile_empty(int slot) const { return tile_full(Config::kTileSlots + slot); }
  ONEPASS_DEVICE std::uint32_t queries_full(int slot) const { return tile_full(2 * Config::kTileSlots + slot); }
  ONEPASS_DEVICE std::uint32_t queries_empty(int slot) const { return queries_full(Config::kQuerySlots + slot); }
  ONEPASS_DEVICE std::uint32_t gradients_full(int slot) const { return queries_full(2 * Config::kQuerySlots + slot); }
  ONEPASS_DEVICE std::uint32_t gradients_empty(int slot) const { return gradients_full(Config::kGradientSlots + slot); }
  // A block that must be made finite before it is full.
  ONEPASS_DEVICE std::uint32_t landed() const { return gradients_full(2 * Config::kGradientSlots); }

  // One thread, before the block's first __syncthreads.
  ONEPASS_DEVICE void init_barriers() const {
    constexpr int kWarps = 4 * Config::kConsumers;
    barrier_init(keys_full(), 1);
    barrier_init(keys_empty(), kWarps + 4);  // and who computes dQ
    barrier_init(values_full(), 1);
    barrier_init(values_empty(), Config::kConsumers);
    for (int i = 0; i < 2; ++i) {
      barrier_init(scores_full(i), kWarps);
      barrier_init(scores_empty(i), 4);
    }
    for (int i = 0; i < Config::kTileSlots; ++i) {
      barrier_init(tile_full(i), 1);
      barrier_init(tile_empty(i), kWarps + 4 + 1);  // and who loads blocks
    }
    for (int i = 0; i < Config::kQuerySlots; ++i) {
      barrier_init(queries_full(i), 1);
      barrier_init(queries_empty(i), kWarps);
    }
    for (int i = 0; i < Config::kGradientSlots; ++i) {
      barrier_init(gradients_full(i), 1);
      barrier_init(gradients_empty(i), kWarps);
    }
    barrier_init(landed(), 1);
    barrier_init_fence();
  }
};

}  // namespace onepass::cuda::hopper
