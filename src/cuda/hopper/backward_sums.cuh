// cuda/hopper/backward_sums.cuh: the warpgroup that computes dQ = dS·K of every block of queries and the tile's keys,
// and adds it to the sums in global memory.
#pragma once

#include "cuda/hopper/backward_producer.cuh"
#include "cuda/hopper/tile.cuh"
#include "cuda/hopper/warpgroup.cuh"

namespace onepass::cuda::hopper {

template <class Config>
class QuerySums {
 public:
  ONEPASS_DEVICE QuerySums(int group_size, const BackwardLayout<Config>& shared)
      : group_size_(group_size), shared_(shared) {}

  ONEPASS_DEVICE void run() {
    for (;;) {
      const int slot = tiles_.slot;
      barrier_wait(shared_.tile_full(slot), tiles_.phase);
      const int blocks = load_key_tile(shared_.tile(slot)).blocks;
      if (blocks < 0) break;
      __syncwarp();
      release(shared_.tile_empty(slot));
#pragma unroll 1
      for (int left = blocks * group_size_; left > 0; --left, ++count_) add_block();
      release(shared_.keys_empty());
      tiles_.advance();
    }
    if (Warpgroup::lane() == 0) store_wait_all();
  }

 private:
  using Product = float[kSlabColumns / 2];

  ONEPASS_DEVICE static void release(std::uint32_t empty) {
    if (Warpgroup::lane() == 0) barrier_arrive(empty);
  }

  ONEPASS_DEVICE void add_block() const {
    const int parity = count_ % 2;
    barrier_wait(shared_.scores_full(parity), count_ / 2 % 2);
    const int2 words = load_shared<int2>(shared_.sum_note(parity));
    const std::uint64_t sums =
        static_cast<std::uint64_t>(static_cast<std::uint32_t>(words.y)) << 32 | static_cast<std::uint32_t>(words.x);
#pragma unroll
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      Product dq;
      multiply(dq, shared_.scores(parity), slab);
      if (slab + 1 == Config::kSlabs) release(shared_.scores_empty(parity));
      add(dq, reinterpret_cast<float*>(sums), slab);
    }
  }

  ONEPASS_DEVICE void multiply(Product& dq, std::uint32_t scores, int slab) const {
    const std::uint64_t a = matrix_descriptor(first_lane(scores), 0);
    const std::uint64_t b = matrix_descriptor(first_lane(shared_.keys() + slab * Config::kKeySlabBytes), 0);
    pin(dq);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Config::kKeys / 16; ++i) {
      constexpr int kStep = 16 * 128 / 16;
      Wgmma<typename Config::Element, kSlabColumns>::ss_columns(dq, a + i * kStep, b + i * kStep, i != 0);
    }
    wgmma_commit();
    wgmma_wait<0>(dq);
  }

  // The warp's fragments of 16 rows × 8 columns lie one after the other in the sums, as its lanes hold them.
  ONEPASS_DEVICE void add(const Product& dq, float* sums, int slab) const {
    const int warp = Warpgroup::warp(), lane = Warpgroup::lane();
    const std::uint32_t staging = shared_.sums(slab, warp);
    if (lane == 0) store_wait_read<Config::kSlabs - 1>();
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kSlabColumns / 8; ++c) {
      store_shared(staging + 512 * c + 16 * lane, int4{__float_as_int(dq[4 * c]), __float_as_int(dq[4 * c + 1]),
                                                       __float_as_int(dq[4 * c + 2]), __float_as_int(dq[4 * c + 3])});
    }
    async_proxy_fence();
    __syncwarp();
    if (lane == 0) {
      bulk_add(sums + (4 * slab + warp) * (Config::kSumBytes / 4), staging, Config::kSumBytes);
      store_commit();
    }
  }

  const int group_size_;
  const BackwardLayout<Config> shared_;
  Ring<Config::kTileSlots> tiles_;
  int count_ = 0;  // of blocks before the one in hand
};

}  // namespace onepass::cuda::hopper
