// cpu/softmax-inl.h: online softmax along lanes (Milakov & Gimelshein 2018): one running maximum and sum per query.
#if defined(ONEPASS_CPU_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_SOFTMAX_INL_H_
#undef ONEPASS_CPU_SOFTMAX_INL_H_
#else
#define ONEPASS_CPU_SOFTMAX_INL_H_
#endif

#include "cpu/score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

// Turns a tile of scores into weights e^(unit·(score − maximum)), in place. `maximum` and `sum` (per lane) are those of
// the keys so far and are brought up to date; `rescale` becomes what earlier sums and outputs must be multiplied by.
// The difference is taken before the scale, so that the largest score weighs exactly 1 however large it is.
inline HWY_NOINLINE void softmax_tile(const ScoreTile& tile, float unit, const float* tile_maximum, float* maximum,
                                      float* sum, float* rescale) {
  const FloatTag f;
  const Floats exponent = hn::Set(f, unit * kLog2E);
  for (std::int64_t column = 0; column < tile.width; column += lane_count()) {
    const Floats before = hn::Load(f, maximum + column);
    const Floats largest = hn::Max(hn::Load(f, tile_maximum + column), before);
    // Nothing seen yet: subtract 0, so that −inf − (−inf) does not arise and every weight becomes 0.
    const Floats shift = hn::IfThenZeroElse(hn::Eq(largest, hn::Set(f, -kInfinity)), largest);
    const Floats factor = exp2_floats(hn::Mul(hn::Sub(before, shift), exponent));
    Floats total = hn::Mul(hn::Load(f, sum + column), factor);
    float* at = tile.scores + column;
    for (std::int64_t k = 0; k < tile.keys; ++k, at += tile.width) {
      const Floats weight = exp2_floats(hn::Mul(hn::Sub(hn::Load(f, at), shift), exponent));
      total = hn::Add(total, weight);
      hn::Store(weight, f, at);
    }
    hn::Store(largest, f, maximum + column);
    hn::Store(total, f, sum + column);
    hn::Store(factor, f, rescale + column);
  }
}

// What the row's state comes to in the end.
struct RowResult {
  float factor;  // of the accumulated output
  float lse;     // natural logarithm
};

// `sink` is null without one: an extra logit that takes weight and gives no value. A row that saw nothing (sum 0) is
// empty, sink or not.
inline RowResult finish_row(float maximum, float sum, float unit, const float* sink) {
  if (sum == 0.0f) return {0.0f, -kInfinity};
  const float logit = maximum * unit;
  if (sink == nullptr) return {1.0f / sum, logit + std::log(sum)};
  const float largest = std::max(*sink, logit);
  const float weight = std::exp(logit - largest), total = sum * weight + std::exp(*sink - largest);
  return {weight / total, largest + std::log(total)};
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
