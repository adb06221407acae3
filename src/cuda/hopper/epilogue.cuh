// cuda/hopper/epilogue.cuh: a warpgroup's results: rows' sums completed, LSEs and O written, O through the tile's own
// queries' memory and TMA where that is allowed.
#pragma once

#include "cuda/common/score.cuh"
#include "cuda/hopper/not_finite.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/plan.h"
#include "cuda/hopper/softmax.cuh"
#include "cuda/hopper/warpgroup.cuh"

namespace onepass::cuda::hopper {

template <class Config>
class Epilogue {
 public:
  using Element = typename Config::Element;
  static constexpr int kHeadDim = Config::kHeadDim;
  using Out = float[kHeadDim / 2];

  // unit: score → exponent of 2.
  ONEPASS_DEVICE Epilogue(const Problem& problem, const Plan& plan, const CUtensorMap& out_map, Warpgroup warpgroup,
                          float unit)
      : problem_(problem), plan_(plan), out_map_(out_map), warpgroup_(warpgroup), unit_(unit) {}

  // Writes the rows' LSEs and turns O into the output.
  ONEPASS_DEVICE void finish(Out& o, const RowState& state, const Tile& tile) const {
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) scale[r] = finish_row(state, tile, r, warpgroup_.lane_row(tile.row) + 8 * r);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= scale[i % 4 / 2];
  }

  // staging: the warpgroup's part of the tile's queries, which every warp has read.
  ONEPASS_DEVICE void store(const Out& o, const Tile& tile, std::uint32_t staging) const {
    const bool careful = (tile.mode & kCareful) != 0;
    const bool inside = !problem_.ragged() || warpgroup_.row(tile.row) + 64 <= tile.seqlen_q;
    if (plan_.splits > 1) {
      store_partial(o, tile);
    } else if (plan_.tma_store && inside && !careful) {
      store_by_tma(o, tile, staging);
    } else {
      if (careful) wait_for_first_attempt();
      store_directly(o, tile);
    }
  }

  // Adds the infinities and NaNs among the values of keys [begin, end), which were cleared, to what the warp has stored
  // of the rows that see them.
  ONEPASS_DEVICE void add_not_finite(const Tile& tile, int begin, int end) const {
    __syncwarp();
    const int first = warpgroup_.warp_row(tile.row), last = min(first + 16, tile.seqlen_q);
    for (int row = first; row < last; ++row) {
#pragma unroll 1
      for (int column = Warpgroup::lane(); column < problem_.head_dim_v; column += 32) {
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

 private:
  // What the first attempt has stored by TMA must have arrived: nothing orders it before ordinary stores.
  ONEPASS_DEVICE void wait_for_first_attempt() const {
    if (Warpgroup::leader()) store_wait_all();
    warpgroup_.sync();
  }

  // Completes the row's sum, writes its LSE and returns the factor that turns O into the output.
  ONEPASS_DEVICE float finish_row(const RowState& state, const Tile& tile, int r, int row) const {
    float sum = quad_sum(state.sum[r]), top = state.max[r], rescale = 1.0f;
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
    if (Warpgroup::lane() % 4 == 0 && row < tile.seqlen_q) {
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

  ONEPASS_DEVICE void store_partial(const Out& o, const Tile& tile) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warpgroup_.lane_row(tile.row) + 8 * r;
      if (row >= tile.seqlen_q) continue;
      float* const to = plan_.partial_out + partial_row(tile, row) * problem_.head_dim_v;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const int column = 8 * j + Warpgroup::lane() % 4 * 2;
        if (column < problem_.head_dim_v) {
          *reinterpret_cast<float2*>(to + column) = make_float2(o[4 * j + 2 * r], o[4 * j + 2 * r + 1]);
        }
      }
    }
  }

  ONEPASS_DEVICE Element* out_row(const Tile& tile, int row) const {
    return problem_.out.template row<Element>(batch_index(tile), tile.head, tile.query_start + row);
  }

  ONEPASS_DEVICE void store_directly(const Out& o, const Tile& tile) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warpgroup_.lane_row(tile.row) + 8 * r;
      if (row >= tile.seqlen_q) continue;
      Element* const to = out_row(tile, row);
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const int column = 8 * j + Warpgroup::lane() % 4 * 2;
        if (column < problem_.head_dim_v) {
          *reinterpret_cast<std::uint32_t*>(to + column) = pack<Element>(o[4 * j + 2 * r], o[4 * j + 2 * r + 1]);
        }
      }
    }
  }

  ONEPASS_DEVICE void store_by_tma(const Out& o, const Tile& tile, std::uint32_t staging) const {
    const int staged_row = 16 * Warpgroup::warp() + Warpgroup::lane() % 16;
    const std::uint32_t base = staging + staged_row * 128;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {  // 16 columns: two 16-byte chunks of a swizzled row
      const float* const x = o + 8 * i;
      const int chunk = (i % 4 * 2 + Warpgroup::lane() / 16) ^ (staged_row % 8);
      store_matrices(base + i / 4 * (Config::kRows * 128) + chunk * 16, pack<Element>(x[0], x[1]),
                     pack<Element>(x[2], x[3]), pack<Element>(x[4], x[5]), pack<Element>(x[6], x[7]));
    }
    async_proxy_fence();
    warpgroup_.sync();
    if (Warpgroup::leader()) {
      for (int slab = 0; slab * kSlabColumns < problem_.head_dim_v; ++slab) {
        tma_store(staging + slab * (Config::kRows * 128), &out_map_, slab * kSlabColumns,
                  tile.query_start + warpgroup_.row(tile.row), tile.head, batch_index(tile));
      }
      store_commit();
    }
  }

  const Problem& problem_;
  const Plan& plan_;
  const CUtensorMap& out_map_;
  const Warpgroup warpgroup_;
  const float unit_;
};

}  // namespace onepass::cuda::hopper
