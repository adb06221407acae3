// cpu/backward_block-inl.h: what one panel of queries and one block of keys give each other:
//   P = e^(S − lse)    dV += (P∘F)ᵀ·dO    dS = P∘(F∘dO·Vᵀ − delta)    dK += dSᵀ·Q    dQ += dS·K
// Scores, weights and their gradients are held transposed, (key, query), queries along the lanes.
#if defined(ONEPASS_CPU_BACKWARD_BLOCK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_BACKWARD_BLOCK_INL_H_
#undef ONEPASS_CPU_BACKWARD_BLOCK_INL_H_
#else
#define ONEPASS_CPU_BACKWARD_BLOCK_INL_H_
#endif

#include "core/sequence.h"
#include "cpu/backward_products-inl.h"
#include "cpu/backward_score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
namespace {

// Up to kPanel queries of one head. "Lanes" arrays are (dim, kPanel), "rows" arrays strips (see strip_offset).
struct QueryPanel {
  std::int64_t first = 0;  // query of lane 0
  std::int64_t count = 0;
  std::int64_t width = 0;  // count, rounded up to whole vectors; lanes past count are zero
  bool finite = true;      // no NaN or Inf in q and dout
  Lanes lanes;
  float* q_lanes;
  float* dout_lanes;
  float* q_rows;
  float* dout_rows;
  float* dq;     // lanes: the sum so far
  float* lse;    // +inf in rows without a key, whose weights then are 0
  float* delta;  // rowsum(dO∘O)
};

// Up to kBlock keys of one key head as floats, and their rows of the sums dK and dV.
struct KeyBlock {
  std::int64_t first = 0;
  std::int64_t count = 0;
  bool finite = true;  // no NaN or Inf in k
  Broadcast k, v;
  float* dk;
  float* dv;
  std::int64_t dk_stride, dv_stride;

  // The keys within [begin, end).
  KeyBlock part(std::int64_t begin, std::int64_t end) const {
    const std::int64_t skipped = std::max<std::int64_t>(begin - first, 0);
    KeyBlock rest = *this;
    rest.first += skipped;
    rest.count = std::min(first + count, end) - rest.first;
    rest.k.data += skipped * k.stride;
    rest.v.data += skipped * v.stride;
    rest.dk += skipped * dk_stride;
    rest.dv += skipped * dv_stride;
    return rest;
  }
};

// The lanes of `panel` that see key block.first + row, hidden ends of the sequence apart.
inline Band band_of(const Problem& problem, const Sequence& sequence, const QueryPanel& panel, const KeyBlock& block) {
  Band band = Band::whole(panel.count);
  const std::int64_t offset = block.first - sequence.diagonal - panel.first;
  if (problem.window_right != kUnbounded) band.begin_offset = offset - problem.window_right;
  if (problem.window_left != kUnbounded) band.end_offset = offset + problem.window_left + 1;
  return band;
}

// a·b + c as a lane of the tiled products computes it: whether scalar code is contracted to an FMA is the compiler's
// choice, and a row that sees no NaN has the same bits whatever is hidden from it.
inline float multiply_add(float a, float b, float c) {
  const hn::CappedTag<float, 1> lane;
  return hn::GetLane(hn::MulAdd(hn::Set(lane, a), hn::Set(lane, b), hn::Set(lane, c)));
}

// Sums one visible pair at a time. A hidden weight is 0, but 0·NaN is not: where a block that is only partly visible
// meets a NaN or an Inf, hidden pairs must not be multiplied at all.
HWY_NOINLINE void add_visible_to_keys(const float* scores, std::int64_t width, std::int64_t keys, const Band& band,
                                      const float* rows, std::int64_t dim, float* sums, std::int64_t sums_stride) {
  for (std::int64_t key = 0; key < keys; ++key) {
    for (std::int64_t query = band.begin(key); query < band.end(key); ++query) {
      const float score = scores[key * width + query];
      for (std::int64_t d = 0; d < dim; ++d) {
        float& sum = sums[key * sums_stride + d];
        sum = multiply_add(score, rows[strip_offset(query, d)], sum);
      }
    }
  }
}
HWY_NOINLINE void add_visible_to_queries(const float* scores, std::int64_t width, std::int64_t keys, const Band& band,
                                         Broadcast k, std::int64_t dim, float* dq) {
  for (std::int64_t key = 0; key < keys; ++key) {
    for (std::int64_t query = band.begin(key); query < band.end(key); ++query) {
      const float score = scores[key * width + query];
      for (std::int64_t d = 0; d < dim; ++d) {
        float& sum = dq[d * kPanel + query];
        sum = multiply_add(score, k.data[key * k.stride + d], sum);
      }
    }
  }
}

// sums(key, :) += Σ_query scores(key, query)·rows(query, :).
inline void add_to_keys(const float* scores, std::int64_t width, std::int64_t keys, const Band& band, const float* rows,
                        std::int64_t dim, float* sums, std::int64_t sums_stride) {
  for (std::int64_t column = 0; column < dim; column += kStrip) {
    multiply<true>(keys, padded(std::min(dim - column, kStrip)), {scores, width}, rows + strip_offset(0, column),
                   kStrip, band, sums + column, sums_stride, Accumulate{});
  }
}

// scores(key, :) = epilogue(a(key, :)·lanes). Of a partly visible tile only the vectors that some key of each kKeyStep
// sees; what the others hold is hidden afterwards.
template <class Epilogue>
void multiply_scores_of(const QueryPanel& panel, std::int64_t keys, const Band& band, bool partial, Broadcast a,
                        const float* lanes, std::int64_t dim, float* scores, const Epilogue& epilogue) {
  constexpr std::int64_t kKeyStep = 16;
  const std::int64_t step = partial ? kKeyStep : keys;
  for (std::int64_t key = 0; key < keys; key += step) {
    const std::int64_t count = std::min(step, keys - key);
    const std::int64_t first = partial ? band.begin(key) / lane_count() * lane_count() : 0;
    const std::int64_t last = partial ? padded(band.end(key + count - 1)) : panel.width;
    multiply<true>(count, last, {a.data + key * a.stride, a.stride}, lanes, kPanel, Band::whole(dim),
                   scores + key * panel.width, panel.width, epilogue, first);
  }
}

// dq(:, lane) += Σ_key k(key, :)·scores(key, lane). Of a partly visible tile only the keys that some lane of each two
// vectors sees: narrower strips would lose more in registers than they save.
inline void add_to_queries(const float* scores, const QueryPanel& panel, std::int64_t keys, const Band& band,
                           bool partial, Broadcast k, std::int64_t dim) {
  const std::int64_t step = partial ? 2 * lane_count() : panel.width;
  for (std::int64_t lane = 0; lane < panel.width; lane += step) {
    const std::int64_t lanes = std::min(step, panel.width - lane);
    const std::int64_t begin = partial ? std::clamp<std::int64_t>(lane + 1 - band.end_offset, 0, keys) : 0;
    const std::int64_t end = partial ? std::clamp<std::int64_t>(lane + lanes - band.begin_offset, begin, keys) : keys;
    multiply<false>(dim, lanes, {k.data + begin * k.stride, k.stride}, scores + begin * panel.width + lane, panel.width,
                    Band::whole(end - begin), panel.dq + lane, kPanel, Accumulate{});
  }
}

// Tiles of (kBlock, kPanel), held by one worker; null where the problem has no use for them.
struct TileMemory {
  float* weights;  // then their gradients, in place
  float* kept;     // weights that survive dropout; kDropoutMargin rows before it are writable
  float* slopes;   // softcap's derivative
  float* staging;  // of bias, see bias_staging_size
};

inline void backward_block(const Problem& problem, const ScoreTerms& terms, const Band& band, const QueryPanel& panel,
                           const KeyBlock& block, const BiasGradient& dbias, const TileMemory& memory) {
  const bool partial = !panel.lanes.sees_all(block.first, block.count);
  const bool pairwise = partial && !(panel.finite && block.finite);
  const auto to_keys = pairwise ? add_visible_to_keys : add_to_keys;
  const bool dropout = problem.dropout_p > 0;
  const std::int64_t keys = block.count, width = panel.width;
  const ScoreTile tile{memory.weights, width, block.first, keys};

  const auto products = [&](Broadcast a, const float* lanes, std::int64_t dim, const auto& epilogue) {
    multiply_scores_of(panel, keys, band, partial, a, lanes, dim, tile.scores, epilogue);
  };

  if (terms.any()) {
    products(block.k, panel.q_lanes, problem.head_dim, Assign{});
    weigh_terms(problem, terms, tile, panel.lanes, panel.lse, memory.slopes, memory.staging);
  } else {
    products(block.k, panel.q_lanes, problem.head_dim, ToWeights{problem.softmax_scale, panel.lse});
  }
  if (partial) hide(tile, panel.lanes);
  if (partial && terms.softcap > 0) hide({memory.slopes, width, block.first, keys}, panel.lanes);
  if (dropout) keep_survivors(problem, tile, panel.lanes, memory.kept);
  to_keys(dropout ? memory.kept : tile.scores, width, keys, band, panel.dout_rows, problem.head_dim_v, block.dv,
          block.dv_stride);

  if (dropout) {
    const auto survival = static_cast<float>(1.0 / (1.0 - problem.dropout_p));
    products(block.v, panel.dout_lanes, problem.head_dim_v,
             ToDroppedScoreGradients{panel.delta, tile.scores, memory.kept, survival});
  } else {
    products(block.v, panel.dout_lanes, problem.head_dim_v, ToScoreGradients{panel.delta});
  }
  if (partial) hide(tile, panel.lanes);
  dbias.add(tile, panel.first, panel.count, memory.staging);
  if (terms.softcap > 0) multiply_by(tile, memory.slopes);
  to_keys(tile.scores, width, keys, band, panel.q_rows, problem.head_dim, block.dk, block.dk_stride);
  if (pairwise) return add_visible_to_queries(tile.scores, width, keys, band, block.k, problem.head_dim, panel.dq);
  add_to_queries(tile.scores, panel, keys, band, partial, block.k, problem.head_dim);
}

}  // namespace
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
