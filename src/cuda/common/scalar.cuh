// cuda/common/scalar.cuh: element types on the device, their conversions, and the few special functions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "onepass/tensor.h"

#define ONEPASS_DEVICE __device__ __forceinline__

namespace onepass::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.69314718055994531f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Weights are 2^(c·s − c·m) by one FMA. The rounding of c·m is a factor common to a row, which cancels, as long as the
// weights stay within float16: beyond this |c·m| the difference s − m comes first.
inline constexpr float kFusedLimit = 0x1p24f;

ONEPASS_DEVICE float to_float(float x) { return x; }
ONEPASS_DEVICE float to_float(__half x) { return __half2float(x); }
ONEPASS_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
ONEPASS_DEVICE T from_float(float x);
template <>
ONEPASS_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
ONEPASS_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
ONEPASS_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two 16-bit elements in one register, `low` in the lower half.
template <class T>
ONEPASS_DEVICE std::uint32_t pack(float low, float high);
template <>
ONEPASS_DEVICE std::uint32_t pack<__half>(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
ONEPASS_DEVICE std::uint32_t pack<__nv_bfloat16>(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// One of the two elements, `upper` or not.
template <class T>
ONEPASS_DEVICE float unpack(std::uint32_t packed, bool upper) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __uint_as_float(upper ? packed & 0xFFFF0000u : packed << 16);
  } else {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(upper ? packed >> 16 : packed & 0xFFFFu)));
  }
}

// The same value, of which the compiler knows nothing: what is computed from it is not hoisted out of a loop, where it
// would hold registers that the loop needs.
ONEPASS_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x, relative error below 2^−22; subnormal results become 0.
ONEPASS_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh with an absolute error near 2^−23. tanh.approx (2^−11) would cost cap·2^−11 in a capped logit.
ONEPASS_DEVICE float tanh_by_exp(float x) { return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(2.0f * kLog2e * x)); }

// An element of an array of float32, float16 or bfloat16.
ONEPASS_DEVICE float load_as_float(const void* data, DType dtype, std::int64_t index) {
  if (dtype == DType::kFloat16) return to_float(static_cast<const __half*>(data)[index]);
  if (dtype == DType::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

}  // namespace onepass::cuda
