// cuda/hopper/tensor_map.h: TMA descriptors of (batch, head, token, dim) operands.
#pragma once

#include <cuda.h>

#include "core/backend.h"
#include "core/problem.h"

namespace onepass::cuda::hopper {

// Sizes of the tensor that an operand belongs to; ragged operands have one batch of `tokens` tokens in all.
struct OperandShape {
  std::int64_t dim, tokens, heads, batch;
};

// nullopt, or which of TMA's rules (16-byte address and strides, none of them zero) the operand breaks.
Unsupported tma_rejects(const char* name, const Operand& operand, const OperandShape& shape);

// Boxes of 64 columns and box_tokens tokens, swizzled by 128 bytes; outside the tensor they read zeros.
CUtensorMap tensor_map(const Problem& problem, const Operand& operand, const OperandShape& shape, int box_tokens);

}  // namespace onepass::cuda::hopper
