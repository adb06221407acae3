// cuda/hopper/exp2_polynomial.cuh: 2^x on the FMA units, for a share of the exponentials where the special function
// unit (16 a clock and SM) would be what limits a kernel.
#pragma once

#include "cuda/hopper/ptx.cuh"

namespace onepass::cuda::hopper {

// sum + 2^x for x ≤ 127, relative error of the power below 3·10⁻⁶ and none at integers; powers below 2^−126 are 0. NaN
// stays NaN.
//
// x = n + f with |f| ≤ ½: adding 1.5·2²³ + 127 leaves n + 127 in the low mantissa bits, which shifted by 23 are 2^n.
// The polynomial is the minimax one of degree 4 with the value 1 at 0.
ONEPASS_DEVICE float add_exp2(float x, float sum) {
  constexpr float kShift = 0x1.8p23f + 127.0f;
  const float clamped = max_nan(x, -127.0f);
  const float shifted = clamped + kShift;
  const float f = clamped - (shifted - kShift);
  float p = fmaf(f, 0x1.3a02dp-7f, 0x1.c9fc48p-5f);
  p = fmaf(p, f, 0x1.ec0378p-3f);
  p = fmaf(p, f, 0x1.62e12cp-1f);
  p = fmaf(p, f, 1.0f);
  return fmaf(p, __int_as_float(__float_as_int(shifted) << 23), sum);
}

}  // namespace onepass::cuda::hopper
