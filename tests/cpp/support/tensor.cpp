#include "support/tensor.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "core/float8.h"
#include "reference/scalar.h"

namespace onepass::test {
namespace {

constexpr std::byte kCanary{0xA5};
constexpr std::int64_t kMargin = 64;  // bytes before and after a tensor that is not contiguous

template <class F>
void with_type(DType dtype, F&& f) {
  if (dtype == DType::kInt32) {
    f(std::int32_t{});
  } else {
    with_cache_type(dtype, f);
  }
}

template <class T>
T to_element(double x) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(x);
  } else {
    return reference::round_to<T>(x);
  }
}

template <class T>
double from_element(T x) {
  if constexpr (std::is_integral_v<T>) {
    return x;
  } else {
    return reference::to_double(x);
  }
}

// Calls f(position in row-major order, offset in elements from data) for every element.
template <class F>
void for_each_element(const TensorView& view, F&& f) {
  const std::int64_t count = view.numel();
  for (std::int64_t position = 0; position < count; ++position) {
    std::int64_t offset = 0, rest = position;
    for (int i = view.rank - 1; i >= 0; --i) {
      offset += rest % view.shape[i] * view.strides[i];
      rest /= view.shape[i];
    }
    f(position, offset);
  }
}

}  // namespace

double rounded(double x, DType dtype) {
  double result = 0;
  with_type(dtype, [&](auto zero) { result = from_element(to_element<decltype(zero)>(x)); });
  return result;
}

Values rounded(Values values, DType dtype) {
  for (double& x : values) x = rounded(x, dtype);
  return values;
}

Tensor::Tensor(DType dtype, const Shape& shape, Layout layout, Device device) {
  view_.dtype = dtype;
  view_.device = device;
  view_.rank = static_cast<std::int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), view_.shape.begin());
  std::vector<int> order(shape.size());  // dimensions from the outermost in memory
  std::iota(order.begin(), order.end(), 0);
  if (layout == Layout::kSwapped && shape.size() >= 3) std::swap(order[shape.size() - 3], order[shape.size() - 2]);
  std::int64_t extent = 1;
  for (auto dimension = order.rbegin(); dimension != order.rend(); ++dimension) {
    view_.strides[*dimension] = extent;
    extent = extent * shape[*dimension] + (layout == Layout::kPadded ? 3 : 0);
  }
  const std::int64_t size = size_of(dtype), margin = layout == Layout::kContiguous ? 0 : kMargin;
  bytes_ = extent * size + 2 * margin;
  memory_ = allocate(bytes_, device);
  std::fill_n(memory_.get(), bytes_, kCanary);
  std::byte* data = memory_.get() + margin + (layout == Layout::kPadded ? size : 0);
  if (layout == Layout::kReversed && shape.size() >= 2 && shape[shape.size() - 2] > 0) {
    const std::size_t rows = shape.size() - 2;
    data += (shape[rows] - 1) * view_.strides[rows] * size;
    view_.strides[rows] = -view_.strides[rows];
  }
  view_.data = data;
}

Tensor::Tensor(DType dtype, const Shape& shape, const Values& values, Layout layout, Device device)
    : Tensor(dtype, shape, layout, device) {
  store(values);
}

void Tensor::store(const Values& values) {
  if (static_cast<std::int64_t>(values.size()) != view_.numel()) std::abort();
  with_type(view_.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_element(view_, [&](std::int64_t position, std::int64_t offset) {
      static_cast<T*>(view_.data)[offset] = to_element<T>(values[position]);
    });
  });
}

Values Tensor::load() const {
  if (!view_.given()) return {};
  synchronize(view_.device);
  Values values(view_.numel());
  with_type(view_.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_element(view_, [&](std::int64_t position, std::int64_t offset) {
      values[position] = from_element(static_cast<const T*>(view_.data)[offset]);
    });
  });
  return values;
}

double Tensor::at(std::int64_t offset) const {
  double value = 0;
  with_type(view_.dtype,
            [&](auto zero) { value = from_element(static_cast<const decltype(zero)*>(view_.data)[offset]); });
  return value;
}

bool Tensor::canaries_intact() const {
  synchronize(view_.device);
  std::vector<bool> element(bytes_, false);
  const std::int64_t size = size_of(view_.dtype), base = static_cast<std::byte*>(view_.data) - memory_.get();
  for_each_element(view_, [&](std::int64_t, std::int64_t offset) {
    std::fill_n(element.begin() + base + offset * size, size, true);
  });
  for (std::int64_t i = 0; i < bytes_; ++i) {
    if (!element[i] && memory_[i] != kCanary) return false;
  }
  return true;
}

bool Tensor::untouched() const {
  synchronize(view_.device);
  return std::all_of(memory_.get(), memory_.get() + bytes_, [](std::byte b) { return b == kCanary; });
}

}  // namespace onepass::test
