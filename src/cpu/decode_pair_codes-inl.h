// cpu/decode_pair_codes-inl.h: two stored elements a lane: how they are read as such, and the products of these. All
// are multiplied as bfloat16, which holds every int8, too; keys of int8 as 16-bit integers, which take less unpacking.
#if defined(ONEPASS_CPU_DECODE_PAIR_CODES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_PAIR_CODES_INL_H_
#undef ONEPASS_CPU_DECODE_PAIR_CODES_INL_H_
#else
#define ONEPASS_CPU_DECODE_PAIR_CODES_INL_H_
#endif

#include <bit>

#include "cpu/decode-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

// In the tier; processors with AVX-512 may still lack it, or have it at half the FMA's product rate (Sapphire Rapids,
// measured: no gain over floats). Zen 5 has twice the FMA's.
inline constexpr bool kHasPairDot = HWY_TARGET == HWY_AVX3;
inline bool has_pair_dot() {
  if constexpr (!kHasPairDot) return false;
  static const bool present = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16") &&
                              __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  return present;
}

// Storage that multiplies as pairs.
template <class T>
inline constexpr bool kFloat8 = std::is_same_v<T, Float8E4M3> || std::is_same_v<T, Float8E5M2>;
template <class T>
inline constexpr bool kCodes = kFloat8<T> || std::is_same_v<T, std::int8_t>;  // looked up as bfloat16
template <class T>
inline constexpr bool kPairStorage = kCodes<T> || std::is_same_v<T, BFloat16>;

inline constexpr std::int64_t kPairUnit = 32;  // channels that two vectors of pairs of keys hold

// Position s of the output as the second product leaves it: interleaving takes the four quarters of a register apart.
template <class T>
std::int64_t pair_channel(std::int64_t s) {
  const std::int64_t unit = s / kPairUnit, vector = s % kPairUnit / 16, quarter = s % 16 / 4, i = s % 4;
  if constexpr (!kCodes<T>) return unit * kPairUnit + 8 * quarter + 4 * vector + i;
  return unit / 2 * 64 + 16 * quarter + unit % 2 * 8 + 4 * vector + i;
}

#if HWY_TARGET == HWY_AVX3

using PairVector = hn::Repartition<std::uint16_t, FloatTag>;
using Bytes = hn::Vec<ByteVector>;
using Pairs = hn::Vec<PairVector>;

// sum += a pair's two products a lane. Inline assembly, so that the tier's other code may not use the extension.
HWY_INLINE void add_pair_dot(Pairs a, Pairs b, Floats& sum) {
  const __m512i first = a.raw, second = b.raw;
  __m512 total = sum.raw;
  asm("vdpbf16ps %[b], %[a], %[sum]" : [sum] "+v"(total) : [a] "v"(first), [b] "v"(second));
  sum.raw = total;
}

// The same for 16-bit integers, exact.
HWY_INLINE void add_pair_dot(Pairs a, Pairs b, Ints& sum) {
  const __m512i first = a.raw, second = b.raw;
  __m512i total = sum.raw;
  asm("vpdpwssd %[b], %[a], %[sum]" : [sum] "+v"(total) : [a] "v"(first), [b] "v"(second));
  sum.raw = total;
}

template <class T>
using PairSum = std::conditional_t<std::is_same_v<T, std::int8_t>, Ints, Floats>;

HWY_INLINE Floats to_floats(Floats sum) { return sum; }
HWY_INLINE Floats to_floats(Ints sum) { return hn::ConvertTo(FloatTag(), sum); }

// 32 elements in their order.
HWY_INLINE Pairs load_pairs(const std::uint16_t* p) { return hn::LoadU(PairVector(), p); }
HWY_INLINE Pairs load_pairs(const BFloat16* p) { return load_pairs(reinterpret_cast<const std::uint16_t*>(p)); }

// 8 elements, four times.
HWY_INLINE Pairs broadcast_pairs(const std::uint16_t* p) { return hn::LoadDup128(PairVector(), p); }
HWY_INLINE Pairs broadcast_pairs(const std::int8_t* p) {
  std::int64_t eight;
  std::memcpy(&eight, p, sizeof(eight));
  return Pairs{_mm512_cvtepi8_epi16(_mm256_set1_epi64x(eight))};
}

// 32 floats rounded to bfloat16: those of `low`, then those of `high`.
HWY_INLINE Pairs round_to_pairs(Floats high, Floats low) {
  Pairs pairs;
  asm("vcvtne2ps2bf16 %[low], %[high], %[pairs]" : [pairs] "=v"(pairs.raw) : [low] "v"(low.raw), [high] "v"(high.raw));
  return pairs;
}

// table[code & 127] of 128 bytes.
HWY_INLINE Bytes look_up(Bytes codes, Bytes first_half, Bytes second_half) {
  asm("vpermi2b %[second], %[first], %[codes]"
      : [codes] "+v"(codes.raw)
      : [first] "v"(first_half.raw), [second] "v"(second_half.raw));
  return codes;
}

// The same, 0 where `kept` has no bit.
HWY_INLINE Bytes look_up_kept(__mmask64 kept, Bytes codes, Bytes first_half, Bytes second_half) {
  asm("vpermi2b %[second], %[first], %[codes]%{%[kept]%}%{z%}"
      : [codes] "+v"(codes.raw)
      : [first] "v"(first_half.raw), [second] "v"(second_half.raw), [kept] "Yk"(kept));
  return codes;
}

// The bfloat16 of every code without its sign, low bytes and high bytes apart. Of int8: of every magnitude, where 0
// stands for 128, whose lower seven bits are the same.
struct CodeBytes {
  alignas(64) std::uint8_t low[128], high[128];
};
template <class T>
const CodeBytes& code_bytes() {
  static const CodeBytes all = [] {
    CodeBytes bytes;
    for (int code = 0; code < 128; ++code) {
      float value;
      if constexpr (kFloat8<T>) {
        value = to_float(T{static_cast<std::uint8_t>(code)});
      } else {
        value = code == 0 ? 128.0f : static_cast<float>(code);
      }
      const auto bits = std::bit_cast<std::uint32_t>(value);
      bytes.low[code] = static_cast<std::uint8_t>(bits >> 16);
      bytes.high[code] = static_cast<std::uint8_t>(bits >> 24);
    }
    return bytes;
  }();
  return all;
}

// Two vectors of pairs of two rows.
template <class T>
struct WidenCodes {
  template <int kOffset>
  HWY_INLINE void pair_rows(const T* a, const T* b, Pairs* v) const {
    const Pairs first = load_pairs(a + kOffset), second = load_pairs(b + kOffset);
    v[0] = hn::InterleaveLower(PairVector(), first, second);
    v[1] = hn::InterleaveUpper(PairVector(), first, second);
  }
};

// Of one register of codes.
template <class T>
requires kCodes<T>
struct WidenCodes<T> {
  Bytes low[2], high[2];

  WidenCodes() {
    const ByteVector bytes;
    const CodeBytes& all = code_bytes<T>();
    for (int i = 0; i < 2; ++i) low[i] = hn::Load(bytes, all.low + 64 * i);
    for (int i = 0; i < 2; ++i) high[i] = hn::Load(bytes, all.high + 64 * i);
  }

  // The lower eight codes of every 16 as bfloat16 in v[0], the upper ones in v[1].
  HWY_INLINE void operator()(Bytes codes, Pairs* v) const {
    const ByteVector bytes;
    Bytes l, h;
    if constexpr (kFloat8<T>) {
      l = look_up(codes, low[0], low[1]);
      h = look_up(codes, high[0], high[1]);
    } else {
      const Bytes magnitudes{_mm512_abs_epi8(codes.raw)};
      l = look_up(magnitudes, low[0], low[1]);  // 0 for 0 and for 128
      h = look_up_kept(_mm512_test_epi8_mask(codes.raw, codes.raw), magnitudes, high[0], high[1]);
    }
    h = hn::OrAnd(h, codes, hn::Set(bytes, std::uint8_t{0x80}));
    v[0] = hn::BitCast(PairVector(), hn::InterleaveLower(bytes, l, h));
    v[1] = hn::BitCast(PairVector(), hn::InterleaveUpper(bytes, l, h));
  }

  // Positions [kOffset, kOffset + 32) of two rows, each position's two elements side by side.
  template <int kOffset>
  HWY_INLINE void pair_rows(const T* a, const T* b, Pairs* v) const {
    const ByteVector bytes;
    const auto first = hn::LoadU(bytes, reinterpret_cast<const std::uint8_t*>(a + kOffset / 64 * 64));
    const auto second = hn::LoadU(bytes, reinterpret_cast<const std::uint8_t*>(b + kOffset / 64 * 64));
    (*this)(kOffset % 64 == 0 ? hn::InterleaveLower(bytes, first, second) : hn::InterleaveUpper(bytes, first, second),
            v);
  }
};

#endif  // HWY_TARGET == HWY_AVX3

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
