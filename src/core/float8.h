// core/float8.h: the two 8-bit float formats of KV caches (Micikevicius et al. 2022), scalar.
//   e4m3: bias 7, no infinity, NaN 0x7F and 0xFF, largest 448;  e5m2: the upper byte of a float16, largest 57344.
// Casts round to nearest even and saturate, infinity too; NaN stays.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "core/half.h"

namespace onepass {

struct Float8E4M3 {
  std::uint8_t bits;
};
struct Float8E5M2 {
  std::uint8_t bits;
};

inline float to_float(Float8E5M2 x) { return to_float(Half{static_cast<std::uint16_t>(x.bits << 8)}); }

// Shifted into a float16 the exponent reads 8 too low: bias 15 instead of 7.
inline float to_float(Float8E4M3 x) {
  const auto half = static_cast<std::uint16_t>((x.bits & 0x80u) << 8 | (x.bits & 0x7Fu) << 7);
  if ((x.bits & 0x7Fu) == 0x7Fu) return std::bit_cast<float>(0x7FC00000u);
  return to_float(Half{half}) * 256.0f;
}

namespace detail {

// |x| ≤ the format's largest, as its 7 low bits: kMantissa fraction bits, exponent bias kBias. Subnormals are multiples
// of 2^(1 − kBias − kMantissa); adding a power of two 23 bits above that unit lets the FPU round there.
template <int kMantissa, int kBias>
constexpr std::uint8_t float8_magnitude(float x) {
  constexpr float kSmallestNormal = std::bit_cast<float>(static_cast<std::uint32_t>(128 - kBias) << 23);
  if (x < kSmallestNormal) {
    constexpr float kUnit = std::bit_cast<float>(static_cast<std::uint32_t>(128 - kBias - kMantissa + 23) << 23);
    return static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(x + kUnit) - std::bit_cast<std::uint32_t>(kUnit));
  }
  constexpr int kDropped = 23 - kMantissa;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = bits + (1u << (kDropped - 1)) - 1u + ((bits >> kDropped) & 1u);
  return static_cast<std::uint8_t>((rounded >> kDropped) - (static_cast<std::uint32_t>(127 - kBias) << kMantissa));
}

}  // namespace detail

template <>
inline Float8E4M3 from_float<Float8E4M3>(float x) {
  const std::uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) return {static_cast<std::uint8_t>(sign | 0x7F)};
  return {static_cast<std::uint8_t>(sign | detail::float8_magnitude<3, 7>(std::min(std::fabs(x), 448.0f)))};
}
template <>
inline Float8E5M2 from_float<Float8E5M2>(float x) {
  const std::uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) return {static_cast<std::uint8_t>(sign | 0x7E)};
  return {static_cast<std::uint8_t>(sign | detail::float8_magnitude<2, 15>(std::min(std::fabs(x), 57344.0f)))};
}

inline float to_float(std::int8_t x) { return x; }

// Calls f with a value of the C++ type of a cache's element type.
template <class F>
decltype(auto) with_cache_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kInt8: return f(std::int8_t{});
    case DType::kFloat8E4M3: return f(Float8E4M3{});
    case DType::kFloat8E5M2: return f(Float8E5M2{});
    default: return with_float_type(dtype, f);
  }
}

}  // namespace onepass
