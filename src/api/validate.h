// api/validate.h: the checks that every operation makes before a problem exists. Each throws Error with
// "<operation>: <argument>: got <received>; need <required>".
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "core/problem.h"
#include "onepass/error.h"
#include "onepass/tensor.h"

namespace onepass::api {

[[noreturn]] void refuse(const char* operation, const char* argument, const std::string& received,
                         const std::string& required, ErrorCode code = ErrorCode::kInvalidArgument);

// "float32 (2, 3, 4) on cpu".
std::string describe(const TensorView& view);
std::string describe_shape(std::span<const std::int64_t> shape);

struct Named {
  const char* name;
  const TensorView& view;
};

// Rank, known dtype and device, sizes ≥ 0, extents that fit int64, no null data behind a nonzero size, and (unless
// any_inner_stride) a contiguous last dimension.
void check_tensor(const char* operation, Named tensor, int rank, bool any_inner_stride = false);
void check_shape(const char* operation, Named tensor, std::initializer_list<std::int64_t> shape);
void check_dtype(const char* operation, Named tensor, std::initializer_list<DType> allowed);
void check_device(const char* operation, Named tensor, Device device);

// Whether the memory from the first to the last byte of one meets that of the other.
bool overlap(const TensorView& a, const TensorView& b);

// Every element of an output has its own address, and its memory lies apart from that of all inputs.
void check_output(const char* operation, Named output, std::initializer_list<Named> inputs);

// A (batch, head, token, dim) operand from a rank-4 view, or from a ragged (token, head, dim) one.
Operand operand_of(const TensorView& view);
// (batch, head, token), or ragged (head, token).
RowVector row_vector_of(const TensorView& view);

}  // namespace onepass::api
