// cpu/backward_score-inl.h: passes over one tile of scores or of their gradients, (key, lane), for what the products'
// epilogues do not cover: score terms, hidden keys, dropout, softcap's derivative and the gradient of bias.
#if defined(ONEPASS_CPU_BACKWARD_SCORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_BACKWARD_SCORE_INL_H_
#undef ONEPASS_CPU_BACKWARD_SCORE_INL_H_
#else
#define ONEPASS_CPU_BACKWARD_SCORE_INL_H_
#endif

#include "cpu/dropout-inl.h"
#include "cpu/score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
namespace {

// Calls f(vector address, first key of the tile + row, column) over a tile.
template <class F>
HWY_INLINE void for_each_vector(const ScoreTile& tile, const F& f) {
  for (std::int64_t row = 0; row < tile.keys; ++row) {
    for (std::int64_t column = 0; column < tile.width; column += lane_count()) {
      f(tile.scores + row * tile.width + column, row, column);
    }
  }
}

// slopes = 1 − (score/cap)², softcap's derivative, from capped scores.
HWY_NOINLINE void softcap_slopes(const ScoreTile& tile, float softcap, float* slopes) {
  const FloatTag f;
  const Floats inverse = hn::Set(f, 1.0f / softcap), one = hn::Set(f, 1.0f);
  for_each_vector(tile, [&](const float* at, std::int64_t row, std::int64_t column) {
    const Floats t = hn::Mul(hn::Load(f, at), inverse);
    hn::Store(hn::NegMulAdd(t, t, one), f, slopes + row * tile.width + column);
  });
}

HWY_NOINLINE void multiply_by(const ScoreTile& tile, const float* factors) {
  const FloatTag f;
  for_each_vector(tile, [&](float* at, std::int64_t row, std::int64_t column) {
    hn::Store(hn::Mul(hn::Load(f, at), hn::Load(f, factors + row * tile.width + column)), f, at);
  });
}

// Products q·k → weights, where the logit has terms of its own. `slopes` receives softcap's derivative.
inline void weigh_terms(const Problem& problem, const ScoreTerms& terms, const ScoreTile& tile, const Lanes& lanes,
                        const float* lse, float* slopes, float* bias_staging) {
  scale_scores(tile, terms);
  if (terms.softcap > 0) softcap_slopes(tile, terms.softcap, slopes);
  if (terms.alibi) add_alibi(tile, terms, lanes);
  if (terms.bias) add_bias(tile, problem.bias, lanes, bias_staging);
  const FloatTag f;
  for_each_vector(tile, [&](float* at, std::int64_t, std::int64_t column) {
    const Floats exponent = hn::Sub(hn::Load(f, at), hn::Load(f, lse + column));
    hn::Store(exp2_floats(hn::Mul(exponent, hn::Set(f, kLog2E))), f, at);
  });
}

// 0 where a lane does not see a key, whatever stood there.
HWY_NOINLINE void hide(const ScoreTile& tile, const Lanes& lanes) {
  const FloatTag f;
  const IntTag n;
  for_each_vector(tile, [&](float* at, std::int64_t row, std::int64_t column) {
    const auto visible =
        visible_lanes(hn::Load(n, lanes.begin + column), hn::Load(n, lanes.end + column), tile.first_key + row);
    hn::Store(hn::IfThenElseZero(hn::RebindMask(f, visible), hn::Load(f, at)), f, at);
  });
}

// Rows before the tile's first that dropout may also touch: it draws for four keys at a time.
inline constexpr std::int64_t kDropoutMargin = 3;

// kept = weights where they survive, else 0. Has kDropoutMargin rows before its first.
inline void keep_survivors(const Problem& problem, const ScoreTile& tile, const Lanes& lanes, float* kept) {
  std::copy_n(tile.scores, tile.keys * tile.width, kept);
  const std::int64_t margin = tile.first_key % 4;
  drop_weights(problem, {kept - margin * tile.width, tile.width, tile.first_key - margin, tile.keys + margin}, lanes);
}

// Adds a tile of score gradients to dbias, whose broadcast dimensions sum. staging: as for add_bias.
class BiasGradient {
 public:
  BiasGradient(const BiasOperand& dbias, std::int64_t batch, std::int64_t head)
      : query_stride_(dbias.query_stride),
        key_stride_(dbias.key_stride),
        plane_(dbias ? static_cast<float*>(dbias.data) + batch * dbias.batch_stride + head * dbias.head_stride
                     : nullptr) {}

  void add(const ScoreTile& tile, std::int64_t first_query, std::int64_t queries, float* staging) const {
    if (plane_ == nullptr) return;
    if (query_stride_ == 0) return add_columns(tile, queries);
    add_rows(tile, first_query, queries, staging);
  }

 private:
  // One value a key, or one for all: the sum over the tile's queries.
  HWY_NOINLINE void add_columns(const ScoreTile& tile, std::int64_t queries) const {
    const FloatTag f;
    Floats sum = hn::Zero(f);
    for (std::int64_t row = 0; row < tile.keys; ++row) {
      for (std::int64_t column = 0; column < queries; column += lane_count()) {
        const auto used = hn::FirstN(f, static_cast<std::size_t>(std::min(queries - column, lane_count())));
        sum = hn::Add(sum, hn::IfThenElseZero(used, hn::Load(f, tile.scores + row * tile.width + column)));
      }
      if (key_stride_ == 0) continue;
      plane_[(tile.first_key + row) * key_stride_] += hn::GetLane(hn::SumOfLanes(f, sum));
      sum = hn::Zero(f);
    }
    if (key_stride_ == 0) *plane_ += hn::GetLane(hn::SumOfLanes(f, sum));
  }

  HWY_NOINLINE void add_rows(const ScoreTile& tile, std::int64_t first_query, std::int64_t queries,
                             float* staging) const {
    const std::int64_t square = lane_count();
    for (std::int64_t column = 0; column < queries; column += square) {
      for (std::int64_t row = 0; row < tile.keys; row += square) {
        transpose_square(tile.scores + row * tile.width + column, tile.width, staging, square);
        const std::int64_t keys = std::min(square, tile.keys - row);
        for (std::int64_t i = 0; i < std::min(square, queries - column); ++i) {
          float* const to = plane_ + (first_query + column + i) * query_stride_ + (tile.first_key + row) * key_stride_;
          add_row(staging + i * square, keys, to);
        }
      }
    }
  }

  void add_row(const float* gradients, std::int64_t keys, float* to) const {
    if (key_stride_ == 1 && keys == lane_count()) {
      return store_floats(hn::Add(load_floats(to), load_floats(gradients)), to);
    }
    for (std::int64_t k = 0; k < keys; ++k) to[k * key_stride_] += gradients[k];
  }

  std::int64_t query_stride_, key_stride_;
  float* plane_;
};

}  // namespace
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
