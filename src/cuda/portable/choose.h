// cuda/portable/choose.h: host-side choices that every portable operation makes the same way.
#pragma once

#include <cstdint>
#include <string>

#include "core/backend.h"
#include "cuda/device.h"
#include "cuda/portable/head_dims.h"

namespace onepass::cuda {

// What every operation needs of the machine and the operands.
Unsupported common_limits(Device device, DType dtype, std::int64_t largest_head_dim);

// The smallest compiled head dim that holds the operands'.
int padded_head_dim(const Problem& problem);

// Calls f(std::integral_constant<int, D>) with the compiled D that equals `head_dim`.
template <std::size_t kIndex = 0, class F>
auto with_head_dim(int head_dim, F&& f) {
  using Dim = std::integral_constant<int, kHeadDims[kIndex]>;
  if constexpr (kIndex + 1 < kHeadDims.size()) {
    if (head_dim != Dim::value) return with_head_dim<kIndex + 1>(head_dim, static_cast<F&&>(f));
  }
  return f(Dim{});
}

// Whether the rows of an operand can be moved 16 bytes at a time. Strides of dimensions with one element don't count.
bool is_vectorizable(const Operand& operand, DType dtype, std::int64_t batch, std::int64_t heads, std::int64_t tokens,
                     std::int64_t dim);

// Whether logits need more than multiplication by a positive scale, or weights are dropped.
bool has_terms(const Problem& problem);

// (batch, head) planes whose keys and values fill half of the L2 cache together: blocks take these before the others.
int planes_per_group(const Problem& problem, std::int64_t planes, int heads_per_key_head);

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace onepass::cuda
