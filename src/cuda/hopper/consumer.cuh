// cuda/hopper/consumer.cuh: one consumer warpgroup: 64 query rows of every tile, S and O in registers.
//
// Per block j (from the last visible one down), with P of block j + 1 in registers:
//   issue S = Q·Kⱼᵀ, issue O += P·Vⱼ₊₁, wait for S, take its maxima, wait for O,
//   then exponentials, the rescaling of O and the packing of P in one run of instructions, so that the two latter hide
//   between the exponentials, which cost 8 cycles a warp each.
#pragma once

#include "cuda/common/score.cuh"
#include "cuda/hopper/mask.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/plan.h"
#include "cuda/hopper/softmax.cuh"
#include "cuda/hopper/tile.cuh"

namespace onepass::cuda::hopper {

template <class Config>
class Consumer {
 public:
  using Element = typename Config::Element;
  static constexpr int kKeys = Config::kKeys;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kHalfKeys = Config::kHalfKeys;

  ONEPASS_DEVICE Consumer(const Problem& problem, const Plan& plan, const CUtensorMap* out_map,
                          const SharedLayout<Config>& shared, int warpgroup)
      : problem_(problem),
        plan_(plan),
        out_map_(out_map),
        shared_(shared),
        warpgroup_(warpgroup),
        unit_(Config::kTerms ? kLog2e : problem.softmax_scale * kLog2e) {}

  ONEPASS_DEVICE void run() {
    for (;;) {
      barrier_wait(shared_.query_full(queries_.slot), queries_.phase);
      const Tile tile = this->tile();
      if (!tile.valid()) break;
      attend(tile);
      store_out();
      queries_.advance();
    }
    if (leader()) store_wait_all();
  }

 private:
  // Lies in shared memory beside Q until the slot is released; registers are too scarce to keep it.
  ONEPASS_DEVICE Tile tile() const { return load_tile(shared_.tile(queries_.slot)); }

  // ---- the tile's loop over blocks --------------------------------------------------------------------------------
  ONEPASS_DEVICE void attend(const Tile& tile) {
    state_ = {{kLowestScore<Config::kTerms>, kLowestScore<Config::kTerms>}, {0.0f, 0.0f}};
    const int row = tile.row + 64 * warpgroup_;
    if (tile.blocks == 0 || row >= tile.seqlen_q) {  // nothing to see, or nobody to see it
      for (int i = 0; i < 2 * tile.blocks; ++i) release_block(take_block());
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o_[i] = 0.0f;
      release_previous_query();
      return;
    }
    clean_begin_ = visible_begin(problem_, tile, row + 16 * warp() + 15);
    clean_end_ = visible_end(problem_, tile, row + 16 * warp());
    scrub_ = tile.scrub;
    first_ = tile.first_block;
    // On the causal diagonal and in tails a warpgroup often sees nothing of the tile's last block, or its first half.
    int last = first_ + tile.blocks - 1;
    const int end = visible_end(problem_, tile, row + 63);
    const bool skip = tile.blocks > 1 && end <= last * kKeys;
    if (skip) {
      release_block(take_block());
      --last;
    }
    if (kHalfKeys < kKeys && end <= last * kKeys + kHalfKeys) {
      first_blocks<kHalfKeys>(last, skip);
    } else {
      first_blocks<kKeys>(last, skip);
    }
    for (int block = last - 2; block >= first_; --block) step<kKeys, false>(block);
    if (last > first_) last_values<kKeys, false>();
  }

  // skipped: the values of block last + 1 are still to come.
  template <int kWidth>
  ONEPASS_DEVICE void first_blocks(int last, bool skipped) {
    const int keys = take_block();
    issue_scores<Config, kWidth>(s_, query(), shared_.block(keys));
    release_previous_query();
    wgmma_wait<0>(s_);
    release_block(keys);
    if (skipped) release_block(take_block());
    float alpha[2];
    begin_softmax<kWidth>(last, alpha);
    finish_softmax<kWidth, false>(last, alpha);
    if (last == first_) {
      last_values<kWidth, true>();
    } else {
      step<kWidth, true>(last - 1);
    }
  }

  // Scores of `block` while P of the block after it, kWidth keys wide, is multiplied with its values.
  template <int kWidth, bool kFresh>
  ONEPASS_DEVICE void step(int block) {
    scrub_values(block + 1, blocks_.next());
    const int keys = take_block();
    issue_scores<Config, kKeys>(s_, query(), shared_.block(keys));
    const int values = take_block();
    issue_values<Config, kWidth, kFresh>(o_, p_, shared_.block(values));
    wgmma_wait<1>(s_);
    release_block(keys);
    float alpha[2];
    begin_softmax<kKeys>(block, alpha);
    // Never fires, but it makes the maxima precede the wait; otherwise ptxas hoists the wait above them.
    if (alpha[0] + alpha[1] < 0.0f) barrier_arrive(shared_.block_empty(0));
    wgmma_wait<0>(o_);
    release_block(values);
    finish_softmax<kKeys, true>(block, alpha);
  }

  template <int kWidth, bool kFresh>
  ONEPASS_DEVICE void last_values() {
    scrub_values(first_, blocks_);
    const int values = take_block();
    issue_values<Config, kWidth, kFresh>(o_, p_, shared_.block(values));
    wgmma_wait<0>(o_);
    release_block(values);
  }

  // ---- softmax ------------------------------------------------------------------------------------------------------
  template <int kWidth>
  ONEPASS_DEVICE void begin_softmax(int block, float (&alpha)[2]) {
    const int start = block * kKeys;
    if constexpr (Config::kTerms) add_terms<kWidth>(start);
    if (start < clean_begin_ || start + kWidth > clean_end_) {
      const Tile tile = this->tile();
      mask_block<kWidth>(s_, problem_, tile, lane_row(tile.row), start);
    }
    update_max<kWidth>(s_, state_, alpha, unit_);
  }

  // Weights of S into P; with kRescale, O is brought to the new maxima.
  template <int kWidth, bool kRescale>
  ONEPASS_DEVICE void finish_softmax(int block, const float (&alpha)[2]) {
    float sum[2] = {0.0f, 0.0f};
    if constexpr (Config::kTerms) {
      exponentiate_guarded<kWidth>(s_, state_.max, sum, unit_);
      if (problem_.dropout_p > 0.0) drop<kWidth>(block * kKeys);
    } else {
      const float shift[2] = {state_.max[0] * unit_, state_.max[1] * unit_};
      constexpr int kTiles = kWidth / 8, kEarly = kRescale ? kTiles * Config::kEarlyEighths / 8 : kTiles;
      exponentiate<0, kEarly>(s_, shift, sum, unit_);
      if constexpr (kEarly < kTiles) {
        const float late[2] = {wait_for(o_[0], shift[0], plan_.zero), wait_for(o_[2], shift[1], plan_.zero)};
        exponentiate<kEarly, kTiles>(s_, late, sum, unit_);
      }
    }
    if constexpr (kRescale) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o_[i] *= alpha[i % 4 / 2];
    }
#pragma unroll
    for (int i = 0; i < kWidth / 4; ++i) p_[i] = pack<Element>(s_[2 * i], s_[2 * i + 1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) state_.sum[r] = fmaf(state_.sum[r], alpha[r], sum[r]);
  }

  // ---- extra score terms --------------------------------------------------------------------------------------------
  ONEPASS_DEVICE QueryRows element_at(const Tile& tile, int start) const {
    return {lane_row(tile.row), start + lane() % 4 * 2};
  }

  template <int kWidth>
  ONEPASS_DEVICE void add_terms(int start) {
    using Fragment = float[1][kWidth / 8][4];
    const Tile tile = this->tile();
    DeviceSequence sequence{};
    sequence.seqlen_q = tile.seqlen_q;
    sequence.seqlen_k = tile.key_end;
    sequence.diagonal = tile.diagonal;
    apply_terms<false>(reinterpret_cast<Fragment&>(s_), score_terms(problem_, tile.batch, tile.head),
                       element_at(tile, start), sequence);
  }

  template <int kWidth>
  ONEPASS_DEVICE void drop(int start) {
    const Tile tile = this->tile();
    for_each_dropout<1, kWidth / 8>(dropout_rule(problem_, tile.batch, tile.head), element_at(tile, start),
                                    [this](int, int c, int e, bool survives) {
                                      if (!survives) s_[4 * c + e] = 0.0f;
                                    });
  }

  // ---- slots --------------------------------------------------------------------------------------------------------
  ONEPASS_DEVICE static int warp() { return threadIdx.x % 128 / 32; }
  ONEPASS_DEVICE static int lane() { return threadIdx.x % 32; }
  // The first of the lane's two rows within the sequence.
  ONEPASS_DEVICE int lane_row(int tile_row) const { return tile_row + 64 * warpgroup_ + 16 * warp() + lane() / 4; }
  ONEPASS_DEVICE static bool leader() { return threadIdx.x % 128 == 0; }
  ONEPASS_DEVICE void sync_warpgroup() const { named_barrier_sync(1 + warpgroup_, 128); }

  ONEPASS_DEVICE std::uint32_t query() const { return shared_.query(queries_.slot) + warpgroup_ * (64 * 128); }

  // Waits for the ring's next block and returns its slot.
  ONEPASS_DEVICE int take_block() {
    const int slot = blocks_.slot;
    barrier_wait(shared_.block_full(slot), blocks_.phase);
    blocks_.advance();
    return slot;
  }
  ONEPASS_DEVICE void release_block(int slot) const {
    if (lane() == 0) barrier_arrive(shared_.block_empty(slot));
  }

  // Rows of V beyond the visible keys may hold anything, NaN too, and 0·NaN is NaN: they are cleared before use. Where
  // they lie outside the tensor TMA has written zeros already.
  ONEPASS_DEVICE void scrub_values(int block, Ring<Config::kBlockSlots> position) const {
    if (!scrub_) return;
    const Tile tile = this->tile();
    const int start = block * kKeys;
    if (start >= tile.key_begin && start + kKeys <= tile.key_end) return;
    barrier_wait(shared_.block_full(position.slot), position.phase);
    const std::uint32_t values = shared_.block(position.slot);
    for (int i = threadIdx.x % 128; i < Config::kSlabs * kKeys * 8; i += 128) {
      const int key = start + i / 8 % kKeys;
      if (key < tile.key_begin || key >= tile.key_end) store_shared(values + 16 * i, {0, 0, 0, 0});
    }
    async_proxy_fence();
    sync_warpgroup();
  }

  // ---- epilogue -----------------------------------------------------------------------------------------------------
  // O leaves through the tile's own Q slot, which the producer gets back once the store has read it. With two slots
  // that wait is put off until the next tile's first product is under way.
  ONEPASS_DEVICE void release_previous_query() {
    if constexpr (Config::kQuerySlots > 1) {
      if (pending_query_ >= 0 && leader()) {
        store_wait_read();
        barrier_arrive(shared_.query_empty(pending_query_));
      }
      pending_query_ = -1;
    }
  }

  ONEPASS_DEVICE void store_out() {
    const Tile tile = this->tile();
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) scale[r] = finish_row(tile, r, lane_row(tile.row) + 8 * r);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o_[i] *= scale[i % 4 / 2];

    sync_warpgroup();  // every warp has read its part of Q
    if (plan_.splits > 1) {
      store_partial(tile);
    } else if (plan_.tma_store && (!problem_.ragged() || tile.row + 64 * (warpgroup_ + 1) <= tile.seqlen_q)) {
      store_by_tma(tile);
    } else {
      store_directly(tile);
    }
    if constexpr (Config::kQuerySlots > 1) {
      pending_query_ = queries_.slot;
    } else if (leader()) {
      store_wait_read();
      barrier_arrive(shared_.query_empty(queries_.slot));
    }
    __syncwarp();
  }

  // Completes the row's sum, writes its LSE and returns the factor that turns O into the output.
  ONEPASS_DEVICE float finish_row(const Tile& tile, int r, int row) {
    float sum = quad_sum(state_.sum[r]), top = state_.max[r], rescale = 1.0f;
    const bool empty = sum == 0.0f;  // a row without a visible key stays so, whatever its sink
    if (problem_.sinks != nullptr && !empty && plan_.splits == 1) {
      const float sink = load_as_float(problem_.sinks, problem_.sinks_dtype, tile.head) *
                         (Config::kTerms ? 1.0f : 1.0f / problem_.softmax_scale);
      const float with_sink = fmaxf(top, sink);
      rescale = exp2_approx((top - with_sink) * unit_);
      sum = fmaf(sum, rescale, exp2_approx((sink - with_sink) * unit_));
      top = with_sink;
    }
    const float lse = empty ? -kInfinity : fmaf(top, unit_ * kLn2, log2_approx(sum) * kLn2);
    if (lane() % 4 == 0 && row < tile.seqlen_q) {
      if (plan_.splits > 1) {
        plan_.partial_lse[partial_row(tile, row)] = lse;
      } else if (problem_.lse) {
        problem_.lse.template at<float>(batch_index(tile), tile.head, tile.query_start + row) = lse;
      }
    }
    if (empty) return 0.0f;
    if constexpr (Config::kTerms) {
      if (problem_.dropout_p > 0.0) rescale *= static_cast<float>(1.0 / (1.0 - problem_.dropout_p));
    }
    return rescale / sum;
  }

  // Ragged tensors have no batch dimension: their tokens count from the total.
  ONEPASS_DEVICE int batch_index(const Tile& tile) const { return problem_.ragged() ? 0 : tile.batch; }

  ONEPASS_DEVICE std::int64_t partial_row(const Tile& tile, int row) const {
    const std::int64_t tokens = problem_.ragged() ? problem_.total_q : problem_.seqlen_q;
    const std::int64_t batches = problem_.ragged() ? 1 : problem_.batch;
    return ((tile.split * batches + batch_index(tile)) * problem_.num_heads + tile.head) * tokens + tile.query_start +
           row;
  }

  ONEPASS_DEVICE void store_partial(const Tile& tile) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane_row(tile.row) + 8 * r;
      if (row >= tile.seqlen_q) continue;
      float* const to = plan_.partial_out + partial_row(tile, row) * problem_.head_dim_v;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const int column = 8 * j + lane() % 4 * 2;
        if (column < problem_.head_dim_v) {
          *reinterpret_cast<float2*>(to + column) = make_float2(o_[4 * j + 2 * r], o_[4 * j + 2 * r + 1]);
        }
      }
    }
  }

  ONEPASS_DEVICE void store_directly(const Tile& tile) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane_row(tile.row) + 8 * r;
      if (row >= tile.seqlen_q) continue;
      Element* const to = problem_.out.template row<Element>(batch_index(tile), tile.head, tile.query_start + row);
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const int column = 8 * j + lane() % 4 * 2;
        if (column < problem_.head_dim_v) {
          *reinterpret_cast<std::uint32_t*>(to + column) = pack<Element>(o_[4 * j + 2 * r], o_[4 * j + 2 * r + 1]);
        }
      }
    }
  }

  ONEPASS_DEVICE void store_by_tma(const Tile& tile) {
    const int staged_row = 16 * warp() + lane() % 16;
    const std::uint32_t base = query() + staged_row * 128;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {  // 16 columns: two 16-byte chunks of a swizzled row
      const float* const o = o_ + 8 * i;
      const int chunk = (i % 4 * 2 + lane() / 16) ^ (staged_row % 8);
      store_matrices(base + i / 4 * (Config::kRows * 128) + chunk * 16, pack<Element>(o[0], o[1]),
                     pack<Element>(o[2], o[3]), pack<Element>(o[4], o[5]), pack<Element>(o[6], o[7]));
    }
    async_proxy_fence();
    sync_warpgroup();
    if (leader()) {
      for (int slab = 0; slab * kSlabColumns < problem_.head_dim_v; ++slab) {
        tma_store(query() + slab * (Config::kRows * 128), out_map_, slab * kSlabColumns,
                  tile.query_start + tile.row + 64 * warpgroup_, tile.head, batch_index(tile));
      }
      store_commit();
    }
  }

  const Problem& problem_;
  const Plan& plan_;
  const CUtensorMap* out_map_;
  const SharedLayout<Config> shared_;
  const int warpgroup_;
  const float unit_;  // score → exponent of 2

  Ring<Config::kQuerySlots> queries_;
  Ring<Config::kBlockSlots> blocks_;
  int pending_query_ = -1;
  int first_;                    // the tile's first block
  int clean_begin_, clean_end_;  // keys that all rows of the warp see
  int scrub_;
  RowState state_;
  float s_[kKeys / 2];
  float o_[kHeadDim / 2];
  std::uint32_t p_[kKeys / 4];
};

}  // namespace onepass::cuda::hopper
