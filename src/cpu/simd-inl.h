// cpu/simd-inl.h: the vector type of the kernels, element conversion of rows, and 2^x. Included once per tier.
#if defined(ONEPASS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_SIMD_INL_H_
#undef ONEPASS_CPU_SIMD_INL_H_
#else
#define ONEPASS_CPU_SIMD_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/half.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using IntTag = hn::RebindToSigned<FloatTag>;
using WordTag = hn::RebindToUnsigned<FloatTag>;
using Floats = hn::Vec<FloatTag>;
using Ints = hn::Vec<IntTag>;

// Lanes of a vector: a constant but on SVE.
HWY_INLINE std::int64_t lane_count() { return static_cast<std::int64_t>(hn::Lanes(FloatTag())); }

// fp16 conversion in hardware: everywhere but on the x86 tiers before AVX2 (F16C).
#if HWY_TARGET == HWY_SSSE3 || HWY_TARGET == HWY_SSE4
inline constexpr bool kHasHalfConversion = false;
#else
inline constexpr bool kHasHalfConversion = true;
#endif

// One vector of elements at p as float. Reads lane_count() elements.
HWY_INLINE Floats load_floats(const float* p) { return hn::LoadU(FloatTag(), p); }
HWY_INLINE Floats load_floats(const BFloat16* p) {
  const hn::Rebind<std::uint16_t, FloatTag> half_words;
  const auto bits = hn::PromoteTo(WordTag(), hn::LoadU(half_words, reinterpret_cast<const std::uint16_t*>(p)));
  return hn::BitCast(FloatTag(), hn::ShiftLeft<16>(bits));
}
HWY_INLINE Floats load_floats(const Half* p) {
  if constexpr (kHasHalfConversion) {
    const hn::Rebind<hwy::float16_t, FloatTag> halves;
    return hn::PromoteTo(FloatTag(), hn::LoadU(halves, reinterpret_cast<const hwy::float16_t*>(p)));
  } else {
    HWY_ALIGN float converted[HWY_MAX_BYTES / sizeof(float)];
    for (std::int64_t i = 0; i < lane_count(); ++i) converted[i] = to_float(p[i]);
    return hn::Load(FloatTag(), converted);
  }
}

// Rounds to nearest even and writes lane_count() elements at p; NaN stays NaN.
HWY_INLINE void store_floats(Floats v, float* p) { hn::StoreU(v, FloatTag(), p); }
HWY_INLINE void store_floats(Floats v, BFloat16* p) {
  const WordTag words;
  const hn::Rebind<std::uint16_t, FloatTag> half_words;
  const auto bits = hn::BitCast(words, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(words, 1u));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(words, 0x7FFFu)));
  const auto quiet = hn::Or(bits, hn::Set(words, 0x400000u));
  const auto kept = hn::IfThenElse(hn::RebindMask(words, hn::IsNaN(v)), quiet, rounded);
  hn::StoreU(hn::TruncateTo(half_words, hn::ShiftRight<16>(kept)), half_words, reinterpret_cast<std::uint16_t*>(p));
}
HWY_INLINE void store_floats(Floats v, Half* p) {
  if constexpr (kHasHalfConversion) {
    const hn::Rebind<hwy::float16_t, FloatTag> halves;
    hn::StoreU(hn::DemoteTo(halves, v), halves, reinterpret_cast<hwy::float16_t*>(p));
  } else {
    HWY_ALIGN float values[HWY_MAX_BYTES / sizeof(float)];
    hn::Store(v, FloatTag(), values);
    for (std::int64_t i = 0; i < lane_count(); ++i) p[i] = from_float<Half>(values[i]);
  }
}

// dst[0, count) = src as float. Touches nothing past `count` on either side.
template <class T>
HWY_INLINE void convert_row(const T* HWY_RESTRICT src, std::int64_t count, float* HWY_RESTRICT dst) {
  std::int64_t i = 0;
  for (; i + lane_count() <= count; i += lane_count()) store_floats(load_floats(src + i), dst + i);
  for (; i < count; ++i) dst[i] = to_float(src[i]);
}
template <class T>
HWY_INLINE void store_row(const float* HWY_RESTRICT src, std::int64_t count, T* HWY_RESTRICT dst) {
  std::int64_t i = 0;
  for (; i + lane_count() <= count; i += lane_count()) store_floats(load_floats(src + i), dst + i);
  for (; i < count; ++i) dst[i] = from_float<T>(src[i]);
}

// rows × count elements with any row stride → floats with row stride ld.
template <class T>
HWY_NOINLINE void convert_rows(const T* src, std::int64_t src_stride, std::int64_t rows, std::int64_t count, float* dst,
                               std::int64_t ld) {
  for (std::int64_t r = 0; r < rows; ++r) convert_row(src + r * src_stride, count, dst + r * ld);
}

// 2^x for x ≤ 126 or so, to 1.6e-7 relative; exactly 1 at 0, exactly 0 at and below −127 (so for −inf); NaN stays.
HWY_INLINE Floats exp2_floats(Floats x) {
  const FloatTag f;
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  // AVX-512 splits off the fraction r in [0, 1) (VREDUCEPS, rounding down; ±inf gives 0) and multiplies by 2^⌊x⌋
  // (VSCALEFPS) in one instruction each. Polynomial: relative minimax of 2^r (9.2e-8), exact at 0 and at 1, so that
  // there is no step just below 0.
  constexpr float c[] = {0x1.62e4c8p-1f, 0x1.ebd8a0p-3f, 0x1.c94440p-5f, 0x1.269deep-7f, 0x1.eca6f0p-10f};
  const Floats r{_mm512_reduce_ps(x.raw, 1)};
#else
  // Adding 1.5·2²³ rounds to an integer in the low bits, so r lies in [−½, ½]; with 127 more these bits are the
  // exponent field of the power. The order of Max keeps NaN: x86 returns the second operand when one is NaN, others NaN
  // anyway. Polynomial: relative minimax of 2^r with constant term 1 (9.1e-8).
  constexpr float c[] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f};
  const Floats magic = hn::Set(f, 0x1.8p23f + 127.0f);
  x = hn::Max(hn::Set(f, -127.0f), x);
  const Floats rounded = hn::Add(x, magic);
  const Floats power = hn::BitCast(f, hn::ShiftLeft<23>(hn::BitCast(WordTag(), rounded)));  // at −127: +0
  const Floats r = hn::Sub(x, hn::Sub(rounded, magic));
#endif
  Floats p = hn::MulAdd(hn::Set(f, c[4]), r, hn::Set(f, c[3]));
  p = hn::MulAdd(p, r, hn::Set(f, c[2]));
  p = hn::MulAdd(p, r, hn::Set(f, c[1]));
  p = hn::MulAdd(p, r, hn::Set(f, c[0]));
  p = hn::MulAdd(p, r, hn::Set(f, 1.0f));
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  return Floats{_mm512_scalef_ps(p.raw, x.raw)};
#else
  return hn::Mul(p, power);  // a product, so that NaN in p stays
#endif
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
