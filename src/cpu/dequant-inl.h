// cpu/dequant-inl.h: rows of a cache as floats: whole rows in their own order, and the fast unpacking of 64-byte
// chunks.
#if defined(ONEPASS_CPU_DEQUANT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DEQUANT_INL_H_
#undef ONEPASS_CPU_DEQUANT_INL_H_
#else
#define ONEPASS_CPU_DEQUANT_INL_H_
#endif

#include "core/float8.h"
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

using ByteVector = hn::Repartition<std::uint8_t, FloatTag>;
using HalfWords = hn::Repartition<std::uint16_t, FloatTag>;

// load_floats of simd-inl.h for the other storage types: lane_count() elements in their order.
HWY_INLINE Floats load_floats(const std::int8_t* p) {
  const hn::Rebind<std::int8_t, FloatTag> bytes;
  return hn::ConvertTo(FloatTag(), hn::PromoteTo(IntTag(), hn::LoadU(bytes, p)));
}
template <class T>
HWY_INLINE Floats load_scalars(const T* p) {
  HWY_ALIGN float converted[HWY_MAX_BYTES / sizeof(float)];
  for (std::int64_t i = 0; i < lane_count(); ++i) converted[i] = to_float(p[i]);
  return hn::Load(FloatTag(), converted);
}
HWY_INLINE Floats load_floats(const Float8E5M2* p) {
  if constexpr (!kHasHalfConversion) return load_scalars(p);
  const hn::Rebind<std::uint8_t, FloatTag> bytes;
  const hn::Rebind<std::uint16_t, FloatTag> words;
  const hn::Rebind<hwy::float16_t, FloatTag> halves;
  const auto codes = hn::PromoteTo(words, hn::LoadU(bytes, reinterpret_cast<const std::uint8_t*>(p)));
  return hn::PromoteTo(FloatTag(), hn::BitCast(halves, hn::ShiftLeft<8>(codes)));
}
HWY_INLINE Floats load_floats(const Float8E4M3* p) {
  if constexpr (!kHasHalfConversion) return load_scalars(p);
  const hn::Rebind<std::uint8_t, FloatTag> bytes;
  const hn::Rebind<std::uint16_t, FloatTag> words;
  const hn::Rebind<hwy::float16_t, FloatTag> halves;
  const auto codes = hn::PromoteTo(words, hn::LoadU(bytes, reinterpret_cast<const std::uint8_t*>(p)));
  const auto low = hn::Set(words, std::uint16_t{0x7F}), size = hn::And(codes, low);
  const auto sign = hn::ShiftLeft<8>(hn::Xor(codes, size));
  const auto nan = hn::Set(words, std::uint16_t{0x7E00});
  const auto half = hn::Or(hn::IfThenElse(hn::Eq(size, low), nan, hn::ShiftLeft<7>(size)), sign);
  return hn::Mul(hn::PromoteTo(FloatTag(), hn::BitCast(halves, half)), hn::Set(FloatTag(), 256.0f));
}

#if !HWY_HAVE_SCALABLE
// How a chunk (one full vector register of stored elements) becomes kVectors vectors of floats, cheapest first: the
// order of channels is whatever falls out. Position s of a chunk holds channel channel(s); its value is factor · what
// load gives. The other operand (Q, or the finished O) is permuted to match, once.
template <class T>
struct Unpack {
  static constexpr int kVectors = sizeof(float) / sizeof(T);
  static constexpr float kFactor = 1.0f;
  static constexpr bool kFast = true;
  static std::int64_t channel(std::int64_t s) { return s; }
  static HWY_INLINE void load(const T* p, Floats* HWY_RESTRICT v) {
    HWY_UNROLL(4)
    for (int i = 0; i < kVectors; ++i) v[i] = load_floats(p + i * lane_count());
  }
  // Vectors 2·kHalf and 2·kHalf + 1 of a chunk of four.
  template <int kHalf>
  static HWY_INLINE void load_half(const T* p, Floats* HWY_RESTRICT v) {
    v[0] = load_floats(p + 2 * kHalf * lane_count());
    v[1] = load_floats(p + (2 * kHalf + 1) * lane_count());
  }
};

template <>
struct Unpack<Half> {
  static constexpr int kVectors = 2;
  static constexpr float kFactor = 1.0f;
  static constexpr bool kFast = kHasHalfConversion;
  static std::int64_t channel(std::int64_t s) { return s; }
  static HWY_INLINE void load(const Half* p, Floats* HWY_RESTRICT v) {
    v[0] = load_floats(p);
    v[1] = load_floats(p + lane_count());
  }
};

// A word holds two bfloat16: shifted up it is the even one as a float, masked the odd one.
template <>
struct Unpack<BFloat16> {
  static constexpr int kVectors = 2;
  static constexpr float kFactor = 1.0f;
  static constexpr bool kFast = true;
  static std::int64_t channel(std::int64_t s) {
    const std::int64_t lanes = lane_count();
    return 2 * (s % lanes) + s / lanes;
  }
  static HWY_INLINE void load(const BFloat16* p, Floats* HWY_RESTRICT v) {
    const WordTag words;
    const auto pairs = hn::LoadU(words, reinterpret_cast<const std::uint32_t*>(p));
    v[0] = hn::BitCast(FloatTag(), hn::ShiftLeft<16>(pairs));
    v[1] = hn::BitCast(FloatTag(), hn::And(pairs, hn::Set(words, 0xFFFF0000u)));
  }
};

// Both 8-bit floats go through float16, two bytes of a 16-bit lane at a time: even bytes, then odd bytes.
template <class T, class Self>
struct UnpackFloat8 {
  static constexpr int kVectors = 4;
  static constexpr bool kFast = kHasHalfConversion;
  static std::int64_t channel(std::int64_t s) {
    const std::int64_t words = 2 * lane_count();
    return 2 * (s % words) + s / words;
  }
  static HWY_INLINE void load(const T* p, Floats* HWY_RESTRICT v) {
    if constexpr (HWY_TARGET == HWY_AVX2 && Self::kOneShift) {
      load_half<0>(p, v);
      load_half<1>(p, v + 2);
    } else {
      const auto pairs = hn::LoadU(HalfWords(), reinterpret_cast<const std::uint16_t*>(p));
      widen(Self::even_halves(HalfWords(), pairs), v);
      widen(Self::odd_halves(HalfWords(), pairs), v + 2);
    }
  }
  template <int kHalf>
  static HWY_INLINE void load_half(const T* p, Floats* HWY_RESTRICT v) {
    // Two loads of half a vector: to take one apart takes a clock (Zen 3).
    const hn::Half<HalfWords> words;
    const hn::Rebind<hwy::float16_t, FloatTag> half;
    HWY_UNROLL(2)
    for (int i = 0; i < 2; ++i) {
      const auto pairs = hn::LoadU(words, reinterpret_cast<const std::uint16_t*>(p) + i * lane_count());
      const auto halves = kHalf == 0 ? Self::even_halves(words, pairs) : Self::odd_halves(words, pairs);
      v[i] = hn::PromoteTo(FloatTag(), hn::BitCast(half, halves));
    }
  }

 private:
  static HWY_INLINE void widen(hn::Vec<HalfWords> halves, Floats* HWY_RESTRICT v) {
    const hn::Rebind<hwy::float16_t, FloatTag> half;
    const hn::Half<HalfWords> words;
    v[0] = hn::PromoteTo(FloatTag(), hn::BitCast(half, hn::LowerHalf(words, halves)));
    v[1] = hn::PromoteTo(FloatTag(), hn::BitCast(half, hn::UpperHalf(words, halves)));
  }
};

template <>
struct Unpack<Float8E5M2> : UnpackFloat8<Float8E5M2, Unpack<Float8E5M2>> {
  static constexpr float kFactor = 1.0f;
  static constexpr bool kOneShift = true;
  template <class D>
  static HWY_INLINE hn::Vec<D> even_halves(D, hn::Vec<D> pairs) {
    return hn::ShiftLeft<8>(pairs);
  }
  template <class D>
  static HWY_INLINE hn::Vec<D> odd_halves(D words, hn::Vec<D> pairs) {
    return hn::And(pairs, hn::Set(words, std::uint16_t{0xFF00}));
  }
};

// Sign and the seven bits below it, moved to where float16 has them; the exponent then reads 8 too low. NaN codes come
// out as ±480/256: NanWatch finds them.
template <>
struct Unpack<Float8E4M3> : UnpackFloat8<Float8E4M3, Unpack<Float8E4M3>> {
  static constexpr float kFactor = 256.0f;
  static constexpr bool kOneShift = false;  // but three instructions
  template <class D>
  static HWY_INLINE hn::Vec<D> even_halves(D words, hn::Vec<D> pairs) {
    return odd_halves(words, hn::ShiftLeft<8>(pairs));
  }
  template <class D>
  static HWY_INLINE hn::Vec<D> odd_halves(D words, hn::Vec<D> pairs) {
    const hn::RebindToSigned<D> integers;
    const auto shifted = hn::BitCast(words, hn::ShiftRight<1>(hn::BitCast(integers, pairs)));
    return hn::And(shifted, hn::Set(words, std::uint16_t{0xBF80}));
  }
};

// Elements of a chunk.
template <class T>
HWY_INLINE std::int64_t chunk_elements() {
  return Unpack<T>::kVectors * lane_count();
}

// Watches chunks go by for codes that Unpack does not see as NaN: what was made of such chunks must be made anew by the
// exact conversion. (A pass of its own over the rows took a third of one row's time.)
template <class T>
struct NanWatch {
  static constexpr bool kNeeded = false;
  HWY_INLINE void see(const T*) {}
  bool found() const { return false; }
};

template <>
struct NanWatch<Float8E4M3> {
  static constexpr bool kNeeded = true;
  hn::Vec<ByteVector> largest;  // of the codes without their sign, doubled

  HWY_INLINE NanWatch() : largest(hn::Zero(ByteVector())) {}
  HWY_INLINE void see(const Float8E4M3* chunk) {
    const auto codes = hn::LoadU(ByteVector(), reinterpret_cast<const std::uint8_t*>(chunk));
    largest = hn::Max(largest, hn::Add(codes, codes));
  }
  HWY_INLINE bool found() const {
    const ByteVector bytes;
    const auto nan = hn::Eq(largest, hn::Set(bytes, std::uint8_t{0xFE}));
    return !hn::AllFalse(bytes, nan);
  }
};
#endif  // !HWY_HAVE_SCALABLE

// dst = the row dequantized, channel by channel, rows of any length; `scales` holds one for every `group` channels, or
// is null.
template <class T>
HWY_INLINE void dequantize_row(const T* HWY_RESTRICT row, std::int64_t dim, const float* scales, std::int64_t group,
                               float* HWY_RESTRICT dst) {
  std::int64_t i = 0;
  for (; i + lane_count() <= dim; i += lane_count()) store_floats(load_floats(row + i), dst + i);
  for (; i < dim; ++i) dst[i] = to_float(row[i]);
  if (scales == nullptr) return;
  for (std::int64_t first = 0; first < dim; first += group, ++scales) {
    const std::int64_t end = first + group < dim ? first + group : dim;
    for (std::int64_t d = first; d < end; ++d) dst[d] *= *scales;
  }
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
