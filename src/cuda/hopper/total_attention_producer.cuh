// cuda/hopper/total_attention_producer.cuh: the warp that draws tiles of keys and keeps the ring of their keys and
// blocks of queries full through TMA. Beside each block of queries it leaves their negated LSEs.
#pragma once

#include "cuda/hopper/key_tiles.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/total_attention_config.cuh"

namespace onepass::cuda::hopper {

// Beyond this |lse|, in base 2, its rounding as part of an exponent in base 2 would be felt (2^−12): there, and with
// extra terms, the difference with the logit is formed in natural units, where it is exactly 0 for a dominating key.
inline constexpr float kBinaryLimit = 4096.0f;

// Where the LSE of query c of a block lies in its notes: a lane's columns of two accumulator tiles are 16 bytes.
ONEPASS_DEVICE int lse_place(int c) { return c / 16 * 16 + c % 8 / 2 * 4 + c / 8 % 2 * 2 + c % 2; }

template <class Config>
class TotalAttentionProducer {
 public:
  ONEPASS_DEVICE TotalAttentionProducer(const Problem& problem, const TotalAttentionPlan& plan,
                                        const CUtensorMap* q_map, const CUtensorMap* k_map,
                                        const TotalAttentionLayout<Config>& shared)
      : problem_(problem),
        group_size_(static_cast<int>(problem.group_size())),
        q_map_(q_map),
        k_map_(k_map),
        shared_(shared),
        tiles_(problem, plan) {}

  ONEPASS_DEVICE void run() {
    for (;;) {
      const KeyTile tile = tiles_.next();
      hand_over(tile);
      if (!tile.valid()) return;
      float lse[kLses];
      load_lse(tile, tile.first_block, lse);
      for (int block = tile.first_block; block < tile.first_block + tile.blocks; ++block) {
        const int slot = claim();
        if (lane() == 0) load_rows(slot, q_map_, tile.query_start + block * Config::kQueries, tile.head, tile.batch);
        store_lse(slot, lse);
        publish(slot);
        load_lse(tile, block + 1, lse);  // on its way while the next slot is waited for
      }
    }
  }

 private:
  static constexpr int kLses = Config::kQueries / 32;  // of a lane

  ONEPASS_DEVICE static int lane() { return threadIdx.x % 32; }

  ONEPASS_DEVICE int claim() {
    const int slot = ring_.slot;
    barrier_wait(shared_.empty(slot), ring_.phase ^ 1);
    ring_.advance();
    return slot;
  }

  // Once the whole warp has written its notes.
  ONEPASS_DEVICE void publish(int slot) const {
    __syncwarp();
    if (lane() == 0) barrier_expect(shared_.full(slot), Config::kSlotBytes);
  }

  ONEPASS_DEVICE void load_rows(int slot, const CUtensorMap* map, int token, int head, int batch) const {
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      tma_load(shared_.slot(slot) + slab * Config::kSlabBytes, map, shared_.full(slot), slab * kSlabColumns, token,
               head, problem_.ragged() ? 0 : batch);
    }
  }

  ONEPASS_DEVICE void hand_over(const KeyTile& tile) {
    for (int i = 0; i < Config::kKeySlots; ++i) {
      const int slot = claim();
      if (lane() == 0) {
        if (i == 0) store_key_tile(shared_.notes(slot), tile);
        if (!tile.valid()) {
          barrier_arrive(shared_.full(slot));
        } else {
          load_rows(slot, k_map_, tile.key_start + tile.key + i * Config::kQueries, tile.head / group_size_,
                    tile.batch);
        }
      }
      if (!tile.valid()) return;
      publish(slot);
    }
  }

  ONEPASS_DEVICE void load_lse(const KeyTile& tile, int block, float (&lse)[kLses]) const {
    const float* const rows = &problem_.lse.at<float>(tile.batch, tile.head, tile.query_start);
#pragma unroll
    for (int i = 0; i < kLses; ++i) {
      const std::int64_t query = block * Config::kQueries + 32 * i + lane();
      lse[i] = query < tile.seqlen_q ? rows[query * problem_.lse.token_stride] : kInfinity;
    }
  }

  // An empty row (−∞) weighs nothing, like one beyond the sequence.
  ONEPASS_DEVICE void store_lse(int slot, const float (&lse)[kLses]) const {
    bool natural = Config::kTerms;
#pragma unroll
    for (int i = 0; i < kLses; ++i) {
      natural |= fabsf(lse[i] * kLog2e) >= kBinaryLimit && fabsf(lse[i]) < kInfinity;
    }
    natural = __any_sync(~0u, natural);
#pragma unroll
    for (int i = 0; i < kLses; ++i) {
      const float value = fabsf(lse[i]) == kInfinity ? kInfinity : natural ? lse[i] : lse[i] * kLog2e;
      store_shared(shared_.notes(slot) + 4 * lse_place(32 * i + lane()), __float_as_int(-value));
    }
    if (lane() == 0) store_shared(shared_.notes(slot) + 4 * Config::kQueries, static_cast<int>(natural));
  }

  const Problem& problem_;
  const int group_size_;
  const CUtensorMap* const q_map_;
  const CUtensorMap* const k_map_;
  const TotalAttentionLayout<Config> shared_;
  KeyTileStream<Config> tiles_;
  Ring<Config::kSlots> ring_;
};

}  // namespace onepass::cuda::hopper
