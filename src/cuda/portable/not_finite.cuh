// cuda/portable/not_finite.cuh: infinities and NaNs among values that only some rows of a tile see.
//
// On tensor cores a masked weight of 0 turns them into NaN in rows that must not notice. A block that the mask cuts is
// therefore made finite in shared memory before its product, and rows that do see such a value get it afterwards.
#pragma once

#include "cuda/common/score.cuh"
#include "cuda/portable/forward.h"
#include "cuda/portable/tile.cuh"

namespace onepass::cuda {

template <class T>
ONEPASS_DEVICE bool is_finite(T x) {
  return fabsf(to_float(x)) < kInfinity;
}

// Replaces the infinities and NaNs of a chunk by zeros; whether there were any.
template <class T>
ONEPASS_DEVICE bool make_finite(uint4& chunk) {
  T* const elements = reinterpret_cast<T*>(&chunk);
  bool found = false;
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) {
    found |= !is_finite(elements[i]);
    if (!is_finite(elements[i])) elements[i] = from_float<T>(0.0f);
  }
  return found;
}

// Whether a register of two 16-bit elements holds one whose exponent is all ones.
template <class T>
ONEPASS_DEVICE bool has_full_exponent(std::uint32_t word) {
  constexpr std::uint32_t kExponents = std::is_same_v<T, __half> ? 0x7C007C00u : 0x7F807F80u;
  constexpr std::uint32_t kUpper = kExponents & 0xFFFF0000u, kLower = kExponents & 0xFFFFu;
  return (word & kUpper) == kUpper || (word & kLower) == kLower;
}

template <class T>
ONEPASS_DEVICE bool may_hold_not_finite(const uint4& chunk) {
  if constexpr (sizeof(T) == 4) return true;
  return has_full_exponent<T>(chunk.x) || has_full_exponent<T>(chunk.y) || has_full_exponent<T>(chunk.z) ||
         has_full_exponent<T>(chunk.w);
}

// Makes this thread's share of a tile of 16-bit elements finite; whether anything had to be replaced.
template <class T, class Tile, int kRows, int kThreads>
ONEPASS_DEVICE bool make_tile_finite(std::uint32_t tile) {
  bool found = false;
#pragma unroll 4
  for (int index = threadIdx.x; index < kRows * Tile::kChunks; index += kThreads) {
    uint4 chunk = load_shared<uint4>(tile + 16 * index);  // in the order of memory: which chunk it is does not matter
    if (may_hold_not_finite<T>(chunk)) {
      make_finite<T>(chunk);
      store_shared(tile + 16 * index, chunk);
      found = true;
    }
  }
  return found;
}

// Makes up to 16 rows of a tile finite, by one warp; bit i of the result: row i was not.
template <class T, class Tile, int kRows = 16>
ONEPASS_DEVICE std::uint32_t make_rows_finite(std::uint32_t tile, int first_row) {
  std::uint32_t rows = 0;
#pragma unroll 1
  for (int index = threadIdx.x % 32; index < kRows * Tile::kChunks; index += 32) {
    const int row = index / Tile::kChunks;
    const std::uint32_t address = tile + Tile::offset(first_row + row, index % Tile::kChunks);
    uint4 chunk = load_shared<uint4>(address);
    if (may_hold_not_finite<T>(chunk) && make_finite<T>(chunk)) {
      store_shared(address, chunk);
      rows |= 1u << row;
    }
  }
  return __reduce_or_sync(~0u, rows);
}

// Adds to rows [first, first + count) of the output, which the calling warp has written, the infinities and NaNs of the
// values that they see. A dropped weight gives 0·∞.
template <class T>
__device__ __noinline__ void restore_not_finite(const ForwardArguments& arguments, int batch, int head, int first,
                                                int count) {
  const Problem& problem = arguments.problem;
  const DeviceSequence sequence = device_sequence(problem, batch);
  const int head_dim_v = static_cast<int>(problem.head_dim_v);
  const DropoutRule dropout = dropout_rule(problem, batch, head);
  const auto v =
      global_rows<const T>(problem.v, batch, head / arguments.group_size, sequence.key_start, head_dim_v, false);
  const auto out = global_rows<T>(problem.out, batch, head, sequence.query_start, head_dim_v, false);
  for (int query = first; query < first + count; ++query) {
    const Range visible = visible_keys(problem, sequence, query);
    for (int d = threadIdx.x % 32; d < head_dim_v; d += 32) {
      T* const element = out.data + query * out.stride + d;
      float sum = to_float(*element);
      for (int key = visible.begin; key < visible.end; ++key) {
        const float value = to_float(v.data[key * v.stride + d]);
        if (!is_finite(value)) sum += dropout.active && !survives(dropout, query, key) ? 0.0f * value : value;
      }
      *element = from_float<T>(sum);
    }
  }
}

}  // namespace onepass::cuda
