// cpu/quantize-inl.h: rows of floats → stored elements. Divisions and roundings are IEEE ones in float32, so that every
// backend stores the same codes.
#if defined(ONEPASS_CPU_QUANTIZE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_QUANTIZE_INL_H_
#undef ONEPASS_CPU_QUANTIZE_INL_H_
#else
#define ONEPASS_CPU_QUANTIZE_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/float8.h"
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

// int8's scale: max(absmax/127, 1e-5); NaN when a value is not finite.
HWY_INLINE float scale_of(const float* HWY_RESTRICT x, std::int64_t count) {
  const FloatTag f;
  Floats largest = hn::Zero(f), poison = hn::Zero(f);  // poison: Σ 0·x
  std::int64_t i = 0;
  for (; i + lane_count() <= count; i += lane_count()) {
    const Floats v = hn::LoadU(f, x + i);
    largest = hn::Max(largest, hn::Abs(v));
    poison = hn::MulAdd(hn::Zero(f), v, poison);
  }
  float most = hn::GetLane(hn::MaxOfLanes(f, largest)), sum = hn::GetLane(hn::SumOfLanes(f, poison));
  for (; i < count; ++i) {
    most = std::max(most, std::fabs(x[i]));
    sum += 0.0f * x[i];
  }
  return sum == 0.0f ? std::max(most / 127.0f, 1e-5f) : std::numeric_limits<float>::quiet_NaN();
}

// dst = round(x / scale), at most ±127; 0 for NaN.
HWY_INLINE void quantize(const float* HWY_RESTRICT x, std::int64_t count, float scale, std::int8_t* HWY_RESTRICT dst) {
  const FloatTag f;
  const hn::Rebind<std::int8_t, FloatTag> bytes;
  const Floats limit = hn::Set(f, 127.0f), divisor = hn::Set(f, scale);
  std::int64_t i = 0;
  for (; i + lane_count() <= count; i += lane_count()) {
    const Floats q = hn::Div(hn::LoadU(f, x + i), divisor);
    const Floats clamped = hn::Max(hn::Min(q, limit), hn::Neg(limit));
    const auto codes = hn::NearestInt(hn::IfThenZeroElse(hn::IsNaN(q), clamped));
    hn::StoreU(hn::DemoteTo(bytes, codes), bytes, dst + i);
  }
  for (; i < count; ++i) {
    const float q = x[i] / scale;
    dst[i] = std::isnan(q) ? std::int8_t{0} : static_cast<std::int8_t>(std::nearbyint(std::clamp(q, -127.0f, 127.0f)));
  }
}

// The codes of core/float8.h, in the low bytes. kNan: the code of NaN.
template <int kMantissa, int kBias, std::uint32_t kNan>
HWY_INLINE hn::Vec<WordTag> float8_codes(Floats x, float largest) {
  const FloatTag f;
  const WordTag w;
  constexpr int kDropped = 23 - kMantissa;
  constexpr std::uint32_t kRebias = static_cast<std::uint32_t>(127 - kBias) << kMantissa;
  const Floats smallest_normal = hn::BitCast(f, hn::Set(w, static_cast<std::uint32_t>(128 - kBias) << 23));
  const auto unit = hn::Set(w, static_cast<std::uint32_t>(128 - kBias - kMantissa + 23) << 23);
  const Floats size = hn::Min(hn::Abs(x), hn::Set(f, largest));
  const auto bits = hn::BitCast(w, size);
  const auto odd = hn::And(hn::ShiftRight<kDropped>(bits), hn::Set(w, 1u));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(w, (1u << (kDropped - 1)) - 1u)));
  const auto normal = hn::Sub(hn::ShiftRight<kDropped>(rounded), hn::Set(w, kRebias));
  const auto subnormal = hn::Sub(hn::BitCast(w, hn::Add(size, hn::BitCast(f, unit))), unit);
  const auto code = hn::IfThenElse(hn::RebindMask(w, hn::Lt(size, smallest_normal)), subnormal, normal);
  const auto kept = hn::IfThenElse(hn::RebindMask(w, hn::IsNaN(x)), hn::Set(w, kNan), code);
  return hn::Or(kept, hn::And(hn::ShiftRight<24>(hn::BitCast(w, x)), hn::Set(w, 0x80u)));
}

// dst = x / scale, cast.
template <class T>
HWY_INLINE void quantize(const float* HWY_RESTRICT x, std::int64_t count, float scale, T* HWY_RESTRICT dst) {
  if constexpr (sizeof(T) == 1) {
    const FloatTag f;
    const hn::Rebind<std::uint8_t, FloatTag> bytes;
    std::int64_t i = 0;
    for (; i + lane_count() <= count; i += lane_count()) {
      const Floats q = hn::Div(hn::LoadU(f, x + i), hn::Set(f, scale));
      hn::Vec<WordTag> codes;
      if constexpr (std::is_same_v<T, Float8E4M3>) {
        codes = float8_codes<3, 7, 0x7F>(q, 448.0f);
      } else {
        codes = float8_codes<2, 15, 0x7E>(q, 57344.0f);
      }
      hn::StoreU(hn::U8FromU32(codes), bytes, reinterpret_cast<std::uint8_t*>(dst + i));
    }
    for (; i < count; ++i) dst[i] = from_float<T>(x[i] / scale);
  } else {
    store_row(x, count, dst);  // a float cache has no scales
  }
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
