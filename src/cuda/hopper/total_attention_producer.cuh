// cuda/hopper/total_attention_producer.cuh: the warp that draws tiles of keys and keeps the ring of their keys and
// blocks of queries full through TMA. Beside each block of queries it leaves their negated LSEs.
#pragma once

#include "cuda/common/grid_order.cuh"
#include "cuda/hopper/key_tiles.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/total_attention_config.cuh"
#include "cuda/hopper/total_attention_plan.h"

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
        tiles_(problem, problem.num_heads, plan.order) {}

  ONEPASS_DEVICE void run() {
    wait_for_previous_grid();
    for (;;) {
      const KeyTile tile = tiles_.next();
      hand_over(tile);
      if (!tile.valid()) return;
      float lse[kLses];
      load_lse(tile, tile.first_block, lse);
      for (int block = tile.first_block; block < tile.first_block + tile.blocks; ++block) {
        load_queries(tile, block, lse);
        load_lse(tile, block + 1, lse);  // on its way while the next slot is waited for
      }
    }
  }

 private:
  static constexpr int kLses = Config::kQueries / 32;  // of a lane

  ONEPASS_DEVICE static int lane() { return threadIdx.x % 32; }

  ONEPASS_DEVICE void hand_over(const KeyTile& tile) {
    const int slot = keys_.slot;
    barrier_wait(shared_.keys_empty(slot), keys_.phase ^ 1);
    keys_.advance();
    if (lane() != 0) return;
    store_key_tile(shared_.tile(slot), tile);
    if (!tile.valid()) {
      barrier_arrive(shared_.keys_full(slot));
      return;
    }
    barrier_expect(shared_.keys_full(slot), Config::kKeyBytes);
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      tma_load(shared_.keys(slot) + slab * Config::kKeySlabBytes, k_map_, shared_.keys_full(slot), slab * kSlabColumns,
               tile.key_start + tile.key, tile.head / group_size_, batch_index(tile));
    }
  }

  ONEPASS_DEVICE void load_queries(const KeyTile& tile, int block, const float (&lse)[kLses]) {
    const int slot = queries_.slot;
    barrier_wait(shared_.queries_empty(slot), queries_.phase ^ 1);
    queries_.advance();
    if (lane() == 0) {
      for (int slab = 0; slab < Config::kSlabs; ++slab) {
        tma_load(shared_.queries(slot) + slab * Config::kQuerySlabBytes, q_map_, shared_.queries_full(slot),
                 slab * kSlabColumns, tile.query_start + block * Config::kQueries, tile.head, batch_index(tile));
      }
    }
    store_lse(slot, lse);
    __syncwarp();  // only then is the slot complete
    if (lane() == 0) barrier_expect(shared_.queries_full(slot), Config::kQueryBytes);
  }

  ONEPASS_DEVICE int batch_index(const KeyTile& tile) const { return problem_.ragged() ? 0 : tile.batch; }

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
  Ring<Config::kKeySlots> keys_;
  Ring<Config::kQuerySlots> queries_;
};

}  // namespace onepass::cuda::hopper
