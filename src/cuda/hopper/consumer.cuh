// cuda/hopper/consumer.cuh: one consumer warpgroup: 64 query rows of every tile, S and O in registers.
//
// Per block j (from the last visible one down), with P of block j + 1 in registers:
//   issue S = Q·Kⱼᵀ, issue O += P·Vⱼ₊₁, wait for S, exponentials, wait for O, pack P.
// Maxima and the rescaling of O are left out wherever the weights stay small without them (softmax.cuh): every ordinary
// instruction beside the products costs them about half a cycle.
#pragma once

#include "cuda/common/score.cuh"
#include "cuda/hopper/mask.cuh"
#include "cuda/hopper/not_finite.cuh"
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
  // Weights beside an old maximum may leave float16's range long before a row's sum leaves float's. At head_dim 256
  // there are no registers for more than noticing it.
  static constexpr bool kHalf = std::is_same_v<Element, __half>;
  static constexpr bool kSettles = kHalf && kHeadDim <= 128 && !Config::kTerms;

  ONEPASS_DEVICE Consumer(const Problem& problem, const Plan& plan, const CUtensorMap& out_map,
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
      if (Config::kTerms || (tile.mode & kCareful) != 0) {
        attend<false>(tile);
      } else {
        attend<true>(tile);
      }
      store_out();
      queries_.advance();
    }
    if (leader()) store_wait_all();
  }

 private:
  // Notes on the tile: the mask has cut a block; the upper row's maximum (the lower row's: one bit on) was too large
  // for exponents by FMA; its first attempt went wrong. Apart from mode_, which is uniform over the warpgroup.
  static constexpr int kMasked = 1, kExtreme = 2, kBad = 8;
  ONEPASS_DEVICE bool has(TileMode mode) const { return (mode_ & mode) != 0; }

  // Lies in shared memory beside Q until the slot is released; registers are too scarce to keep it.
  ONEPASS_DEVICE Tile tile() const { return load_tile(shared_.tile(queries_.slot)); }

  // ---- the tile's loop over blocks --------------------------------------------------------------------------------
  // kQuick: the first attempt without extra terms, see softmax().
  template <bool kQuick>
  ONEPASS_DEVICE void attend(const Tile& tile) {
    state_ = {{kLowestScore<Config::kTerms>, kLowestScore<Config::kTerms>}, {0.0f, 0.0f}};
    mode_ = tile.mode;
    notes_ = 0;
    const std::uint32_t bad_rows = shared_.tile(queries_.slot) + bad_rows_at();
    if (has(kCareful)) {
      const uint2 lanes = load_shared<uint2>(bad_rows);
      notes_ = (lanes.x >> lane() & 1) * kBad | (lanes.y >> lane() & 1) * (kBad << 1);
    } else if (lane() == 0) {
      store_shared(bad_rows, make_uint2(0, 0));
    }
    const int row = tile.row + 64 * warpgroup_;
    if (tile.blocks == 0 || row >= tile.seqlen_q) {  // nothing to see, or nobody to see it
      for (int i = 2 * steps_of<Config>(plan_, tile).count; i > 0; --i) release_block(take_block());
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o_[i] = 0.0f;
      release_previous_query();
      return;
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o_[i] = 0.0f;
    if constexpr (Config::kPiecewise) {
      attend_to_pairs<kQuick>(tile);
    } else {
      attend_to_blocks<kQuick>(tile);
    }
  }

  template <bool kQuick>
  ONEPASS_DEVICE void attend_to_blocks(const Tile& tile) {
    // On the causal diagonal and in tails a warpgroup often sees nothing of the tile's last block.
    first_ = tile.first_block;
    int last = first_ + tile.blocks - 1;
    const int end = visible_end(window(), tile, tile.row + 64 * warpgroup_ + 63);
    const bool skip = tile.blocks > 1 && end <= last * kKeys;
    if (skip) {
      release_block(take_block());
      --last;
    }
    set_clean_keys(tile);
    first_block<kQuick>(last, skip);
    for (int block = last - 1; block >= first_; --block) step<kQuick>(block, block + 1);
    last_values<kQuick>(first_);
  }

  template <bool kQuick>
  ONEPASS_DEVICE void attend_to_pairs(const Tile& tile) {
    const Steps steps = steps_of<Config>(plan_, tile);
    far_ = steps.far(0);
    set_clean_keys(tile);
    first_block<kQuick>(steps.block(0), false);
    for (int i = 1; i < steps.count; ++i) {
      const bool turns = i == steps.near;
      if (turns) {
        far_ = true;
        clean_begin_ = INT_MAX;  // the far pair's scores need maxima of their own
      }
      step<kQuick>(steps.block(i), steps.block(i - 1));
      if (turns) set_clean_keys(this->tile());
    }
    last_values<kQuick>(steps.block(steps.count - 1));
  }

  // Keys that all rows of the warp see, and the row before it: where the first row's keys end with a block that is not
  // the first one, that block must be looked at for the row's maximum.
  ONEPASS_DEVICE void set_clean_keys(const Tile& tile) {
    const int row = tile.row + 64 * warpgroup_ + 16 * warp();
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

  // skipped: the values of block last + 1 are still to come.
  template <bool kQuick>
  ONEPASS_DEVICE void first_block(int last, bool skipped) {
    const int keys = take_block();
    issue_scores<Config, kKeys>(s_, scored_query(), shared_.block(keys));
    release_previous_query();
    wgmma_wait<0>(s_);
    release_block(keys);
    if (skipped) release_block(take_block());
    softmax<true, kQuick>(last, -1);
  }

  // Scores of `block` while P of the block `before` is multiplied with its values.
  template <bool kQuick>
  ONEPASS_DEVICE void step(int block, int before) {
    scrub_values<kQuick>(before, blocks_.next());
    const int keys = take_block();
    issue_scores<Config, kKeys>(s_, scored_query(), shared_.block(keys));
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
      mask_block<kKeys>(s_, window(), tile, lane_row(tile.row), start);
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
      if (extreme) notes_ |= kExtreme << r;
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
    return {lane_row(tile.row), start + lane() % 4 * 2};
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
  ONEPASS_DEVICE static int warp() { return threadIdx.x % 128 / 32; }
  ONEPASS_DEVICE static int lane() { return threadIdx.x % 32; }
  // The first of the lane's two rows within the sequence.
  ONEPASS_DEVICE int lane_row(int tile_row) const { return tile_row + 64 * warpgroup_ + 16 * warp() + lane() / 4; }
  ONEPASS_DEVICE static bool leader() { return threadIdx.x % 128 == 0; }
  ONEPASS_DEVICE void sync_warpgroup() const { named_barrier_sync(1 + warpgroup_, 128); }

  ONEPASS_DEVICE std::uint32_t query() const { return shared_.query(queries_.slot) + warpgroup_ * (64 * 128); }
  ONEPASS_DEVICE std::uint32_t scored_query() const {
    return query() + (Config::kPiecewise && far_ ? Config::kFarQueryAt : 0);
  }

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
        min_shared(shared_.tile(queries_.slot) + kFirstBadAt, block);
        min_shared(shared_.tile(queries_.slot) + kLastBadAt, -block);
        __threadfence_block();
        store_shared(values + 16 * i, finite);
      }
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
    if (!has(kCareful)) look_for_trouble();

    sync_warpgroup();  // every warp has read its part of Q
    const bool inside = !problem_.ragged() || tile.row + 64 * (warpgroup_ + 1) <= tile.seqlen_q;
    if (plan_.splits > 1) {
      store_partial(tile);
    } else if (plan_.tma_store && inside && !has(kCareful)) {
      store_by_tma(tile);
    } else {
      if (has(kCareful)) wait_for_first_attempt();
      store_directly(tile);
    }
    if (has(kCareful)) add_not_finite(tile);
    if constexpr (Config::kQuerySlots > 1) {
      pending_query_ = queries_.slot;
    } else if (leader()) {
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
    store_shared(shared_.tile(queries_.slot) + bad_rows_at(), rows);
    store_shared(shared_.tile(queries_.slot) + kRepeatAt, 1);
  }

  ONEPASS_DEVICE static std::uint32_t spread_over_quads(std::uint32_t lanes) {
    lanes |= lanes >> 1 | lanes >> 2 | lanes >> 3;
    return (lanes & 0x11111111u) * 0xFu;
  }

  ONEPASS_DEVICE int bad_rows_at() const { return kBadRowsAt + 8 * (4 * warpgroup_ + warp()); }

  // What the first attempt has stored by TMA must have arrived: nothing orders it before ordinary stores.
  ONEPASS_DEVICE void wait_for_first_attempt() const {
    if (leader()) store_wait_all();
    sync_warpgroup();
  }

  // Adds the infinities and NaNs that were cleared from V to what the warp has stored of the rows that see them.
  ONEPASS_DEVICE void add_not_finite(const Tile& tile) const {
    const int4 notes = load_shared(shared_.tile(queries_.slot) + 48);
    if (notes.z == INT_MAX) return;
    const int begin = notes.z * kKeys, end = (1 - notes.w) * kKeys;
    __syncwarp();
    for (int row = lane_row(tile.row) - lane() / 4, last = min(row + 16, tile.seqlen_q); row < last; ++row) {
#pragma unroll 1
      for (int column = lane(); column < problem_.head_dim_v; column += 32) {
        const float extra = sum_not_finite<Element>(problem_, tile, row, column, begin, end);
        if (extra == 0.0f) continue;
        if (plan_.splits > 1) {
          plan_.partial_out[partial_row(tile, row) * problem_.head_dim_v + column] += extra;
        } else {
          Element* const element = out_row(tile, row) + column;
          *element = from_float<Element>(to_float(*element) + extra);
        }
      }
    }
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

  ONEPASS_DEVICE Element* out_row(const Tile& tile, int row) const {
    return problem_.out.template row<Element>(batch_index(tile), tile.head, tile.query_start + row);
  }

  ONEPASS_DEVICE void store_directly(const Tile& tile) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane_row(tile.row) + 8 * r;
      if (row >= tile.seqlen_q) continue;
      Element* const to = out_row(tile, row);
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
        tma_store(query() + slab * (Config::kRows * 128), &out_map_, slab * kSlabColumns,
                  tile.query_start + tile.row + 64 * warpgroup_, tile.head, batch_index(tile));
      }
      store_commit();
    }
  }

  const Problem& problem_;
  const Plan& plan_;
  const CUtensorMap& out_map_;
  const SharedLayout<Config> shared_;
  const int warpgroup_;
  const float unit_;  // score → exponent of 2

  Ring<Config::kQuerySlots> queries_;
  Ring<Config::kBlockSlots> blocks_;
  int pending_query_ = -1;
  int first_;                    // the tile's first block
  bool far_ = false;             // the pair in hand
  int clean_begin_, clean_end_;  // keys that all rows of the warp see
  int mode_;                     // bits of TileMode
  int notes_;                    // on the tile, see kMasked
  RowState state_;
  float s_[kKeys / 2];
  float o_[kHeadDim / 2];
  std::uint32_t p_[kKeys / 4];
};

}  // namespace onepass::cuda::hopper
