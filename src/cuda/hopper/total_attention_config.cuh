// cuda/hopper/total_attention_config.cuh: tile sizes of the total attention kernels and their shared memory.
//
// One CTA an SM: kConsumers consumer warpgroups of 64 keys each and a producer. One ring of slots of kQueries rows:
// a tile's keys (64·kConsumers rows in one slot or more), then its blocks of queries.
#pragma once

#include "cuda/hopper/config.cuh"
#include "cuda/hopper/ptx.cuh"

namespace onepass::cuda::hopper {

template <class T, int kHeadDim_, int kConsumers_, int kQueries_, int kPolynomials_, bool kTerms_>
struct TotalAttentionConfig {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;          // zero-filled up to it
  static constexpr int kConsumers = kConsumers_;      // consumer warpgroups
  static constexpr int kQueries = kQueries_;          // of a block
  static constexpr int kPolynomials = kPolynomials_;  // of 8 exponentials, how many the FMA units evaluate
  static constexpr bool kTerms = kTerms_;             // softcap, ALiBi, bias

  static constexpr int kKeys = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 216 : 152;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 72 : 56;
  static constexpr int kSlabs = (kHeadDim + kSlabColumns - 1) / kSlabColumns;
  static constexpr int kSlabBytes = kQueries * 128;
  static constexpr int kSlotBytes = kSlabs * kSlabBytes;
  static constexpr int kKeySlots = (kKeys + kQueries - 1) / kQueries;
  // Beside a slot: a float for each query and a word for all; or the tile.
  static constexpr int kNoteBytes = 4 * kQueries + 16;
  static constexpr int kFittingSlots = (kSharedMemoryLimit - 1024) / (kSlotBytes + kNoteBytes + 16);
  static constexpr int kSlots = kFittingSlots < 8 ? kFittingSlots : 8;

  static constexpr int kNotesAt = kSlots * kSlotBytes;
  static constexpr int kBarriersAt = kNotesAt + kSlots * kNoteBytes;
  static constexpr int kSharedMemory = 1024 + kBarriersAt + 16 * kSlots;  // 1024: alignment

  static_assert(kSlots >= kKeySlots + 2, "two blocks are in use at a time");
  static_assert(kSharedMemory <= kSharedMemoryLimit, "shared memory");
  static_assert(kQueries % 64 == 0, "a warpgroup's keys lie in one slot");
  static_assert(kConsumers == 2 || kConsumers == 3, "registers");
};

template <class Config>
struct TotalAttentionLayout {
  std::uint32_t base;  // 1024-byte aligned, as the 128-byte swizzle asks

  ONEPASS_DEVICE explicit TotalAttentionLayout(std::uint32_t start) : base((start + 1023u) & ~1023u) {}
  ONEPASS_DEVICE std::uint32_t slot(int i) const { return base + i * Config::kSlotBytes; }
  ONEPASS_DEVICE std::uint32_t notes(int i) const { return base + Config::kNotesAt + i * Config::kNoteBytes; }
  ONEPASS_DEVICE std::uint32_t full(int i) const { return base + Config::kBarriersAt + 8 * i; }
  ONEPASS_DEVICE std::uint32_t empty(int i) const { return full(Config::kSlots + i); }

  // One thread, before the block's first __syncthreads.
  ONEPASS_DEVICE void init_barriers() const {
    for (int i = 0; i < Config::kSlots; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), 4 * Config::kConsumers);  // every consumer warp
    }
    barrier_init_fence();
  }
};

}  // namespace onepass::cuda::hopper
