// cpu/score-inl.h: from products q·k to logits. A tile is lane-major, scores[key][lane]. Each term is a pass of its own
// over the tile, which lies in L1; a call without terms and a tile without hidden keys take none.
#if defined(ONEPASS_CPU_SCORE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_SCORE_INL_H_
#undef ONEPASS_CPU_SCORE_INL_H_
#else
#define ONEPASS_CPU_SCORE_INL_H_
#endif

#include <cmath>
#include <limits>

#include "cpu/lanes.h"
#include "cpu/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kLog2E = 1.44269504088896341f;

// A tile of scores of keys [first_key, first_key + keys) of the sequence; width = lanes of the panel.
struct ScoreTile {
  float* scores;
  std::int64_t width;
  std::int64_t first_key, keys;  // first_key is a multiple of 4
};

// How the raw product becomes a logit. Without terms the tile keeps q·k and softmax scales inside its exponent, so
// equal products stay equal; a term turns the tile into logits.
struct ScoreTerms {
  float query_factor;  // multiplies Q as it is packed: the sign of the scale, or 0
  float scale;         // > 0
  float softcap;       // 0: none
  bool alibi, bias;
  bool alibi_zero_for_future;

  explicit ScoreTerms(const Problem& p)
      : query_factor(p.softmax_scale > 0   ? 1.0f
                     : p.softmax_scale < 0 ? -1.0f
                                           : 0.0f),
        scale(p.softmax_scale == 0 ? 1.0f : std::fabs(p.softmax_scale)),
        softcap(static_cast<float>(p.softcap)),
        alibi(p.alibi_slopes != nullptr),
        bias(p.bias),
        alibi_zero_for_future(p.alibi_zero_for_future) {
    if (std::isnan(p.softmax_scale)) query_factor = p.softmax_scale;
  }

  bool any() const { return softcap > 0 || alibi || bias; }
  // Logits = unit·tile.
  float unit() const { return any() ? 1.0f : scale; }
};

// tanh to 1.2e-7 relative: odd polynomial below 0.625 (relative minimax, 4.4e-9), 1 − 2e/(1 + e) with e = e^(−2|x|)
// above.
HWY_INLINE Floats tanh_floats(Floats x) {
  const FloatTag f;
  const Floats size = hn::Abs(x), square = hn::Mul(x, x), one = hn::Set(f, 1.0f);
  Floats p = hn::Set(f, -0x1.75e1b6p-8f);
  p = hn::MulAdd(p, square, hn::Set(f, 0x1.522696p-6f));
  p = hn::MulAdd(p, square, hn::Set(f, -0x1.b83c5ap-5f));
  p = hn::MulAdd(p, square, hn::Set(f, 0x1.110726p-3f));
  p = hn::MulAdd(p, square, hn::Set(f, -0x1.555532p-2f));
  const Floats small = hn::MulAdd(hn::Mul(x, square), p, x);
  const Floats e = exp2_floats(hn::Mul(size, hn::Set(f, -2.0f * kLog2E)));
  const Floats large = hn::Sub(one, hn::Div(hn::Add(e, e), hn::Add(one, e)));
  return hn::IfThenElse(hn::Lt(size, hn::Set(f, 0.625f)), small, hn::CopySign(large, x));
}

// scores = cap·tanh(scale·scores/cap), or scale·scores without a cap.
inline HWY_NOINLINE void scale_scores(const ScoreTile& tile, const ScoreTerms& terms) {
  const FloatTag f;
  const Floats scale = hn::Set(f, terms.softcap > 0 ? terms.scale / terms.softcap : terms.scale);
  const Floats cap = hn::Set(f, terms.softcap);
  const std::int64_t count = tile.keys * tile.width, lanes = lane_count();
  if (terms.softcap > 0) {
    for (std::int64_t i = 0; i < count; i += lanes) {
      const Floats s = hn::Mul(hn::Load(f, tile.scores + i), scale);
      hn::Store(hn::Mul(cap, tanh_floats(s)), f, tile.scores + i);
    }
  } else {
    for (std::int64_t i = 0; i < count; i += lanes) {
      hn::Store(hn::Mul(hn::Load(f, tile.scores + i), scale), f, tile.scores + i);
    }
  }
}

// scores −= slope·|i' − key|, or nothing for future keys.
inline HWY_NOINLINE void add_alibi(const ScoreTile& tile, const ScoreTerms& terms, const Lanes& lanes) {
  const FloatTag f;
  const IntTag n;
  for (std::int64_t column = 0; column < tile.width; column += lane_count()) {
    const Floats slope = hn::Load(f, lanes.slope + column);
    const Ints center = hn::Load(n, lanes.center + column);
    for (std::int64_t k = 0; k < tile.keys; ++k) {
      float* const at = tile.scores + k * tile.width + column;
      const Ints key = hn::Set(n, static_cast<std::int32_t>(tile.first_key + k));
      const Floats behind = hn::ConvertTo(f, hn::Sub(center, key));
      const Floats distance = terms.alibi_zero_for_future ? hn::Max(behind, hn::Zero(f)) : hn::Abs(behind);
      hn::Store(hn::NegMulAdd(slope, distance, hn::Load(f, at)), f, at);
    }
  }
}

// Bias of `keys` keys of one query row as floats.
template <class B>
HWY_INLINE void load_bias_row(const std::byte* row, std::int64_t first_key, std::int64_t keys, std::int64_t key_stride,
                              float* dst) {
  const B* const src = reinterpret_cast<const B*>(row) + first_key * key_stride;
  if (key_stride == 1) return convert_row(src, keys, dst);
  for (std::int64_t k = 0; k < keys; ++k) dst[k] = to_float(src[k * key_stride]);
}

// scores += bias. A row's keys lie along memory and queries along lanes, so squares are transposed, unless every lane
// reads the same row (a padding mask). staging: (lane_count() + 1)·padded(keys) + lane_count()² floats.
template <class B>
HWY_NOINLINE void add_typed_bias(const ScoreTile& tile, const BiasOperand& bias, const Lanes& lanes, float* staging) {
  const FloatTag f;
  const std::int64_t square = lane_count(), ld = padded(tile.keys);
  const bool same =
      std::all_of(lanes.bias, lanes.bias + tile.width, [&](const std::byte* row) { return row == lanes.bias[0]; });
  if (same) {
    load_bias_row<B>(lanes.bias[0], tile.first_key, tile.keys, bias.key_stride, staging);
    for (std::int64_t k = 0; k < tile.keys; ++k) {
      const Floats term = hn::Set(f, staging[k]);
      for (std::int64_t column = 0; column < tile.width; column += square) {
        float* const at = tile.scores + k * tile.width + column;
        hn::Store(hn::Add(hn::Load(f, at), term), f, at);
      }
    }
    return;
  }
  float* const transposed = staging + square * ld;
  for (std::int64_t column = 0; column < tile.width; column += square) {
    for (std::int64_t lane = 0; lane < square; ++lane) {
      load_bias_row<B>(lanes.bias[column + lane], tile.first_key, tile.keys, bias.key_stride, staging + lane * ld);
    }
    for (std::int64_t first = 0; first < tile.keys; first += square) {
      transpose_square(staging + first, ld, transposed, square);
      for (std::int64_t k = first; k < std::min(first + square, tile.keys); ++k) {
        float* const at = tile.scores + k * tile.width + column;
        hn::Store(hn::Add(hn::Load(f, at), hn::Load(f, transposed + (k - first) * square)), f, at);
      }
    }
  }
}
inline void add_bias(const ScoreTile& tile, const BiasOperand& bias, const Lanes& lanes, float* staging) {
  switch (bias.dtype) {
    case DType::kFloat16: add_typed_bias<Half>(tile, bias, lanes, staging); break;
    case DType::kBFloat16: add_typed_bias<BFloat16>(tile, bias, lanes, staging); break;
    default: add_typed_bias<float>(tile, bias, lanes, staging); break;
  }
}
HWY_INLINE std::int64_t bias_staging_size(std::int64_t keys) {
  return lane_count() * padded(keys) + lane_count() * lane_count();
}

// Lanes of one vector that see `key`.
HWY_INLINE hn::Mask<IntTag> visible_lanes(Ints begin, Ints end, std::int64_t key) {
  const Ints k = hn::Set(IntTag(), static_cast<std::int32_t>(key));
  return hn::AndNot(hn::Gt(begin, k), hn::Gt(end, k));
}

// Hides what a lane does not see (−inf, whatever the product was) and takes the column maxima anew.
inline HWY_NOINLINE void mask_scores(const ScoreTile& tile, const Lanes& lanes, float* maximum) {
  const FloatTag f;
  const IntTag n;
  const Floats hidden = hn::Set(f, -kInfinity);
  for (std::int64_t column = 0; column < tile.width; column += lane_count()) {
    const Ints begin = hn::Load(n, lanes.begin + column), end = hn::Load(n, lanes.end + column);
    Floats largest = hidden;
    for (std::int64_t k = 0; k < tile.keys; ++k) {
      float* const at = tile.scores + k * tile.width + column;
      const auto visible = hn::RebindMask(f, visible_lanes(begin, end, tile.first_key + k));
      const Floats s = hn::IfThenElse(visible, hn::Load(f, at), hidden);
      hn::Store(s, f, at);
      largest = hn::Max(s, largest);
    }
    hn::Store(largest, f, maximum + column);
  }
}

// Products → logits and their column maxima. `maximum` comes in with the maxima of the products.
inline void finish_scores(const Problem& problem, const ScoreTerms& terms, const ScoreTile& tile, const Lanes& lanes,
                          float* maximum, float* bias_staging) {
  if (terms.any()) scale_scores(tile, terms);
  if (terms.alibi) add_alibi(tile, terms, lanes);
  if (terms.bias) add_bias(tile, problem.bias, lanes, bias_staging);
  if (terms.any() || !lanes.sees_all(tile.first_key, tile.keys)) mask_scores(tile, lanes, maximum);
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
