// reference/scalar.h: element types to double and back, rounding once.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/half.h"

namespace onepass::reference {

template <class T>
double to_double(T x) {
  return static_cast<double>(to_float(x));
}

// A float of element `index` of an array of `dtype`.
inline double load(const void* data, DType dtype, std::int64_t index) {
  return with_float_type(dtype, [&](auto zero) { return to_double(static_cast<const decltype(zero)*>(data)[index]); });
}

// Round to odd: inexact results get an odd last bit, so that a second rounding to a type with at least two bits fewer
// gives what one rounding of x would have given (Boldo & Melquiond, "When double rounding is odd", 2005).
inline float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  if (std::isnan(x) || static_cast<double>(nearest) == x || (std::bit_cast<std::uint32_t>(nearest) & 1u))
    return nearest;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  return std::nextafterf(nearest, x > static_cast<double>(nearest) ? kInfinity : -kInfinity);
}

template <class T>
T round_to(double x) {
  return from_float<T>(round_to_odd(x));
}
template <>
inline float round_to<float>(double x) {
  return static_cast<float>(x);
}
template <>
inline double round_to<double>(double x) {
  return x;
}

}  // namespace onepass::reference
