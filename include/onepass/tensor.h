// onepass/tensor.h: element types, devices and the non-owning tensor view.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>

#include "onepass/export.h"

namespace onepass {

enum class DType : std::uint8_t {
  kFloat64 = 0,
  kFloat32 = 1,
  kFloat16 = 2,
  kBFloat16 = 3,
  kInt8 = 4,
  kFloat8E4M3 = 5,
  kFloat8E5M2 = 6,
  kInt32 = 7,
  kInt64 = 8,
};

// Bytes of one element.
constexpr std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kInt8:
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2: return 1;
  }
  return 0;
}

ONEPASS_API const char* name_of(DType dtype);

enum class DeviceType : std::uint8_t { kCpu = 0, kCuda = 1 };

struct Device {
  DeviceType type = DeviceType::kCpu;
  std::int32_t index = 0;  // CUDA ordinal; 0 on the CPU
  friend bool operator==(const Device&, const Device&) = default;
};

inline constexpr int kMaxRank = 5;

// A non-owning view: address, element type, device, shape and strides (in elements, any sign or zero).
// Trivially copyable; the caller keeps the memory alive for the duration of the call.
// A default-constructed view (rank 0, null data) means "not given".
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device = {};
  std::int32_t rank = 0;
  std::array<std::int64_t, kMaxRank> shape = {};
  std::array<std::int64_t, kMaxRank> strides = {};

  TensorView() = default;

  // A contiguous (row-major) tensor.
  TensorView(void* data_, DType dtype_, std::initializer_list<std::int64_t> shape_, Device device_ = {})
      : data(data_), dtype(dtype_), device(device_) {
    for (std::int64_t size : shape_) shape[rank++] = size;
    std::int64_t stride = 1;
    for (int i = rank - 1; i >= 0; --i) {
      strides[i] = stride;
      stride *= shape[i];
    }
  }

  // A strided tensor; strides count elements.
  TensorView(void* data_, DType dtype_, std::initializer_list<std::int64_t> shape_,
             std::initializer_list<std::int64_t> strides_, Device device_ = {})
      : data(data_), dtype(dtype_), device(device_) {
    for (std::int64_t size : shape_) shape[rank++] = size;
    int i = 0;
    for (std::int64_t stride : strides_) strides[i++] = stride;
  }

  bool given() const { return rank != 0 || data != nullptr; }
  std::int64_t numel() const {
    std::int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= shape[i];
    return count;
  }

  // The same memory with dimensions a and b exchanged, e.g. (batch, seqlen, heads, dim) seen as (batch, heads, ...).
  TensorView transposed(int a, int b) const {
    TensorView view = *this;
    view.shape[a] = shape[b];
    view.shape[b] = shape[a];
    view.strides[a] = strides[b];
    view.strides[b] = strides[a];
    return view;
  }
};

}  // namespace onepass
