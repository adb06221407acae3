// cuda/hopper/total_attention.cuh: total[key] = Σ_query 2^(logit − lse), keys stationary: a consumer warpgroup keeps 64
// keys as the A operand of Sᵀ = K·Qᵀ, its lanes the sums of their two keys; queries stream past.
#pragma once

#include "cuda/common/score.cuh"
#include "cuda/hopper/softmax.cuh"
#include "cuda/hopper/tile.cuh"
#include "cuda/hopper/total_attention_producer.cuh"
#include "cuda/hopper/warpgroup.cuh"

namespace onepass::cuda::hopper {

template <class Config>
class KeySums {
 public:
  using Element = typename Config::Element;
  static constexpr int kQueries = Config::kQueries;
  using Scores = float[kQueries / 2];

  ONEPASS_DEVICE KeySums(const Problem& problem, const TotalAttentionPlan& plan,
                         const TotalAttentionLayout<Config>& shared, int warpgroup)
      : problem_(problem), plan_(plan), shared_(shared), warpgroup_{warpgroup} {}

  ONEPASS_DEVICE void run() {
    for (;;) {
      barrier_wait(shared_.keys_full(tiles_.slot), tiles_.phase);
      tile_ = load_key_tile(shared_.tile(tiles_.slot));
      if (!tile_.valid()) return;
      if constexpr (Config::kKeysInRegisters) {
        load_keys();
        release(shared_.keys_empty(tiles_.slot));
      }
      sum_[0] = sum_[1] = 0.0f;
      sum_queries();
      if constexpr (!Config::kKeysInRegisters) release(shared_.keys_empty(tiles_.slot));
      tiles_.advance();
      store_sums();
    }
  }

 private:
  // ---- slots --------------------------------------------------------------------------------------------------------
  // Waits for the next block of queries and returns its slot.
  ONEPASS_DEVICE int take() {
    const int slot = queries_.slot;
    barrier_wait(shared_.queries_full(slot), queries_.phase);
    queries_.advance();
    return slot;
  }
  ONEPASS_DEVICE void release(std::uint32_t empty) const {
    __syncwarp();
    if (Warpgroup::lane() == 0) barrier_arrive(empty);
  }
  ONEPASS_DEVICE void release_queries(int slot) const { release(shared_.queries_empty(slot)); }
  ONEPASS_DEVICE void skip(int blocks) {
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) release_queries(take());
  }

  // ---- keys ---------------------------------------------------------------------------------------------------------
  ONEPASS_DEVICE int first_key() const { return warpgroup_.row(tile_.key); }
  ONEPASS_DEVICE int lane_key() const { return warpgroup_.lane_row(tile_.key); }  // and 8 further

  // The warpgroup's 64 keys as A operands: for each step of the product a 16×16 matrix in the layout of ldmatrix.
  ONEPASS_DEVICE void load_keys() {
    const int row = warpgroup_.warp_row(0) + Warpgroup::lane() % 16;
    const std::uint32_t address = shared_.keys(tiles_.slot) + row * 128;
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 16; ++i) {
      const int chunk = (i % 4 * 2 + Warpgroup::lane() / 16) ^ row % 8;  // of 16 bytes, swizzled
      load_matrices(keys_[i], address + i / 4 * Config::kKeySlabBytes + 16 * chunk);
    }
  }

  // ---- the loop over blocks of queries ------------------------------------------------------------------------------
  ONEPASS_DEVICE void sum_queries() {
    const TileQueries queries = tile_queries(problem_, tile_.sequence(), first_key(), first_key() + 64);
    clean_ = queries.all;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = lane_key() + 8 * r;
      const bool live = key >= tile_.key_begin && key < tile_.key_end;
      seeing_[r] = live ? seeing_queries(problem_, tile_.sequence(), key) : Range{0, 0};
    }
    const int end = tile_.first_block + tile_.blocks;
    const bool any = queries.any.begin < queries.any.end;
    const int own_begin = any ? queries.any.begin / kQueries : end;
    const int own_end = any ? (queries.any.end + kQueries - 1) / kQueries : end;
    skip(own_begin - tile_.first_block);
    for (int block = own_begin; block < own_end; ++block) {
      const std::uint32_t notes = shared_.notes(queries_.slot);
      const Operands operands = this->operands(queries_.slot);
      const int slot = take();
      const bool natural = load_shared<int>(notes + 4 * kQueries) != 0;
      Scores s;
      multiply(s, operands);
      add_weights(s, notes, block * kQueries, natural);
      release_queries(slot);
    }
    skip(end - own_end);
  }

  // Matrix descriptors of a slot's queries and of the keys.
  struct Operands {
    std::uint64_t queries, keys;
  };
  ONEPASS_DEVICE Operands operands(int slot) const {
    return {matrix_descriptor(first_lane(shared_.queries(slot)), 0),
            matrix_descriptor(first_lane(shared_.keys(tiles_.slot) + warpgroup_.index * (64 * 128)), 0)};
  }

  // Sᵀ = K·Qᵀ. The other warpgroups' exponentials hide it.
  ONEPASS_DEVICE void multiply(Scores& s, const Operands& operands) const {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Config::kHeadDim / 16; ++i) {
      const int slab = i / 4, step = i % 4 * 2;  // in units of 16 bytes
      const std::uint64_t b = operands.queries + slab * (Config::kQuerySlabBytes / 16) + step;
      if constexpr (Config::kKeysInRegisters) {
        Wgmma<Element, kQueries>::rs_rows(s, keys_[i], b, i != 0);
      } else {
        Wgmma<Element, kQueries>::ss(s, operands.keys + slab * (Config::kKeySlabBytes / 16) + step, b, i != 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>(s);
  }

  // ---- weights ------------------------------------------------------------------------------------------------------
  ONEPASS_DEVICE void add_weights(Scores& s, std::uint32_t notes, int start, bool natural) {
    if constexpr (Config::kTerms) add_terms(s, start);
    float sum[2] = {0.0f, 0.0f};
    if (Config::kTerms || natural || start < clean_.begin || start + kQueries > clean_.end) {
      sum_carefully(s, notes, start, natural, sum);
    } else {
      const float unit = problem_.softmax_scale * kLog2e;
      for_each_score(s, notes, [&](int i, float score, float negated) {
        sum[i / 2 % 2] += exp2_approx(fmaf(score, unit, negated));
      });
    }
    sum_[0] += sum[0];
    sum_[1] += sum[1];
  }

  // Leaves out the pairs that the mask hides, whatever their scores and LSEs are. Product and difference are not one
  // FMA: the LSE of a row with one key is its rounded logit.
  ONEPASS_DEVICE void sum_carefully(Scores& s, std::uint32_t notes, int start, bool natural, float (&sum)[2]) const {
    const float scale = Config::kTerms ? 1.0f : problem_.softmax_scale;
    const float unit = natural ? scale : scale * kLog2e, to_binary = natural ? kLog2e : 1.0f;
    const int lane_start = start + Warpgroup::lane() % 4 * 2;
    const int begin[2] = {seeing_[0].begin - lane_start, seeing_[1].begin - lane_start};
    const int end[2] = {seeing_[0].end - lane_start, seeing_[1].end - lane_start};
    for_each_score(s, notes, [&](int i, float score, float negated) {
      const int r = i / 2 % 2, column = i / 4 * 8 + i % 2;
      const float weight = exp2_approx((__fmul_rn(score, unit) + negated) * to_binary);
      sum[r] += column >= begin[r] && column < end[r] ? weight : 0.0f;
    });
  }

  // Calls use(i, s[i], the query's negated LSE); i is a constant after unrolling.
  template <class Use>
  ONEPASS_DEVICE void for_each_score(const Scores& s, std::uint32_t notes, const Use& use) const {
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
      const int4 words = load_shared(notes + 64 * i + Warpgroup::lane() % 4 * 16);
      const float lse[4] = {__int_as_float(words.x), __int_as_float(words.y), __int_as_float(words.z),
                            __int_as_float(words.w)};
#pragma unroll
      for (int e = 0; e < 8; ++e) use(8 * i + e, s[8 * i + e], lse[e / 4 * 2 + e % 2]);
    }
  }

  // Products become logits.
  ONEPASS_DEVICE void add_terms(Scores& s, int start) const {
    using Fragment = float[1][kQueries / 8][4];
    DeviceSequence sequence = tile_.sequence();
    sequence.seqlen_k = tile_.key_end;  // no bias is read beyond
    apply_terms<false>(reinterpret_cast<Fragment&>(s), score_terms(problem_, tile_.batch, tile_.head),
                       KeyRows{start + Warpgroup::lane() % 4 * 2, lane_key()}, sequence);
  }

  ONEPASS_DEVICE void store_sums() const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(sum_[r]);
      const int key = lane_key() + 8 * r;
      if (Warpgroup::lane() % 4 != 0 || key >= tile_.seqlen_k) continue;
      float& total = problem_.total_attention.at<float>(tile_.batch, tile_.head, tile_.key_start + key);
      total = plan_.add ? total + sum : sum;
    }
  }

  const Problem& problem_;
  const TotalAttentionPlan& plan_;
  const TotalAttentionLayout<Config> shared_;
  const Warpgroup warpgroup_;
  Ring<Config::kKeySlots> tiles_;
  Ring<Config::kQuerySlots> queries_;
  KeyTile tile_;
  std::uint32_t keys_[Config::kHeadDim / 16][4];
  float sum_[2];
  Range clean_;      // queries that see all of the warpgroup's keys
  Range seeing_[2];  // queries that see the lane's keys
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    total_attention_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                           const __grid_constant__ Problem problem, const __grid_constant__ TotalAttentionPlan plan) {
  extern __shared__ std::uint8_t shared_memory[];
  const TotalAttentionLayout<Config> shared(opaque(static_cast<int>(shared_address(shared_memory))));
  if (threadIdx.x == 0) {
    shared.init_barriers();
    tma_prefetch(&q_map);
    tma_prefetch(&k_map);
  }
  __syncthreads();
  allow_next_grid();

  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    give_registers<Config::kProducerRegisters>();
    if (threadIdx.x < 32) TotalAttentionProducer<Config>(problem, plan, &q_map, &k_map, shared).run();
  } else {
    take_registers<Config::kConsumerRegisters>();
    KeySums<Config>(problem, plan, shared, warpgroup - 1).run();
  }
}

template <class Config>
TotalAttentionKernel describe_total_attention() {
  return {total_attention_kernel<Config>, Config::kKeys, Config::kQueries, Config::kThreads, Config::kSharedMemory};
}

template <int kHeadDim, int kConsumers, int kQueries, bool kKeysInRegisters, bool kTerms>
TotalAttentionPair describe_total_attention_pair() {
  return {describe_total_attention<
              TotalAttentionConfig<__half, kHeadDim, kConsumers, kQueries, kKeysInRegisters, kTerms>>(),
          describe_total_attention<
              TotalAttentionConfig<__nv_bfloat16, kHeadDim, kConsumers, kQueries, kKeysInRegisters, kTerms>>()};
}

}  // namespace onepass::cuda::hopper
