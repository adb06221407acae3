// csrc/tensor.h: torch tensors seen as TensorView, and new tensors with chosen strides.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "arguments.h"
#include "onepass/tensor.h"

namespace onepass::binding {

// The tensor's own memory; `operation` and `name` are for the message when its dtype, device or rank cannot be viewed.
TensorView view_of(const Tensor& tensor, const char* operation, const char* name);

// The same of a tensor that must have `rank` dimensions, because the shapes of outputs are taken from it.
TensorView view_of(const Tensor& tensor, const char* operation, const char* name, int rank);

// The same, not given when absent.
TensorView view_of(const OptionalTensor& tensor, const char* operation, const char* name);

// `tensor`, or a contiguous copy of it when its last dimension is strided: kernels read rows as they lie.
Tensor with_contiguous_rows(const Tensor& tensor);

struct NewTensor {
  Tensor tensor;
  TensorView view;
};

// A tensor of `shape` and `like`'s rank whose dimensions before the last lie in memory in the order of `like`'s: a
// transposed (batch, seqlen, heads, dim) query gets an output of that layout. The fake kernels in onepass/_ops.py
// follow the same rule.
NewTensor empty_in_order_of(const TensorView& like, std::initializer_list<std::int64_t> shape);

// The same with `like`'s own shape.
NewTensor empty_like(const TensorView& like);

// A contiguous tensor on `device`.
NewTensor empty_contiguous(std::initializer_list<std::int64_t> shape, DType dtype, Device device);

// Statistics, and the gradients of bias and sinks: float32, or float64 beside float64 inputs.
inline DType accumulator_of(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

}  // namespace onepass::binding
