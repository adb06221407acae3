#include "tensor.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <span>
#include <string>
#include <utility>

#include "onepass/error.h"

namespace onepass::binding {
namespace {

struct DTypePair {
  std::int32_t torch;
  DType onepass;
};

std::span<const DTypePair> dtype_table() {
  static const std::array<DTypePair, 9> table{{{aoti_torch_dtype_float32(), DType::kFloat32},
                                               {aoti_torch_dtype_bfloat16(), DType::kBFloat16},
                                               {aoti_torch_dtype_float16(), DType::kFloat16},
                                               {aoti_torch_dtype_float64(), DType::kFloat64},
                                               {aoti_torch_dtype_int32(), DType::kInt32},
                                               {aoti_torch_dtype_int64(), DType::kInt64},
                                               {aoti_torch_dtype_int8(), DType::kInt8},
                                               {aoti_torch_dtype_float8_e4m3fn(), DType::kFloat8E4M3},
                                               {aoti_torch_dtype_float8_e5m2(), DType::kFloat8E5M2}}};
  return table;
}

std::int32_t torch_dtype_of(DType dtype) {
  for (const DTypePair& pair : dtype_table()) {
    if (pair.onepass == dtype) return pair.torch;
  }
  throw Error(ErrorCode::kInternal, std::string("torch binding: dtype: got ") + name_of(dtype) + "; need one of torch");
}

std::string prefix(const char* operation, const char* name) { return std::string(operation) + ": " + name + ": got "; }

DType dtype_of(const Tensor& tensor, const char* operation, const char* name) {
  std::int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  for (const DTypePair& pair : dtype_table()) {
    if (pair.torch == code) return pair.onepass;
  }
  const char* received = code == aoti_torch_dtype_bool() ? "bool" : "another dtype";
  throw Error(ErrorCode::kInvalidType,
              prefix(operation, name) + received + "; need float64, float32, float16, bfloat16 or an integer index");
}

Device device_of(const Tensor& tensor, const char* operation, const char* name) {
  static const std::int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  std::int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  if (type == cpu) return {};
  if (type != cuda) {
    throw Error(ErrorCode::kInvalidType, prefix(operation, name) + "a device of another kind; need cpu or cuda");
  }
  return {DeviceType::kCuda, tensor.get_device_index()};
}

using Order = std::array<int, kMaxRank>;

Order declared_order() {
  Order order{};
  std::iota(order.begin(), order.end(), 0);
  return order;
}

// Dimensions by falling stride, equal ones as declared; the last dimension stays innermost.
Order memory_order(const TensorView& view) {
  Order order = declared_order();
  for (int i = 1; i < view.rank - 1; ++i) {
    for (int j = i; j > 0 && view.strides[order[j - 1]] < view.strides[order[j]]; --j) {
      std::swap(order[j - 1], order[j]);
    }
  }
  return order;
}

// Dense, order[0] outermost. Like torch, an empty dimension counts as one element in the strides.
NewTensor empty_dense(std::span<const std::int64_t> shape, const Order& order, DType dtype, Device device) {
  TensorView view;
  view.dtype = dtype;
  view.device = device;
  view.rank = static_cast<std::int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape.begin());
  std::int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.strides[order[i]] = stride;
    stride *= std::max<std::int64_t>(view.shape[order[i]], 1);
  }
  AtenTensorHandle handle = nullptr;
  const std::int32_t type =
      device.type == DeviceType::kCuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(view.rank, view.shape.data(), view.strides.data(),
                                                  torch_dtype_of(dtype), type, device.index, &handle));
  Tensor tensor(handle);
  view.data = tensor.data_ptr();
  return {std::move(tensor), view};
}

}  // namespace

TensorView view_of(const Tensor& tensor, const char* operation, const char* name) {
  TensorView view;
  view.dtype = dtype_of(tensor, operation, name);
  view.device = device_of(tensor, operation, name);
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  if (sizes.size() > kMaxRank) {
    throw Error(ErrorCode::kInvalidArgument, prefix(operation, name) + std::to_string(sizes.size()) +
                                                 " dimensions; need at most " + std::to_string(kMaxRank));
  }
  view.rank = static_cast<std::int32_t>(sizes.size());
  for (int i = 0; i < view.rank; ++i) {
    view.shape[i] = sizes[i];
    view.strides[i] = strides[i];
  }
  view.data = tensor.data_ptr();
  return view;
}

TensorView view_of(const Tensor& tensor, const char* operation, const char* name, int rank) {
  const TensorView view = view_of(tensor, operation, name);
  if (view.rank != rank) {
    throw Error(ErrorCode::kInvalidArgument,
                prefix(operation, name) + std::to_string(view.rank) + " dimensions; need " + std::to_string(rank));
  }
  return view;
}

TensorView view_of(const OptionalTensor& tensor, const char* operation, const char* name) {
  return tensor ? view_of(*tensor, operation, name) : TensorView{};
}

Tensor with_contiguous_rows(const Tensor& tensor) {
  const std::int64_t rank = tensor.dim();
  if (rank == 0 || tensor.stride(rank - 1) == 1 || tensor.size(rank - 1) <= 1) return tensor;
  return torch::stable::contiguous(tensor);
}

NewTensor empty_in_order_of(const TensorView& like, std::initializer_list<std::int64_t> shape) {
  return empty_dense({shape.begin(), shape.size()}, memory_order(like), like.dtype, like.device);
}

NewTensor empty_like(const TensorView& like) {
  return empty_dense({like.shape.data(), static_cast<std::size_t>(like.rank)}, memory_order(like), like.dtype,
                     like.device);
}

NewTensor empty_contiguous(std::initializer_list<std::int64_t> shape, DType dtype, Device device) {
  return empty_dense({shape.begin(), shape.size()}, declared_order(), dtype, device);
}

}  // namespace onepass::binding
