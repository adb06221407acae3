// support/tensor.h: a tensor that owns its memory, in a layout of choice, with canaries around its elements.
#pragma once

#include <cstdint>
#include <vector>

#include "onepass/tensor.h"
#include "support/memory.h"

namespace onepass::test {

using Values = std::vector<double>;  // a tensor's elements in row-major order, whatever its layout and dtype
using Shape = std::vector<std::int64_t>;

enum class Layout {
  kContiguous,  // memory ends with the last element
  kSwapped,     // the two dimensions before the last are exchanged in memory: (batch, token, head, dim)
  kPadded,      // gaps after every row and plane, and a first element off any alignment
  kReversed,    // negative stride in the dimension before the last
};

// `x` as `dtype` would hold it.
double rounded(double x, DType dtype);
Values rounded(Values values, DType dtype);

class Tensor {
 public:
  Tensor() = default;  // "not given"
  Tensor(DType dtype, const Shape& shape, Layout layout = Layout::kContiguous, Device device = {});
  Tensor(DType dtype, const Shape& shape, const Values& values, Layout layout = Layout::kContiguous,
         Device device = {});

  operator const TensorView&() const { return view_; }
  TensorView& view() { return view_; }
  const TensorView& view() const { return view_; }

  void store(const Values& values);
  Values load() const;
  double at(std::int64_t offset) const;  // one element, counted from data

  // Every byte outside the elements still holds the canary.
  bool canaries_intact() const;
  // Every byte, elements included, still holds the canary: nothing was ever written.
  bool untouched() const;

 private:
  Memory memory_;
  std::int64_t bytes_ = 0;
  TensorView view_;
};

}  // namespace onepass::test
