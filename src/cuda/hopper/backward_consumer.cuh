// cuda/hopper/backward_consumer.cuh: dK, dV and dS, keys stationary: a consumer warpgroup keeps 64 keys and the
// accumulators of their gradients; queries stream past.
//
// S and dP are computed transposed, so that Pᵀ and dSᵀ are the A operands of dV += Pᵀ·dO and dK += dSᵀ·Q in the
// registers that they come in. Only dSᵀ passes through shared memory, to the warpgroup that computes dQ
// (backward_sums.cuh). Per block j of queries: issue dK += dS(j−1)·Q(j−1), hand over dS(j−1), issue S(j), wait for
// both, exponentials, issue dP(j) and dV += P(j)·dO(j), wait for dP, dS(j). The other warpgroups' products fill the
// gaps.
#pragma once

#include "cuda/hopper/backward_producer.cuh"
#include "cuda/hopper/tile.cuh"
#include "cuda/hopper/warpgroup.cuh"

namespace onepass::cuda::hopper {

template <class Config>
class KeyGradients {
 public:
  using Element = typename Config::Element;
  static constexpr int kQueries = Config::kQueries, kHeadDim = Config::kHeadDim;
  using Scores = float[kQueries / 2];
  using Packed = std::uint32_t[kQueries / 4];
  using Gradient = float[kHeadDim / 2];
  static constexpr int kFirstThread = 256;  // of the consumers

  ONEPASS_DEVICE KeyGradients(const BackwardArguments& arguments, const BackwardMaps& maps, const BackwardPlan& plan,
                              const BackwardLayout<Config>& shared, int warpgroup)
      : arguments_(arguments),
        problem_(arguments.problem.forward),
        maps_(maps),
        plan_(plan),
        shared_(shared),
        warpgroup_{warpgroup} {}

  ONEPASS_DEVICE void run() {
    for (;;) {
      barrier_wait(shared_.tile_full(tiles_.slot), tiles_.phase);
      const int blocks = load_key_tile(tile_address()).blocks;
      if (blocks < 0) break;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) dk_[i] = dv_[i] = 0.0f;
      if (blocks > 0) {
        prepare_keys();
        run_blocks(blocks * arguments_.group_size);
      }
      release(shared_.keys_empty());
      store();
      tiles_.advance();
      keys_phase_ ^= 1;
    }
    if (Warpgroup::leader()) store_wait_all();
  }

 private:
  ONEPASS_DEVICE static void release(std::uint32_t empty) {
    if (Warpgroup::lane() == 0) barrier_arrive(empty);
  }
  ONEPASS_DEVICE std::uint32_t tile_address() const { return shared_.tile(tiles_.slot); }
  // Of the block in hand.
  ONEPASS_DEVICE int gradient_slot() const { return count_ % Config::kGradientSlots; }
  ONEPASS_DEVICE std::uint32_t gradients_phase() const { return count_ / Config::kGradientSlots % 2; }

  // ---- keys ---------------------------------------------------------------------------------------------------------
  // K is made finite, because dQ is a product with every key of the tile, seen or not; scores of keys that were not
  // become NaN.
  ONEPASS_DEVICE void prepare_keys() {
    barrier_wait(shared_.keys_full(), keys_phase_);
    std::uint32_t bad = 0;
    const int lane = Warpgroup::lane();
    const std::uint32_t rows = shared_.keys() + warpgroup_.warp_row(0) * 128;
#pragma unroll 1
    for (int i = lane; i < Config::kSlabs * 16 * 8; i += 32) {
      const std::uint32_t address = rows + i / 128 * Config::kKeySlabBytes + i % 128 * 16;
      const int4 chunk = load_shared(address), finite = finite_elements<Element>(chunk);
      if (!differ(chunk, finite)) continue;
      store_shared(address, finite);
      bad |= 1u << i % 128 / 8;
    }
    bad = __reduce_or_sync(~0u, bad);
    if (lane == 0) store_shared(bad_keys_at(), static_cast<int>(bad));
    __syncwarp();
    note_seeing_queries();
    async_proxy_fence();
    warpgroup_.sync();
    if constexpr (Config::kKeysInRegisters) load_rows(keys_, shared_.keys());
  }

  ONEPASS_DEVICE void note_seeing_queries() const {
    const int row = threadIdx.x % 128;
    if (row >= 64) return;
    const KeyTile tile = load_key_tile(tile_address());
    const int key = warpgroup_.row(tile.key) + row;
    const bool live = key >= tile.key_begin && key < tile.key_end;
    const Range seeing = live ? seeing_queries(problem_, tile.sequence(), key) : Range{0, 0};
    store_shared(shared_.seeing(warpgroup_.row(row)), int2{seeing.begin, seeing.end});
  }

  // The warpgroup's 64 rows as A operands: for each step of a product a 16×16 matrix in the layout of ldmatrix.
  template <int kSteps>
  ONEPASS_DEVICE void load_rows(std::uint32_t (&rows)[kSteps][4], std::uint32_t tile) const {
    const int row = warpgroup_.warp_row(0) + Warpgroup::lane() % 16;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int chunk = (i % 4 * 2 + Warpgroup::lane() / 16) ^ row % 8;  // of 16 bytes, swizzled
      load_matrices(rows[i], tile + row * 128 + i / 4 * Config::kKeySlabBytes + 16 * chunk);
    }
  }

  // ---- products -----------------------------------------------------------------------------------------------------
  // D = A·Bᵀ with the warpgroup's rows of K or V and a block of queries or gradients; commits.
  template <class Rows>
  ONEPASS_DEVICE void issue_rows_by_rows(Scores& d, const Rows& rows, std::uint32_t tile, std::uint32_t block) const {
    const std::uint64_t a = matrix_descriptor(first_lane(tile + warpgroup_.index * (64 * 128)), 0);
    const std::uint64_t b = matrix_descriptor(first_lane(block), 0);
    pin(d);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const int slab = i / 4, step = i % 4 * 2;  // in units of 16 bytes
      const std::uint64_t b_step = b + slab * (Config::kQuerySlabBytes / 16) + step;
      if constexpr (Config::kKeysInRegisters) {
        Wgmma<Element, kQueries>::rs_rows(d, rows[i], b_step, i != 0);
      } else {
        Wgmma<Element, kQueries>::ss(d, a + slab * (Config::kKeySlabBytes / 16) + step, b_step, i != 0);
      }
    }
    wgmma_commit();
  }
  ONEPASS_DEVICE void issue_scores(int slot) { issue_rows_by_rows(s_, keys_, shared_.keys(), shared_.queries(slot)); }

  // D += A·B for A in registers and a block of queries or gradients.
  ONEPASS_DEVICE void issue_gradient(Gradient& d, const Packed& a, std::uint32_t block) const {
    const std::uint64_t b = matrix_descriptor(first_lane(block), Config::kQuerySlabBytes);
    pin(d);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
      Wgmma<Element, kHeadDim>::rs(d, a + 4 * i, b + i * (16 * 128 / 16), 1);
    }
    wgmma_commit();
  }

  // ---- a block of queries -------------------------------------------------------------------------------------------
  ONEPASS_DEVICE void run_blocks(int blocks) {
    bool in_hand = false;  // a block whose dK is still to come
#pragma unroll 1
    for (; blocks > 0; --blocks) {
      barrier_wait(shared_.queries_full(queries_.slot), queries_.phase);
      const bool hidden = (load_shared<int>(mode_at(queries_.slot)) & kHidden << warpgroup_.index) != 0;
      if (hidden) {
        if (in_hand) finish_block();
        skip_block();
      } else if (in_hand) {
        next_block();
      } else {
        first_block();
      }
      in_hand = !hidden;
    }
    if (in_hand) finish_block();
  }

  ONEPASS_DEVICE void first_block() {
    issue_scores(queries_.slot);
    barrier_wait(shared_.values_full(), keys_phase_);
    if constexpr (Config::kKeysInRegisters) load_rows(values_, shared_.values());
    weigh_block();
  }

  // dK of the block in hand beside S of the next one.
  ONEPASS_DEVICE void next_block() {
    issue_gradient(dk_, ds_, shared_.queries(previous_));
    issue_scores(queries_.slot);
    hand_over_scores(previous_);
    wgmma_wait<1>(dk_);
    release(shared_.queries_empty(previous_));
    weigh_block();
  }

  ONEPASS_DEVICE void finish_block() {
    issue_gradient(dk_, ds_, shared_.queries(previous_));
    hand_over_scores(previous_);
    wgmma_wait<0>(dk_);
    release(shared_.queries_empty(previous_));
  }

  // None of the warpgroup's keys is seen.
  ONEPASS_DEVICE void skip_block() {
    const int slot = queries_.slot, gradients = gradient_slot();
    barrier_wait(shared_.gradients_full(gradients), gradients_phase());
    release(shared_.gradients_empty(gradients));
    advance();
#pragma unroll
    for (int i = 0; i < kQueries / 4; ++i) ds_[i] = 0;
    hand_over_scores(slot);
    release(shared_.queries_empty(slot));
  }
  ONEPASS_DEVICE void advance() {
    previous_ = queries_.slot;
    queries_.advance();
    ++count_;
  }

  // From a block's scores, which are on their way, to its weights, their gradients and dV. dS is formed with weights as
  // they enter dV, rounded to the operands' type: registers for both are lacking.
  ONEPASS_DEVICE void weigh_block() {
    const int slot = queries_.slot, gradients = gradient_slot();
    const std::uint32_t notes = shared_.notes(slot);
    const int mode = load_shared<int>(mode_at(slot)), bad_keys = load_shared<int>(bad_keys_at());
    const Numbers lse = load_numbers(notes);
    wgmma_wait<0>(s_);
    weigh(lse, mode, bad_keys, slot);
    Packed p;
#pragma unroll
    for (int i = 0; i < kQueries / 4; ++i) p[i] = pack<Element>(s_[2 * i], s_[2 * i + 1]);
    forget(s_);
    Scores g;
    barrier_wait(shared_.gradients_full(gradients), gradients_phase());
    issue_rows_by_rows(g, values_, shared_.values(), shared_.gradients(gradients));
    issue_gradient(dv_, p, shared_.gradients(gradients));
    const Numbers delta = load_numbers(notes + Config::kDeltasAt);
    wgmma_wait<1>(g);
#pragma unroll
    for (int i = 0; i < kQueries / 2; ++i) g[i] = unpack<Element>(p[i / 2], i % 2) * (g[i] - delta.of(i));
    if ((mode & kCutByMask) != 0) hide(g, slot);
#pragma unroll
    for (int i = 0; i < kQueries / 4; ++i) ds_[i] = pack<Element>(g[2 * i], g[2 * i + 1]);
    wgmma_wait<0>(dv_);
    release(shared_.gradients_empty(gradients));
    advance();
  }
  ONEPASS_DEVICE std::uint32_t mode_at(int slot) const { return shared_.notes(slot) + Config::kBlockNoteAt + 4; }

  // What the registers hold is not needed any more, although the next product will seem to read it.
  ONEPASS_DEVICE static void forget(Scores& x) {
#pragma unroll
    for (int i = 0; i < kQueries / 2; ++i) asm volatile("" : "=f"(x[i]));
  }

  // dSᵀ of the block before goes to the warpgroup that computes dQ.
  ONEPASS_DEVICE void hand_over_scores(int slot) const {
    const int number = count_ - 1, parity = number % 2;
    barrier_wait(shared_.scores_empty(parity), number / 2 % 2 ^ 1);
    store_scores(shared_.scores(parity));
    if (threadIdx.x == kFirstThread) {
      store_shared(shared_.sum_note(parity), load_shared<int2>(shared_.notes(slot) + Config::kBlockNoteAt + 8));
    }
    async_proxy_fence();
    __syncwarp();
    release(shared_.scores_full(parity));
  }

  // A number of each of the lane's queries.
  struct Numbers {
    float x[kQueries / 4];
    ONEPASS_DEVICE float of(int element) const { return x[element / 8 * 4 + element % 8 / 4 * 2 + element % 2]; }
  };
  ONEPASS_DEVICE static Numbers load_numbers(std::uint32_t numbers) {
    numbers += opaque(threadIdx.x) % 4 * 16;
    Numbers loaded;
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
      const int4 words = load_shared(numbers + 64 * i);
      loaded.x[4 * i] = __int_as_float(words.x);
      loaded.x[4 * i + 1] = __int_as_float(words.y);
      loaded.x[4 * i + 2] = __int_as_float(words.z);
      loaded.x[4 * i + 3] = __int_as_float(words.w);
    }
    return loaded;
  }

  // Scores become weights.
  ONEPASS_DEVICE void weigh(const Numbers& lse, int mode, int bad_keys, int slot) {
    float unit = arguments_.scale_log2;
    if (bad_keys != 0) spoil(bad_keys);
    if ((mode & kNaturalUnits) != 0) {
      const Numbers natural = load_numbers(shared_.notes(slot) + Config::kNaturalAt);
      // Not one FMA: the LSE of a row with one key is its rounded logit.
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) {
        s_[i] = (__fmul_rn(s_[i], problem_.softmax_scale) + natural.of(i)) * kLog2e;
      }
      unit = 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kQueries / 2; ++i) s_[i] = exp2_approx(fmaf(s_[i], unit, lse.of(i)));
    if ((mode & kCutByMask) != 0) hide(s_, slot);
  }

  ONEPASS_DEVICE std::uint32_t bad_keys_at() const {
    return shared_.bad_keys(4 * warpgroup_.index + Warpgroup::warp());
  }
  // The scores of keys that were not finite.
  ONEPASS_DEVICE void spoil(int bad) {
    const int mine = bad >> Warpgroup::lane() / 4;
#pragma unroll
    for (int i = 0; i < kQueries / 2; ++i) {
      if ((mine & (i / 2 % 2 ? 0x100 : 1)) != 0) s_[i] = __int_as_float(0x7FFFFFFF);
    }
  }

  // Zeroes what belongs to pairs that the mask hides.
  ONEPASS_DEVICE void hide(Scores& x, int slot) const {
    const int column = load_shared<int>(shared_.notes(slot) + Config::kBlockNoteAt) + Warpgroup::lane() % 4 * 2;
    int2 seeing[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      seeing[r] = load_shared<int2>(shared_.seeing(warpgroup_.lane_row(8 * r)));
      seeing[r].x -= column;
      seeing[r].y -= column;
    }
#pragma unroll
    for (int i = 0; i < kQueries / 2; ++i) {
      const int r = i / 2 % 2, c = i / 4 * 8 + i % 2;
      const bool visible = c >= seeing[r].x && c < seeing[r].y;
      x[i] = visible ? x[i] : 0.0f;
    }
  }

  // dSᵀ: rows of 64 queries, 128 swizzled bytes each.
  ONEPASS_DEVICE void store_scores(std::uint32_t scores) const {
    const int lane = opaque(threadIdx.x) % 32, row = warpgroup_.warp_row(0) + lane % 16;
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) {
      const int chunk = (2 * i + lane / 16) ^ row % 8;
      store_matrices(scores + row * 128 + 16 * chunk, ds_[4 * i], ds_[4 * i + 1], ds_[4 * i + 2], ds_[4 * i + 3]);
    }
  }

  // ---- results ------------------------------------------------------------------------------------------------------
  // dV leaves through the memory of the warpgroup's values, dK through that of its dSᵀ.
  ONEPASS_DEVICE void store() {
    const KeyTile tile = load_key_tile(tile_address());
    const int row = warpgroup_.row(tile.key);
    const bool inside = !problem_.ragged() || row + 64 <= tile.seqlen_k;
    const bool tma_dk = plan_.tma_store_dk && inside, tma_dv = plan_.tma_store_dv && inside;
    const float scale = problem_.softmax_scale;
    barrier_wait(shared_.values_full(), keys_phase_);  // whoever has skipped all blocks
    if (arguments_.add) add_stored_values(tile);
    tma_dv ? stage(dv_, dv_staging(0), Config::kKeySlabBytes)
           : store_directly(dv_, arguments_.problem.dv, problem_.head_dim_v, tile);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk_[i] *= scale;
    for (int i = 0; i < 2; ++i) {  // the last two blocks' dS have been read
      barrier_wait(shared_.scores_empty((count_ + i) % 2), (count_ + i) / 2 % 2 ^ 1);
    }
    tma_dk ? stage(dk_, dk_staging(0), Config::kScoreBytes)
           : store_directly(dk_, arguments_.problem.dk, problem_.head_dim, tile);
    async_proxy_fence();
    warpgroup_.sync();
    release(shared_.tile_empty(tiles_.slot));
    if (!Warpgroup::leader()) return;
    for (int slab = 0; tma_dv && slab * kSlabColumns < problem_.head_dim_v; ++slab) {
      store_slab(dv_staging(slab), maps_.dv, slab, tile);
    }
    for (int slab = 0; tma_dk && slab * kSlabColumns < problem_.head_dim; ++slab) {
      store_slab(dk_staging(slab), maps_.dk, slab, tile);
    }
    store_commit();
    store_wait_read();
    barrier_arrive(shared_.values_empty());
  }
  ONEPASS_DEVICE std::uint32_t dv_staging(int slab) const {
    return shared_.values() + slab * Config::kKeySlabBytes + warpgroup_.row(0) * 128;
  }
  ONEPASS_DEVICE std::uint32_t dk_staging(int slab) const { return shared_.scores(slab) + warpgroup_.row(0) * 128; }

  ONEPASS_DEVICE int batch_index(const KeyTile& tile) const { return problem_.ragged() ? 0 : tile.batch; }
  ONEPASS_DEVICE Element* row_of(const Operand& operand, const KeyTile& tile, int key) const {
    return operand.row<Element>(batch_index(tile), tile.head, tile.key_start + key);
  }
  // Calls use(i, row, column) for the lane's elements i that lie in the sequence and the operand.
  template <class Use>
  ONEPASS_DEVICE void for_each_element(const Operand& operand, std::int64_t dim, const KeyTile& tile,
                                       const Use& use) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = warpgroup_.lane_row(tile.key) + 8 * r;
      if (key >= tile.seqlen_k) continue;
      Element* const row = row_of(operand, tile, key);
#pragma unroll
      for (int i = 0; i < kHeadDim / 4; ++i) {
        const int column = i / 2 * 8 + Warpgroup::lane() % 4 * 2 + i % 2;
        if (column < dim) use(i / 2 * 4 + 2 * r + i % 2, row[column]);
      }
    }
  }
  ONEPASS_DEVICE void add_stored_values(const KeyTile& tile) {
    for_each_element(arguments_.problem.dv, problem_.head_dim_v, tile,
                     [&](int i, Element& element) { dv_[i] += to_float(element); });
  }
  ONEPASS_DEVICE void store_directly(const Gradient& d, const Operand& operand, std::int64_t dim,
                                     const KeyTile& tile) const {
    for_each_element(operand, dim, tile, [&](int i, Element& element) { element = from_float<Element>(d[i]); });
  }

  ONEPASS_DEVICE static void stage(const Gradient& d, std::uint32_t staging, int slab_bytes) {
    const int row = 16 * Warpgroup::warp() + Warpgroup::lane() % 16;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {  // 16 columns: two 16-byte chunks of a swizzled row
      const float* const x = d + 8 * i;
      const int chunk = (i % 4 * 2 + Warpgroup::lane() / 16) ^ row % 8;
      store_matrices(staging + i / 4 * slab_bytes + row * 128 + chunk * 16, pack<Element>(x[0], x[1]),
                     pack<Element>(x[2], x[3]), pack<Element>(x[4], x[5]), pack<Element>(x[6], x[7]));
    }
  }
  ONEPASS_DEVICE void store_slab(std::uint32_t staging, const CUtensorMap& map, int slab, const KeyTile& tile) const {
    tma_store(staging, &map, slab * kSlabColumns, tile.key_start + warpgroup_.row(tile.key), tile.head,
              batch_index(tile));
  }

  const BackwardArguments& arguments_;
  const Problem& problem_;
  const BackwardMaps& maps_;
  const BackwardPlan& plan_;
  const BackwardLayout<Config> shared_;
  const Warpgroup warpgroup_;
  Ring<Config::kTileSlots> tiles_;
  std::uint32_t keys_phase_ = 0;
  Ring<Config::kQuerySlots> queries_;
  int count_ = 0;     // of blocks that S has been computed of
  int previous_ = 0;  // slot of the last of them
  Gradient dk_, dv_;
  Scores s_;
  Packed ds_;
  static constexpr int kSteps = Config::kKeysInRegisters ? kHeadDim / 16 : 1;
  std::uint32_t keys_[kSteps][4], values_[kSteps][4];
};

}  // namespace onepass::cuda::hopper
