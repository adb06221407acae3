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

// Weights are 2^(exponent·score − shift) with exponent = unit·log2 e and shift = exponent·(largest score), rounded. The
// rounding is a factor common to all weights of the row, which cancels (the LSE is taken from the same shift), so one
// FMA does. Beyond this limit the factor could overflow; there the difference of scores comes first.
inline constexpr float kFusedLimit = 0x1p30f;

struct ColumnShift {
  Floats exponent;
  Floats largest;  // score; 0 where nothing has been seen, so that −inf − (−inf) does not arise
  Floats scaled;   // exponent·largest
};

// Turns the scores of one vector of lanes into weights and returns sum + Σ weights. kFused: every lane is below the
// limit.
template <bool kFused>
HWY_INLINE Floats weigh_column(const ScoreTile& tile, std::int64_t column, const ColumnShift& shift, Floats sum) {
  const FloatTag f;
  const auto fused_lanes = hn::Lt(hn::Abs(shift.scaled), hn::Set(f, kFusedLimit));
  float* HWY_RESTRICT at = tile.scores + column;
  for (std::int64_t k = 0; k < tile.keys; ++k, at += tile.width) {
    const Floats s = hn::Load(f, at);
    Floats x = hn::MulSub(s, shift.exponent, shift.scaled);
    if constexpr (!kFused) {
      x = hn::IfThenElse(fused_lanes, x, hn::Mul(hn::Sub(s, shift.largest), shift.exponent));
    }
    const Floats weight = exp2_floats(x);
    sum = hn::Add(sum, weight);
    hn::Store(weight, f, at);
  }
  return sum;
}

// Turns a tile of scores into weights, in place. `maximum` and `sum` (per lane) are those of the keys so far and are
// brought up to date; `rescale` becomes what earlier sums and outputs must be multiplied by: exactly 1 where the
// maximum stays.
inline HWY_NOINLINE void softmax_tile(const ScoreTile& tile, float unit, const float* tile_maximum, float* maximum,
                                      float* sum, float* rescale) {
  const FloatTag f;
  const Floats exponent = hn::Set(f, unit * kLog2E);
  for (std::int64_t column = 0; column < tile.width; column += lane_count()) {
    const Floats before = hn::Load(f, maximum + column);
    const Floats after = hn::Max(hn::Load(f, tile_maximum + column), before);
    const Floats largest = hn::IfThenZeroElse(hn::Eq(after, hn::Set(f, -kInfinity)), after);
    const ColumnShift shift{exponent, largest, hn::Mul(largest, exponent)};
    const auto fused_lanes = hn::Lt(hn::Abs(shift.scaled), hn::Set(f, kFusedLimit));
    const Floats moved = hn::IfThenElse(fused_lanes, hn::Sub(hn::Mul(before, exponent), shift.scaled),
                                        hn::Mul(hn::Sub(before, largest), exponent));
    const Floats factor = exp2_floats(moved);
    const Floats earlier = hn::Mul(hn::Load(f, sum + column), factor);
    const Floats total = hn::AllTrue(f, fused_lanes) ? weigh_column<true>(tile, column, shift, earlier)
                                                     : weigh_column<false>(tile, column, shift, earlier);
    hn::Store(after, f, maximum + column);
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
  constexpr double kLn2 = 0.693147180559945309;
  const float scaled = maximum * (unit * kLog2E);
  const double logit = std::fabs(scaled) < kFusedLimit ? double{scaled} * kLn2 : double{maximum} * double{unit};
  if (sink == nullptr) return {1.0f / sum, static_cast<float>(logit + double{std::log(sum)})};
  const double largest = std::max(double{*sink}, logit);
  const double weight = std::exp(logit - largest), total = sum * weight + std::exp(*sink - largest);
  return {static_cast<float>(weight / total), static_cast<float>(largest + std::log(total))};
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
