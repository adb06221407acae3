// cuda/hopper/config.cuh: tile sizes of the forward kernels and what follows from them.
//
// One CTA an SM: a producer warpgroup and kConsumers consumer warpgroups of 64 query rows each. K and V blocks of kKeys
// keys travel in one ring in the order K₀ K₁ V₀ K₂ V₁ …. The tables and their measurements: docs/hopper-forward.md.
#pragma once

#include <cstdint>

namespace onepass::cuda::hopper {

inline constexpr int kSharedMemoryLimit = 232448;  // bytes that one block may use on sm_90
inline constexpr int kSlabColumns = 64;            // 16-bit columns of one 128-byte swizzled row

// What becomes of q·k: the plain kernel's softmax_scale·q·k, softcap, ALiBi, bias and dropout besides, or two pairs of
// queries and keys of which the distance chooses.
enum class Scores { kPlain, kTerms, kPiecewise };

template <class T, int kHeadDim_, int kConsumers_, int kKeys_, Scores kScores>
struct ForwardConfig {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;      // both head dims, zero-filled up to it
  static constexpr int kConsumers = kConsumers_;  // consumer warpgroups
  static constexpr int kKeys = kKeys_;            // keys of a block
  static constexpr bool kTerms = kScores == Scores::kTerms;
  static constexpr bool kPiecewise = kScores == Scores::kPiecewise;
  static constexpr int kPairs = kPiecewise ? 2 : 1;

  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;

  static constexpr int kSlabs = (kHeadDim + kSlabColumns - 1) / kSlabColumns;
  static constexpr int kQueryBytes = kRows * kSlabs * 128;
  static constexpr int kBlockBytes = kKeys * kSlabs * 128;
  // A tile has one slot of queries, of piecewise attention one for each pair.
  static constexpr int kQuerySlots = kPiecewise ? 3 : kHeadDim <= 128 ? 2 : 1;
  static constexpr int kTileSlots = kPiecewise ? 2 : kQuerySlots;
  static constexpr int kFittingSlots = (kSharedMemoryLimit - 2048 - kQuerySlots * kQueryBytes) / kBlockBytes;
  static constexpr int kBlockSlots = kFittingSlots < 6 ? kFittingSlots / 2 * 2 : 6;

  // Layout: query slots, block slots, then tiles (and the next one) and barriers.
  static constexpr int kBlocksAt = kQuerySlots * kQueryBytes;
  static constexpr int kTilesAt = kBlocksAt + kBlockSlots * kBlockBytes;
  static constexpr int kTileBytes = 64 + 32 * kConsumers;  // the tile, then two words of each consumer warp
  static constexpr int kBarriersAt = kTilesAt + (kTileSlots + 1) * kTileBytes;
  static constexpr int kSharedMemory = 1024 + kBarriersAt + 16 * (kQuerySlots + kTileSlots + kBlockSlots + 1);

  static_assert(kBlockSlots >= 4, "K and V need two blocks each");
  static_assert(kSharedMemory <= kSharedMemoryLimit, "shared memory");
  static_assert(kHeadDim % 16 == 0 && kKeys % 16 == 0, "wgmma's k is 16");
  static_assert(kConsumers == 2 || kConsumers == 3, "register split");
  // Accumulators of S and O and the packed P must fit beside about 40 registers of everything else.
  static_assert(kKeys / 2 + kHeadDim / 2 + kKeys / 4 + 24 <= kConsumerRegisters, "registers");
};

}  // namespace onepass::cuda::hopper
