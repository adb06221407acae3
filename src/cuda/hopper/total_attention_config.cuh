// cuda/hopper/total_attention_config.cuh: tile sizes of the total attention kernels and their shared memory.
//
// One CTA an SM: kConsumers consumer warpgroups of 64 keys each and a producer, which fills a slot with a tile's keys
// and a ring of slots with blocks of kQueries queries.
#pragma once

#include "cuda/hopper/config.cuh"
#include "cuda/hopper/ptx.cuh"

namespace onepass::cuda::hopper {

template <class T, int kHeadDim_, int kConsumers_, int kQueries_, bool kKeysInRegisters_, bool kTerms_>
struct TotalAttentionConfig {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;                   // zero-filled up to it
  static constexpr int kConsumers = kConsumers_;               // consumer warpgroups
  static constexpr int kQueries = kQueries_;                   // of a block
  static constexpr bool kKeysInRegisters = kKeysInRegisters_;  // for the products; or else in shared memory
  static constexpr bool kTerms = kTerms_;                      // softcap, ALiBi, bias

  static constexpr int kKeys = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 216 : kConsumers == 3 ? 152 : 104;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 72 : kConsumers == 3 ? 56 : 64;

  static constexpr int kSlabs = (kHeadDim + kSlabColumns - 1) / kSlabColumns;
  static constexpr int kKeySlabBytes = kKeys * 128;
  static constexpr int kKeyBytes = kSlabs * kKeySlabBytes;
  static constexpr int kQuerySlabBytes = kQueries * 128;
  static constexpr int kQueryBytes = kSlabs * kQuerySlabBytes;
  static constexpr int kTileBytes = 64;
  static constexpr int kNoteBytes = 4 * kQueries + 16;  // beside a slot: a float for each query and a word for all
  static constexpr int kKeySlots = kKeysInRegisters || 2 * kKeyBytes > kSharedMemoryLimit / 3 * 2 ? 1 : 2;
  static constexpr int kFittingSlots =
      (kSharedMemoryLimit - 1024 - kKeySlots * (kKeyBytes + kTileBytes + 16)) / (kQueryBytes + kNoteBytes + 16);
  static constexpr int kQuerySlots = kFittingSlots < 8 ? kFittingSlots : 8;

  // Layout: keys, queries, tiles, notes, barriers.
  static constexpr int kQueriesAt = kKeySlots * kKeyBytes;
  static constexpr int kTilesAt = kQueriesAt + kQuerySlots * kQueryBytes;
  static constexpr int kNotesAt = kTilesAt + kKeySlots * kTileBytes;
  static constexpr int kBarriersAt = kNotesAt + kQuerySlots * kNoteBytes;
  static constexpr int kSharedMemory = 1024 + kBarriersAt + 16 * (kKeySlots + kQuerySlots);  // 1024: alignment

  static_assert(kQuerySlots >= 2, "a block is copied while another is in use");
  static_assert(kSharedMemory <= kSharedMemoryLimit, "shared memory");
  static_assert(kConsumers >= 2 && kConsumers <= 4, "registers");
  // What a launch has: 65536 registers divided by the threads, in steps of 8 a thread. More would be waited for
  // forever.
  static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <= 65536 / kThreads / 8 * 8 * (kConsumers + 1));
};

template <class Config>
struct TotalAttentionLayout {
  std::uint32_t base;  // 1024-byte aligned, as the 128-byte swizzle asks

  ONEPASS_DEVICE explicit TotalAttentionLayout(std::uint32_t start) : base((start + 1023u) & ~1023u) {}
  ONEPASS_DEVICE std::uint32_t keys(int slot) const { return base + slot * Config::kKeyBytes; }
  ONEPASS_DEVICE std::uint32_t queries(int slot) const {
    return base + Config::kQueriesAt + slot * Config::kQueryBytes;
  }
  ONEPASS_DEVICE std::uint32_t tile(int slot) const { return base + Config::kTilesAt + slot * Config::kTileBytes; }
  ONEPASS_DEVICE std::uint32_t notes(int slot) const { return base + Config::kNotesAt + slot * Config::kNoteBytes; }
  ONEPASS_DEVICE std::uint32_t keys_full(int slot) const { return base + Config::kBarriersAt + 8 * slot; }
  ONEPASS_DEVICE std::uint32_t keys_empty(int slot) const { return keys_full(Config::kKeySlots + slot); }
  ONEPASS_DEVICE std::uint32_t queries_full(int slot) const { return keys_full(2 * Config::kKeySlots + slot); }
  ONEPASS_DEVICE std::uint32_t queries_empty(int slot) const { return queries_full(Config::kQuerySlots + slot); }

  // One thread, before the block's first __syncthreads.
  ONEPASS_DEVICE void init_barriers() const {
    for (int i = 0; i < Config::kKeySlots; ++i) {
      barrier_init(keys_full(i), 1);
      barrier_init(keys_empty(i), 4 * Config::kConsumers);  // every consumer warp
    }
    for (int i = 0; i < Config::kQuerySlots; ++i) {
      barrier_init(queries_full(i), 1);
      barrier_init(queries_empty(i), 4 * Config::kConsumers);
    }
    barrier_init_fence();
  }
};

}  // namespace onepass::cuda::hopper
