// cuda/hopper/consumer.cuh: one consumer warpgroup: 64 query rows of every tile, S and O in registers.
//
// Per block j (from the last visible one down), with P of block j + 1 in registers:
//   issue S = Q·Kⱼᵀ, issue O += P·Vⱼ₊₁, wait for S, exponentials, wait for O, pack P.
// Maxima and the rescaling of O are left out wherever the weights stay small without them (softmax.cuh): every ordinary
// instruction beside the products costs them about half a cycle.
#pragma once

#include "cuda/common/score.cuh"
#include "cuda/hopper/epilogue.cuh"
#include "cuda/hopper/mask.cuh"
#include "cuda/hopper/tile.cuh"

namespace onepass::cuda::hopper {

template <class Config>
class Consumer {
 public:
  using Element = typename Config::Element;
  static constexpr int kKeys = Config::kKeys;
  static constexpr int kHeadDim = Config::kHeadDim;
  // Weights beside an old maximum may leave float16's range long before a row's sum leaves float's. At head_dim 256
  // there are no registers for more than noticing it.
  static constexpr bool kHalf = std::is_same_v<Element, __half>;
  static constexpr bool kSettles = kHalf && kHeadDim <= 128 && !Config::kTerms;

  ONEPASS_DEVICE Consumer(const Problem& problem, const Plan& plan, const CUtensorMap& out_map,
                          const SharedLayout<Config>& shared, int warpgroup)
      : problem_(problem),
        plan_(plan),
        shared_(shared),
        warpgroup_{warpgroup},
        unit_(Config::kTerms ? kLog2e : problem.softmax_scale * kLog2e),
        epilogue_(problem, plan, out_map, warpgroup_, unit_) {}

  ONEPASS_DEVICE void run() {
    for (;;) {
      barrier_wait(shared_.query_full(queries_.slot), queries_.phase);
      const Tile tile = this->tile();
      if (!tile.valid()) break;
      if (Config::kTerms || (tile.mode & kCareful) != 0) {
        attend<false>(tile);
      } else {
        attend<true>(tile);
      }
      store_out();
      queries_.advance();
      if constexpr (Config::kPiecewise) tile_slot_ ^= 1;
    }
    if (Warpgroup::leader()) store_wait_all();
  }

 private:
  // Notes on the tile: the mask has cut a block; the upper row's maximum (the lower row's: one bit on) was too large
  // for exponents by FMA, or its sum before a new maximum; its first attempt went wrong. Apart from mode_, which is
  // uniform over the warpgroup.
  static constexpr int kMasked = 1, kExtreme = 2, kBad = 8;
  ONEPASS_DEVICE bool has(TileMode mode) const { return (mode_ & mode) != 0; }

  // Lies in shared memory until its queries are released; registers are too scarce to keep it.
  ONEPASS_DEVICE std::uint32_t tile_address() const {
    return shared_.tile(Config::kPiecewise ? tile_slot_ : queries_.slot);
  }
  ONEPASS_DEVICE Tile tile() const { return load_tile(tile_address()); }

  // ---- the tile's loop over blocks --------------------------------------------------------------------------------
  // kQuick: the first attempt without extra terms, see softmax().
  template <bool kQuick>
  ONEPASS_DEVICE void attend(const Tile& tile) {
    state_ = {{kLowestScore<Config::kTerms>, kLowestScore<Config::kTerms>}, {0.0f, 0.0f}};
    mode_ = tile.mode;
    notes_ = 0;
    const std::uint32_t bad_rows = tile_address() + bad_rows_at();
    if (has(kCareful)) {
      const uint2 lanes = load_shared<uint2>(bad_rows);
      notes_ = (lanes.x >> Warpgroup::lane() & 1) * kBad | (lanes.y >> Warpgroup::lane() & 1) * (kBad << 1);
    } else if (Warpgroup::lane() == 0) {
      store_shared(bad_rows, make_uint2(0, 0));
    }
    far_ = false;
    if constexpr (Config::kPiecewise) {
      clear_out();
#pragma unroll 1
      for (;;) {
        attend_to_blocks<kQuick>(this->tile());
        if (far_) break;
        turn_to_far_pair();
      }
    } else {
      attend_to_blocks<kQuick>(tile);
    }
    release_previous_query();
  }

  template <bool kQuick>
  ONEPASS_DEVICE void attend_to_blocks(const Tile& tile) {
    const Blocks blocks = blocks_of<Config>(plan_, tile, far_);
    const Blocks seen = seen_blocks(blocks, tile);
    if (seen.count() <= 0 || warpgroup_.row(tile.row) >= tile.seqlen_q) {  // nothing to see, or nobody to see it
      skip_blocks(2 * blocks.count());
      if constexpr (!Config::kPiecewise) clear_out();
      return;
    }
    const int above = blocks.end - seen.end;
    if (above > 0) skip_blocks(2 * above - 1);
    first_ = seen.begin;
    set_clean_keys(tile);
    first_block<kQuick>(seen.end - 1, above > 0);
    for (int block = seen.end - 2; block >= first_; --block) step<kQuick>(block, block + 1);
    const int below = blocks_below();
    if (below > 0) skip_blocks(1);
    last_values<kQuick>(first_);
    if (below > 0) skip_blocks(2 * below - 1);
  }

  // Those of the tile's blocks that the warpgroup sees: on the causal diagonal and in tails often not the last one, in
  // windows and between the pairs not several at either end. Plain attention looks no further than the last block, and
  // below only in windows: short tiles feel every instruction before their first product.
  ONEPASS_DEVICE Blocks seen_blocks(const Blocks& blocks, const Tile& tile) const {
    const int row = warpgroup_.row(tile.row);
    const int end = visible_end(window(), tile, row + 63);
    Blocks seen = blocks;
    if constexpr (Config::kPiecewise) {
      seen.end = min((end + kKeys - 1) / kKeys, blocks.end);
    } else if (blocks.count() > 1 && end <= (blocks.end - 1) * kKeys) {
      --seen.end;
    }
    if (has_below()) {
      seen.begin = max(visible_begin(window(), tile, row) / kKeys, blocks.begin);
      if constexpr (!Config::kPiecewise) seen.begin = min(seen.begin, seen.end);
    }
    return seen;
  }
  ONEPASS_DEVICE bool has_below() const { return Config::kPiecewise || problem_.window_left != kUnbounded; }
  // Of the tile's blocks, those before the first that the warpgroup sees. Worked out anew: the loop needs the register.
  ONEPASS_DEVICE int blocks_below() const {
    return has_below() ? first_ - blocks_of<Config>(plan_, tile(), far_).begin : 0;
  }

  // volatile: the compiler would clear O before it knows on which path, and keep the tile's first product waiting.
  ONEPASS_DEVICE void clear_out() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(o_[i]));
  }

  // Hands the near pair's queries back and waits for the far pair's.
  ONEPASS_DEVICE void turn_to_far_pair() {
    warpgroup_.sync();  // every warp has read its part of them
    if (Warpgroup::leader()) barrier_arrive(shared_.query_empty(queries_.slot));
    queries_.advance();
    barrier_wait(shared_.query_full(queries_.slot), queries_.phase);
    far_ = true;
  }

  // Keys that all rows of the warp see, and the row before it: where the first row's keys end with a block that is not
  // the first one, that block must be looked at for the row's maximum.
  ONEPASS_DEVICE void set_clean_keys(const Tile& tile) {
    const int row = warpgroup_.warp_row(tile.row);
    clean_begin_ = visible_begin(window(), tile, row + 15);
    clean_end_ = visible_end(window(), tile, row - 1);
  }

  // Of the pair whose keys are being worked through.
  ONEPASS_DEVICE Window window() const {
    Window window = window_of(problem_);
    if constexpr (Config::kPiecewise) {
      if (far_) {
        window.right = plan_.far_right;
      } else {
        window.left = plan_.near_left;
      }
    }
    return window;
  }

  // skips: the values of block last + 1 are still to come.
  template <bool kQuick>
  ONEPASS_DEVICE void first_block(int last, bool skips) {
    const int keys = take_block();
    issue_scores<Config, kKeys>(s_, query(), shared_.block(keys));
    if constexpr (!Config::kPiecewise) clear_out();  // beside the product
    release_previous_query();
    wgmma_wait<0>(s_);
    release_block(keys);
    if (skips) skip_blocks(1);
    softmax<true, kQuick>(last, -1);
  }

  // Scores of `block` while P of the block `before` is multiplied with its values.
  template <bool kQuick>
  ONEPASS_DEVICE void step(int block, int before) {
    scrub_values<kQuick>(before, blocks_.next());
    const int keys = take_block();
    issue_scores<Config, kKeys>(s_, query(), shared_.block(keys));
    const int values = take_block();
    issue_values<Config>(o_, p_, shared_.block(values));
    wgmma_wait<1>(s_);
    release_block(keys);
    softmax<false, kQuick>(block, values);
  }

  template <bool kQuick>
  ONEPASS_DEVICE void last_values(int block) {
    scrub_values<kQuick>(block, blocks_);
    const int values = take_block();
    issue_values<Config>(o_, p_, shared_.block(values));
    wgmma_wait<0>(o_);
    release_block(values);
  }

  // ---- softmax ------------------------------------------------------------------------------------------------------
  // Weights of S into P, once O += P·V has read the old ones and hands `values` back; O follows new maxima.
  template <bool kFirst, bool kQuick>
  ONEPASS_DEVICE void softmax(int block, int values) {
    const int start = block * kKeys;
    float alpha[2] = {1.0f, 1.0f}, sum[2];
    bool rescale = kFirst || Config::kTerms;
    if constexpr (Config::kTerms) add_terms(start);
    if (start < clean_begin_ || start + kKeys > clean_end_) {
      const Tile tile = this->tile();
      mask_block<kKeys>(s_, window(), tile, warpgroup_.lane_row(tile.row), start);
      notes_ |= kMasked;
      rescale = true;
    }
    if constexpr (kQuick) {
      if (rescale) {
        update_max<kKeys>(s_, state_, {true, true}, alpha, unit_);
        note_extremes();
      }
      exponentiate<kKeys>(s_, {state_.max[0] * unit_, state_.max[1] * unit_}, sum, unit_);
    } else {
      weigh_carefully(rescale, alpha, sum);
      rescale = true;
    }
    if constexpr (kHalf && kQuick && !kSettles) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (!(sum[r] < kHalfLimit)) sum[r] = kInfinity;
    }
    if constexpr (kSettles && !kFirst) {  // a first block's maxima are its own
      if (__any_sync(~0u, !(sum[0] + sum[1] < kSumLimit))) {
        settle<kKeys>(s_, state_, sum, alpha, unit_);
        rescale = true;
      }
    } else if (sum[0] + sum[1] < 0.0f) {
      // Never fires, but it makes the exponentials precede the wait; otherwise ptxas hoists the wait above them.
      barrier_arrive(shared_.block_empty(0));
    }
    if constexpr (Config::kTerms) {
      if (problem_.dropout_p > 0.0) drop(start);
    }
    if constexpr (!kFirst) {
      wgmma_wait<0>(o_);
      release_block(values);
    }
    if constexpr (!kFirst || Config::kPiecewise) {
      if (rescale) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o_[i] *= alpha[i % 4 / 2];
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p_[i] = pack<Element>(s_[2 * i], s_[2 * i + 1]);
#pragma unroll
    for (int r = 0; r < 2; ++r) state_.sum[r] = fmaf(state_.sum[r], alpha[r], sum[r]);
  }

  ONEPASS_DEVICE void note_extremes() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool extreme = fabsf(state_.max[r] * unit_) >= kShiftLimit && state_.max[r] > kLowestScore<Config::kTerms>;
      // A sum that has grown too large must not be scaled back into its range: O may have been infinite, or alpha 0.
      if (extreme || !(state_.sum[r] < kTotalLimit)) notes_ |= kExtreme << r;
    }
  }

  // Rows whose first attempt went wrong have exact maxima and exponents formed from differences; the others must get
  // the bits that they have without such a neighbour. With extra terms every row is treated so, at the first attempt.
  ONEPASS_DEVICE void weigh_carefully(bool all_rows, float (&alpha)[2], float (&sum)[2]) {
    const bool bad[2] = {Config::kTerms || (notes_ & kBad) != 0, Config::kTerms || (notes_ & kBad << 1) != 0};
    update_max<kKeys>(s_, state_, {all_rows || bad[0], all_rows || bad[1]}, alpha, unit_);
    subtract<kKeys>(s_, {bad[0] ? state_.max[0] : 0.0f, bad[1] ? state_.max[1] : 0.0f});
    exponentiate<kKeys>(s_, {bad[0] ? 0.0f : state_.max[0] * unit_, bad[1] ? 0.0f : state_.max[1] * unit_}, sum, unit_);
  }

  // ---- extra score terms --------------------------------------------------------------------------------------------
  ONEPASS_DEVICE QueryRows element_at(const Tile& tile, int start) const {
    return {warpgroup_.lane_row(tile.row), start + Warpgroup::lane() % 4 * 2};
  }

  ONEPASS_DEVICE void add_terms(int start) {
    using Fragment = float[1][kKeys / 8][4];
    const Tile tile = this->tile();
    DeviceSequence sequence{};
    sequence.seqlen_q = tile.seqlen_q;
    sequence.seqlen_k = tile.key_end;
    sequence.diagonal = tile.diagonal;
    apply_terms<false>(reinterpret_cast<Fragment&>(s_), score_terms(problem_, tile.batch, tile.head),
                       element_at(tile, start), sequence);
  }

  ONEPASS_DEVICE void drop(int start) {
    const Tile tile = this->tile();
    for_each_dropout<1, kKeys / 8>(dropout_rule(problem_, tile.batch, tile.head), element_at(tile, start),
                                   [this](int, int c, int e, bool survives) {
                                     if (!survives) s_[4 * c + e] = 0.0f;
                                   });
  }

  // ---- slots --------------------------------------------------------------------------------------------------------
  ONEPASS_DEVICE std::uint32_t query() const { return shared_.query(queries_.slot) + warpgroup_.index * (64 * 128); }

  // Waits for the ring's next block and returns its slot.
  ONEPASS_DEVICE int take_block() {
    const int slot = blocks_.slot;
    barrier_wait(shared_.block_full(slot), blocks_.phase);
    blocks_.advance();
    return slot;
  }
  ONEPASS_DEVICE void release_block(int slot) const {
    if (Warpgroup::lane() == 0) barrier_arrive(shared_.block_empty(slot));
  }
  ONEPASS_DEVICE void skip_blocks(int count) {
#pragma unroll 1
    for (; count > 0; --count) release_block(take_block());
  }

  // Rows of V beyond the visible keys may hold anything, NaN too, and 0·NaN is NaN: they are cleared before use. Where
  // they lie outside the tensor TMA has written zeros already. The careful attempt clears whatever is not finite; the
  // other consumers may do so at the same time, with the same result.
  template <bool kQuick>
  ONEPASS_DEVICE void scrub_values(int block, Ring<Config::kBlockSlots> position) const {
    if (kQuick ? !has(kScrub) : mode_ == 0) return;
    const Tile tile = this->tile();
    const int start = block * kKeys;
    if ((kQuick || !has(kCareful)) && start >= tile.key_begin && start + kKeys <= tile.key_end) return;
    barrier_wait(shared_.block_full(position.slot), position.phase);
    const std::uint32_t values = shared_.block(position.slot);
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < Config::kSlabs * kKeys * 8; i += 128) {
      const int key = start + i / 8 % kKeys;
      if (key < tile.key_begin || key >= tile.key_end) {
        store_shared(values + 16 * i, {0, 0, 0, 0});
      } else if (!kQuick && has(kCareful)) {
        const int4 chunk = load_shared(values + 16 * i);
        const int4 finite = finite_elements<Element>(chunk);
        if (!differ(chunk, finite)) continue;
        // The note first: a consumer that finds the chunk clean must find it, too.
        min_shared(tile_address() + kFirstBadAt, block);
        min_shared(tile_address() + kLastBadAt, -block);
        __threadfence_block();
        store_shared(values + 16 * i, finite);
      }
    }
    async_proxy_fence();
    warpgroup_.sync();
  }

  // ---- epilogue -----------------------------------------------------------------------------------------------------
  // O leaves through the tile's own Q slot, which the producer gets back once the store has read it. With two slots
  // that wait is put off until the next tile's first product is under way.
  ONEPASS_DEVICE void release_previous_query() {
    if constexpr (Config::kQuerySlots > 1) {
      if (pending_query_ >= 0 && Warpgroup::leader()) {
        store_wait_read();
        barrier_arrive(shared_.query_empty(pending_query_));
      }
      pending_query_ = -1;
    }
  }

  ONEPASS_DEVICE void store_out() {
    const Tile tile = this->tile();
    epilogue_.finish(o_, state_, tile);
    if (!has(kCareful)) look_for_trouble();

    warpgroup_.sync();  // every warp has read its part of Q
    epilogue_.store(o_, tile, query());
    if (has(kCareful)) {
      const int4 notes = load_shared(tile_address() + 48);
      if (notes.z != INT_MAX) epilogue_.add_not_finite(tile, notes.z * kKeys, (1 - notes.w) * kKeys);
      warpgroup_.sync();  // every warp has read the notes
    }
    if constexpr (Config::kQuerySlots > 1) {
      pending_query_ = queries_.slot;
    } else if (Warpgroup::leader()) {
      store_wait_read();
      barrier_arrive(shared_.query_empty(queries_.slot));
    }
    __syncwarp();
  }

  // Asks for a second attempt where a row's exponents may have left float's range, or where values that are not finite
  // may have reached rows that do not see them. Where all rows see them, NaN is the answer.
  ONEPASS_DEVICE void look_for_trouble() const {
    bool bad[2], found = false;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      bad[r] = !Config::kTerms && ((notes_ & kExtreme << r) != 0 || !(state_.sum[r] < kTotalLimit));
    if ((notes_ & kMasked) != 0) {
      float probe[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) probe[i % 2] = fmaf(o_[i], 0.0f, probe[i % 2]);
      found = probe[0] + probe[1] != 0.0f;
    }
    if (!__any_sync(~0u, found || bad[0] || bad[1])) return;
    // A quad holds a row, so that a bad lane is four.
    const uint2 rows = {spread_over_quads(__ballot_sync(~0u, bad[0])), spread_over_quads(__ballot_sync(~0u, bad[1]))};
    store_shared(tile_address() + bad_rows_at(), rows);
    store_shared(tile_address() + kRepeatAt, 1);
  }

  ONEPASS_DEVICE static std::uint32_t spread_over_quads(std::uint32_t lanes) {
    lanes |= lanes >> 1 | lanes >> 2 | lanes >> 3;
    return (lanes & 0x11111111u) * 0xFu;
  }

  ONEPASS_DEVICE int bad_rows_at() const { return kBadRowsAt + 8 * (4 * warpgroup_.index + Warpgroup::warp()); }

  const Problem& problem_;
  const Plan& plan_;
  const SharedLayout<Config> shared_;
  const Warpgroup warpgroup_;
  const float unit_;  // score → exponent of 2
  const Epilogue<Config> epilogue_;

  Ring<Config::kQuerySlots> queries_;
  Ring<Config::kBlockSlots> blocks_;
  int pending_query_ = -1;
  int first_;                    // block that the warpgroup sees
  bool far_ = false;             // the pair in hand
  int tile_slot_ = 0;            // of piecewise attention, whose tiles have two slots of queries
  int clean_begin_, clean_end_;  // keys that all rows of the warp see
  int mode_;                     // bits of TileMode
  int notes_;                    // on the tile, see kMasked
  RowState state_;
  float s_[kKeys / 2];
  float o_[kHeadDim / 2];
  std::uint32_t p_[kKeys / 4];
};

}  // namespace onepass::cuda::hopper
