// cpu/values-inl.h: O += P·V where some lanes do not see all of the tile's keys. A hidden weight is 0, but 0·NaN is
// NaN: values that are not finite are taken out of the product and given to the lanes that see them.
#if defined(ONEPASS_CPU_VALUES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_VALUES_INL_H_
#undef ONEPASS_CPU_VALUES_INL_H_
#else
#define ONEPASS_CPU_VALUES_INL_H_
#endif

#include "cpu/segments-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

// Whether any of keys × dim values is NaN or infinite: 0·v summed stays 0 for finite ones.
inline HWY_NOINLINE bool all_finite(Broadcast v, std::int64_t keys, std::int64_t dim) {
  const FloatTag f;
  const Floats zero = hn::Zero(f);
  Floats sums = zero;
  float rest = 0.0f;
  for (std::int64_t k = 0; k < keys; ++k) {
    const float* const row = v.data + k * v.stride;
    std::int64_t d = 0;
    for (; d + lane_count() <= dim; d += lane_count()) sums = hn::MulAdd(zero, hn::LoadU(f, row + d), sums);
    for (; d < dim; ++d) rest += 0.0f * row[d];
  }
  return hn::AllTrue(f, hn::Eq(sums, zero)) && rest == 0.0f;
}

// dst = v with 0 for what is not finite; row stride dim.
inline void copy_finite(Broadcast v, std::int64_t keys, std::int64_t dim, float* dst) {
  for (std::int64_t k = 0; k < keys; ++k) {
    for (std::int64_t d = 0; d < dim; ++d) {
      const float value = v.data[k * v.stride + d];
      dst[k * dim + d] = std::isfinite(value) ? value : 0.0f;
    }
  }
}

// out[d][lane] += v[key][d]·p[key][lane] for the values that are not finite, in the lanes that see the key.
inline void add_not_finite(Broadcast v, const ScoreTile& weights, const Lanes& lanes, std::int64_t dim, float* out) {
  const FloatTag f;
  const IntTag n;
  for (std::int64_t k = 0; k < weights.keys; ++k) {
    for (std::int64_t d = 0; d < dim; ++d) {
      const float value = v.data[k * v.stride + d];
      if (std::isfinite(value)) continue;
      for (std::int64_t column = 0; column < weights.width; column += lane_count()) {
        const Ints begin = hn::Load(n, lanes.begin + column), end = hn::Load(n, lanes.end + column);
        const auto visible = hn::RebindMask(f, visible_lanes(begin, end, weights.first_key + k));
        float* const at = out + d * weights.width + column;
        const Floats before = hn::Load(f, at);
        const Floats p = hn::Load(f, weights.scores + k * weights.width + column);
        hn::Store(hn::IfThenElse(visible, hn::MulAdd(p, hn::Set(f, value), before), before), f, at);
      }
    }
  }
}

// out = out·rescale + Vᵀ·Pᵀ where hidden values may be anything; `finite` is room for keys × dim floats.
inline void add_values(Broadcast v, const ScoreTile& weights, const Segments& segments, const Lanes& lanes,
                       std::int64_t dim, float* out, float* rescale, float* finite) {
  if (lanes.sees_all(weights.first_key, weights.keys) || all_finite(v, weights.keys, dim)) {
    return multiply_segments(v, weights, segments, dim, out, rescale);
  }
  copy_finite(v, weights.keys, dim, finite);
  multiply_segments(Broadcast{finite, dim}, weights, segments, dim, out, rescale);
  add_not_finite(v, weights, lanes, dim, out);
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
