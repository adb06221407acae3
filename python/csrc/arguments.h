// csrc/arguments.h: reads the arguments of a boxed kernel from torch's stack, in schema order, and writes its results.
//
// Calling convention (torch/csrc/stable/library.h): a kernel gets a stack of max(arguments, results) slots, takes
// ownership of the arguments and replaces them by its results. Reading every argument before anything can throw keeps
// that promise. A reader instead of TORCH_BOX lets the operations share the reading of their options, and spares the
// copies of a tuple of two dozen values on every call.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace onepass::binding {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Stack = StableIValue*;

class Arguments {
 public:
  explicit Arguments(Stack stack) : stack_(stack) {}

  Tensor tensor() { return next<Tensor>(); }
  OptionalTensor optional_tensor() { return next<OptionalTensor>(); }
  bool boolean() { return next<bool>(); }
  double real() { return next<double>(); }
  std::optional<double> optional_real() { return next<std::optional<double>>(); }
  std::int64_t integer() { return next<std::int64_t>(); }
  std::optional<std::int64_t> optional_integer() { return next<std::optional<std::int64_t>>(); }

 private:
  template <class T>
  T next() {
    return torch::stable::detail::to<T>(stack_[position_++]);
  }

  Stack stack_;
  std::size_t position_ = 0;
};

// Moves results to the stack: a tensor's slot holds a new reference to it.
template <class... Results>
void set_results(Stack stack, const Results&... results) {
  std::size_t position = 0;
  ((stack[position++] = torch::stable::detail::from(results)), ...);
}

}  // namespace onepass::binding
