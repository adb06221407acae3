#include "api/validate.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <utility>

namespace onepass::api {
namespace {

bool known(DType dtype) { return size_of(dtype) != 0; }

// Lowest and one past the highest byte that the view touches, relative to data; false on overflow.
bool byte_extent(const TensorView& view, std::int64_t& low, std::int64_t& high) {
  low = high = 0;
  std::int64_t count = 1;
  for (int i = 0; i < view.rank; ++i) {
    if (__builtin_mul_overflow(count, std::max<std::int64_t>(view.shape[i], 1), &count)) return false;
    std::int64_t reach = 0;
    if (view.shape[i] > 1 && __builtin_mul_overflow(view.shape[i] - 1, view.strides[i], &reach)) return false;
    std::int64_t& end = reach < 0 ? low : high;
    if (__builtin_add_overflow(end, reach, &end)) return false;
  }
  return !__builtin_mul_overflow(low, size_of(view.dtype), &low) && !__builtin_add_overflow(high, 1, &high) &&
         !__builtin_mul_overflow(high, size_of(view.dtype), &high);
}

// Taken by rising stride, each dimension must step over all that the smaller ones span.
bool addresses_distinct(const TensorView& view) {
  if (view.numel() == 0) return true;
  std::int64_t highest = 0;  // offset reached by the dimensions taken so far
  std::array<bool, kMaxRank> taken = {};
  for (int round = 0; round < view.rank; ++round) {
    int next = -1;
    for (int i = 0; i < view.rank; ++i) {
      if (taken[i] || view.shape[i] == 1) continue;
      if (next < 0 || std::abs(view.strides[i]) < std::abs(view.strides[next])) next = i;
    }
    if (next < 0) return true;
    taken[next] = true;
    const std::int64_t stride = std::abs(view.strides[next]);
    if (stride <= highest) return false;
    highest += stride * (view.shape[next] - 1);
  }
  return true;
}

std::string describe_device(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

}  // namespace

bool overlap(const TensorView& a, const TensorView& b) {
  if (a.numel() == 0 || b.numel() == 0 || a.device != b.device) return false;
  std::int64_t a_low, a_high, b_low, b_high;
  byte_extent(a, a_low, a_high);
  byte_extent(b, b_low, b_high);
  const auto a_base = reinterpret_cast<std::intptr_t>(a.data), b_base = reinterpret_cast<std::intptr_t>(b.data);
  return a_base + a_low < b_base + b_high && b_base + b_low < a_base + a_high;
}

void refuse(const char* operation, const char* argument, const std::string& received, const std::string& required,
            ErrorCode code) {
  throw Error(code, std::string(operation) + ": " + argument + ": got " + received + "; need " + required);
}

std::string describe_shape(std::span<const std::int64_t> shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::string describe(const TensorView& view) {
  const std::string dtype =
      known(view.dtype) ? name_of(view.dtype) : "unknown dtype " + std::to_string(static_cast<int>(view.dtype));
  if (view.rank < 0 || view.rank > kMaxRank) return dtype + " of rank " + std::to_string(view.rank);
  return dtype + " " + describe_shape({view.shape.data(), static_cast<std::size_t>(view.rank)}) + " on " +
         describe_device(view.device);
}

void check_tensor(const char* operation, Named tensor, int rank, bool any_inner_stride) {
  const TensorView& view = tensor.view;
  if (!known(view.dtype)) refuse(operation, tensor.name, describe(view), "a known dtype", ErrorCode::kInvalidType);
  if (view.device.type != DeviceType::kCpu && view.device.type != DeviceType::kCuda) {
    refuse(operation, tensor.name, "device type " + std::to_string(static_cast<int>(view.device.type)), "cpu or cuda",
           ErrorCode::kInvalidType);
  }
  if (view.rank != rank) refuse(operation, tensor.name, describe(view), std::to_string(rank) + " dimensions");
  for (int i = 0; i < rank; ++i) {
    if (view.shape[i] < 0) refuse(operation, tensor.name, describe(view), "sizes of at least 0");
  }
  std::int64_t low, high;
  if (!byte_extent(view, low, high)) {
    refuse(operation, tensor.name, describe(view), "sizes and strides whose extent in bytes fits 64 bits");
  }
  if (view.data == nullptr && view.numel() != 0) {
    refuse(operation, tensor.name, "null data behind " + describe(view), "memory for every element");
  }
  if (!any_inner_stride && rank > 0 && view.shape[rank - 1] > 1 && view.strides[rank - 1] != 1) {
    refuse(operation, tensor.name, "stride " + std::to_string(view.strides[rank - 1]) + " in the last dimension",
           "a contiguous last dimension (stride 1)");
  }
}

void check_shape(const char* operation, Named tensor, std::initializer_list<std::int64_t> shape) {
  if (!std::equal(shape.begin(), shape.end(), tensor.view.shape.begin())) {
    refuse(operation, tensor.name, describe(tensor.view), "shape " + describe_shape({shape.begin(), shape.size()}));
  }
}

void check_dtype(const char* operation, Named tensor, std::initializer_list<DType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), tensor.view.dtype) != allowed.end()) return;
  std::string names;
  for (const DType* dtype = allowed.begin(); dtype != allowed.end(); ++dtype) {
    if (std::find(allowed.begin(), dtype, *dtype) != dtype) continue;  // named already
    names += std::string(names.empty() ? "" : " or ") + name_of(*dtype);
  }
  refuse(operation, tensor.name, describe(tensor.view), names, ErrorCode::kInvalidType);
}

void check_device(const char* operation, Named tensor, Device device) {
  if (tensor.view.device == device) return;
  refuse(operation, tensor.name, describe(tensor.view), "the device of the first tensor, " + describe_device(device),
         ErrorCode::kInvalidType);
}

void check_output(const char* operation, Named output, std::initializer_list<Named> inputs) {
  if (!addresses_distinct(output.view)) {
    const std::string strides =
        describe_shape({output.view.strides.data(), static_cast<std::size_t>(output.view.rank)});
    refuse(operation, output.name, describe(output.view) + " with strides " + strides,
           "an output whose elements do not share addresses");
  }
  for (const Named& input : inputs) {
    if (input.view.given() && overlap(output.view, input.view)) {
      refuse(operation, output.name, std::string("memory that overlaps ") + input.name, "memory apart from all inputs");
    }
  }
}

Operand operand_of(const TensorView& view) {
  if (view.rank == 4) return {view.data, view.strides[0], view.strides[1], view.strides[2]};
  return {view.data, 0, view.strides[1], view.strides[0]};
}

RowVector row_vector_of(const TensorView& view) {
  if (view.rank == 3) return {view.data, view.strides[0], view.strides[1], view.strides[2]};
  return {view.data, 0, view.strides[0], view.strides[1]};
}

}  // namespace onepass::api
