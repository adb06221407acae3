#include "slots.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/half.h"

namespace onepass::fuzz {
namespace {

std::int64_t element_size(std::int32_t dtype) {
  return dtype >= 0 && dtype <= 8 ? size_of(static_cast<DType>(dtype)) : 8;
}

// Offsets in elements of the lowest and one past the highest element; false when no memory that long can be had.
bool extent(const onepass_tensor& t, std::int64_t& low, std::int64_t& high) {
  low = high = 0;
  for (int i = 0; i < std::clamp(t.rank, 0, int{ONEPASS_MAX_RANK}); ++i) {
    if (t.shape[i] <= 0) return low = high = 0, true;
    __int128 reach = static_cast<__int128>(t.shape[i] - 1) * t.strides[i];
    if (reach > kMaxBytes || reach < -kMaxBytes) return false;
    (reach < 0 ? low : high) += static_cast<std::int64_t>(reach);
  }
  ++high;
  return (high - low) * element_size(t.dtype) <= kMaxBytes;
}

void fill(Slot& slot, std::int64_t count, std::minstd_rand& generator) {
  std::normal_distribution<float> normal;
  const std::int32_t dtype = slot.tensor.dtype;
  std::byte* const data = slot.memory->data();
  for (std::int64_t i = 0; i < count; ++i) {
    if (dtype >= ONEPASS_INT8 && dtype <= ONEPASS_FLOAT8_E5M2) {
      const auto bits = static_cast<std::uint8_t>(generator() >> 8);
      data[i] = std::byte{dtype == ONEPASS_INT8 ? bits : static_cast<std::uint8_t>(bits & 0xBF)};
    } else if (dtype >= 0 && dtype <= ONEPASS_BFLOAT16) {
      const float value = normal(generator);
      with_float_type(static_cast<DType>(dtype), [&]<class T>(T) {
        T x;
        if constexpr (std::is_same_v<T, double>) {
          x = value;
        } else {
          x = from_float<T>(slot.role == Role::kScale ? 0.005f + 0.01f * std::abs(value) : value);
        }
        std::memcpy(data + i * static_cast<std::int64_t>(sizeof(T)), &x, sizeof(T));
      });
    }
  }
}

}  // namespace

void set(Slot& slot, Role role, std::int32_t dtype, std::initializer_list<std::int64_t> shape, bool swapped) {
  slot.given = true;
  slot.role = role;
  onepass_tensor& t = slot.tensor;
  t.dtype = dtype;
  for (std::int64_t size : shape) t.shape[t.rank++] = size;
  int order[ONEPASS_MAX_RANK] = {0, 1, 2, 3, 4};
  if (swapped && t.rank >= 3) std::swap(order[t.rank - 3], order[t.rank - 2]);
  std::int64_t stride = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    t.strides[order[i]] = stride;
    stride *= std::max<std::int64_t>(t.shape[order[i]], 1);
  }
}

void spoil(onepass_tensor& t, std::int64_t field, std::int64_t value) {
  switch (field) {
    case 0: t.shape[value & 3] = value; break;
    case 1: t.strides[value & 3] = value; break;
    case 2: t.rank = static_cast<std::int32_t>(value); break;
    case 3: t.dtype = static_cast<std::int32_t>(value); break;
    case 4: t.device_type = static_cast<std::int32_t>(value); break;
    case 5: t.device_index = static_cast<std::int32_t>(value); break;
    case 6: t.struct_size = static_cast<std::uint32_t>(value); break;
    case 7: t.reserved = static_cast<std::int32_t>(value); break;
  }
}

std::int64_t allocate(Slot& slot, bool at_front, std::minstd_rand& generator) {
  onepass_tensor& t = slot.tensor;
  std::int64_t low, high;
  if (!extent(t, low, high)) return -1;
  const std::int64_t size = element_size(t.dtype);
  slot.memory = std::make_unique<GuardedMemory>((high - low) * size, at_front);
  if (high > low) t.data = slot.memory->data() - low * size;
  if (slot.role == Role::kOutput) {
    std::fill_n(slot.memory->data(), slot.memory->bytes(), kCanary);
  } else if (slot.role != Role::kIndex) {
    fill(slot, high - low, generator);
  }
  return high - low;
}

void put(Slot& slot, std::int64_t i, std::int32_t value) {
  std::memcpy(slot.memory->data() + i * static_cast<std::int64_t>(sizeof(value)), &value, sizeof(value));
}

std::vector<std::byte> bytes_of(const Slot& slot) {
  if (slot.memory == nullptr) return {};
  return {slot.memory->data(), slot.memory->data() + slot.memory->bytes()};
}

// Elements that the view covers, in row-major order.
std::vector<double> values_of(const Slot& slot) {
  std::vector<double> values;
  const onepass_tensor& t = slot.tensor;
  std::int64_t count = 1;
  for (int i = 0; i < t.rank; ++i) count *= t.shape[i];
  for (std::int64_t position = 0; position < count; ++position) {
    std::int64_t offset = 0, rest = position;
    for (int i = t.rank - 1; i >= 0; --i) {
      offset += rest % t.shape[i] * t.strides[i];
      rest /= t.shape[i];
    }
    with_float_type(static_cast<DType>(t.dtype),
                    [&]<class T>(T) { values.push_back(to_float(static_cast<const T*>(t.data)[offset])); });
  }
  return values;
}

void require_close(const std::vector<double>& got, const std::vector<double>& want, std::int32_t dtype) {
  double largest = 1.0;
  for (double x : want) {
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  }
  const double tolerance = largest * (dtype == ONEPASS_BFLOAT16 ? 0.06 : dtype == ONEPASS_FLOAT16 ? 0.01 : 1e-3);
  for (std::size_t i = 0; i < want.size(); ++i) {
    REQUIRE(std::isfinite(got[i]) == std::isfinite(want[i]));
    if (std::isfinite(want[i])) REQUIRE(std::abs(got[i] - want[i]) <= tolerance);
  }
}

// One of the table, and a refusal says what is needed.
onepass_status checked(onepass_status status) {
  REQUIRE(status >= ONEPASS_OK && status <= ONEPASS_UNSUPPORTED);
  const std::string message = status == ONEPASS_OK ? "" : onepass_last_error();
  REQUIRE(status == ONEPASS_OK || message.find(": ") != std::string::npos);
  REQUIRE(status == ONEPASS_OK || status == ONEPASS_UNSUPPORTED || message.find("; need ") != std::string::npos);
  return status;
}

}  // namespace onepass::fuzz
