// cuda/portable/ragged.h: rows of ragged tensors that belong to no sequence, which are written as empty ones.
#pragma once

#include "core/problem.h"
#include "onepass/execution.h"

namespace onepass::cuda {

// Rows of `rows` (dim elements of the problem's dtype, for each query head) after the last sequence become 0, those of
// `lse` −inf; a null operand is left out.
void clear_unowned_queries(const Problem& problem, const Operand& rows, std::int64_t dim, const RowVector& lse,
                           const ExecutionContext& context);

// The same for rows of keys or values (for each key head).
void clear_unowned_keys(const Problem& problem, const Operand& rows, std::int64_t dim, const ExecutionContext& context);

// Total attention (for each query head) of the keys after the last sequence becomes 0.
void clear_unowned_total_attention(const Problem& problem, const ExecutionContext& context);

}  // namespace onepass::cuda
