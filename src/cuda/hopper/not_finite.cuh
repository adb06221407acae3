// cuda/hopper/not_finite.cuh: infinities and NaNs among values that only some rows of a tile see.
//
// In the products a hidden weight of 0 turns them into NaN in rows that must not notice. The careful attempt at a tile
// therefore clears them in shared memory, notes in which blocks they lay, and adds them afterwards to the rows that see
// them.
#pragma once

#include "cuda/common/score.cuh"
#include "cuda/hopper/mask.cuh"

namespace onepass::cuda::hopper {

// `word` without those of its two elements whose exponent is all ones.
template <class T>
ONEPASS_DEVICE int finite_elements(int word) {
  constexpr int kExponent = std::is_same_v<T, __half> ? 0x7C00 : 0x7F80;
  if ((word & kExponent) == kExponent) word &= ~0xFFFF;
  if ((word >> 16 & kExponent) == kExponent) word &= 0xFFFF;
  return word;
}
template <class T>
ONEPASS_DEVICE int4 finite_elements(int4 chunk) {
  return {finite_elements<T>(chunk.x), finite_elements<T>(chunk.y), finite_elements<T>(chunk.z),
          finite_elements<T>(chunk.w)};
}

ONEPASS_DEVICE bool differ(int4 a, int4 b) { return ((a.x ^ b.x) | (a.y ^ b.y) | (a.z ^ b.z) | (a.w ^ b.w)) != 0; }

// Sum of the infinities and NaNs in column `column` of V that query `row` sees among keys [begin, end). A dropped
// weight gives 0·∞.
template <class T>
ONEPASS_DEVICE float sum_not_finite(const Problem& problem, const Tile& tile, int row, int column, int begin, int end) {
  const DropoutRule dropout = dropout_rule(problem, tile.batch, tile.head);
  const T* const values =
      problem.v.template row<T>(problem.ragged() ? 0 : tile.batch, tile.head / problem.group_size(), tile.key_start) +
      column;
  float sum = 0.0f;
  begin = max(begin, visible_begin(window_of(problem), tile, row));
  end = min(end, visible_end(window_of(problem), tile, row));
  for (int key = begin; key < end; ++key) {
    const float value = to_float(values[key * problem.v.token_stride]);
    if (fabsf(value) < kInfinity) continue;
    sum += dropout.active && !survives(dropout, row, key) ? 0.0f * value : value;
  }
  return sum;
}

}  // namespace onepass::cuda::hopper
