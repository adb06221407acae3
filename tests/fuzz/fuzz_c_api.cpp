// fuzz/fuzz_c_api.cpp: bytes → a nearly valid call of the C interface on tensors between guard pages.
//
// What must hold: the status is one of the table; a refused call says what is needed and has written nothing; an
// accepted one gives the same bits twice, and what the float64 reference gives.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bytes.h"
#include "core/half.h"
#include "guarded_memory.h"
#include "onepass/onepass_c.h"

namespace onepass::fuzz {
namespace {

constexpr std::int64_t kMaxBytes = 1 << 20;  // of one tensor
constexpr std::byte kCanary{0xA5};

#define REQUIRE(condition)                                                                                         \
  do {                                                                                                             \
    if (!(condition)) {                                                                                            \
      std::fprintf(stderr, "%s:%d: %s\n  last error: %s\n", __FILE__, __LINE__, #condition, onepass_last_error()); \
      std::abort();                                                                                                \
    }                                                                                                              \
  } while (0)

enum class Role { kInput, kIndex, kOutput };

// A tensor and its memory, made after all spoiling so that the memory is as long as the descriptor claims.
struct Slot {
  onepass_tensor tensor = ONEPASS_TENSOR_INIT;
  Role role = Role::kInput;
  bool given = false;
  std::unique_ptr<GuardedMemory> memory = {};
};

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

struct Call {
  explicit Call(Bytes& bytes);

  onepass_status run(const char* backend);
  bool usable = true;  // false: the call might be valid, but needs memory that nobody has
  bool backward = false;
  bool forward_accepted = false;  // by the last run
  Slot q, k, v, out, lse, total, dout, dq, dk, dv, dbias, dsinks;
  Slot bias, sinks, slopes, key_begin, key_end, cu_q, cu_k;
  std::vector<Slot*> slots{&q,     &k,      &v,    &out,   &lse,    &total,     &dout,    &dq,   &dk,  &dv,
                           &dbias, &dsinks, &bias, &sinks, &slopes, &key_begin, &key_end, &cu_q, &cu_k};
  onepass_attention_options options = ONEPASS_ATTENTION_OPTIONS_INIT;

 private:
  void describe(Bytes& bytes);
  void spoil(Bytes& bytes);
  void allocate(Bytes& bytes);

  bool ragged_ = false;
};

void set(Slot& slot, Role role, std::int32_t dtype, std::initializer_list<std::int64_t> shape, bool swapped = false) {
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

void Call::describe(Bytes& bytes) {
  const std::int32_t dtype = static_cast<std::int32_t>(bytes.below(4));
  const std::int32_t statistic = dtype == ONEPASS_FLOAT64 ? ONEPASS_FLOAT64 : ONEPASS_FLOAT32;
  const std::int64_t batch = bytes.below(4), group = 1 + bytes.below(3), heads_kv = 1 + bytes.below(2);
  const std::int64_t heads = group * heads_kv, sq = bytes.below(40), sk = bytes.below(70);
  const std::int64_t dim = 1 + bytes.below(70), dim_v = bytes.one_in(3) ? 1 + bytes.below(70) : dim;
  const bool swapped = bytes.one_in(3);
  ragged_ = bytes.one_in(3);
  backward = bytes.one_in(2);
  const auto operand = [&](Slot& slot, Role role, std::int64_t h, std::int64_t tokens, std::int64_t d) {
    if (ragged_) {
      set(slot, role, dtype, {tokens, h, d}, swapped);
    } else {
      set(slot, role, dtype, {batch, h, tokens, d}, swapped);
    }
  };
  const auto rows = [&](Slot& slot, std::int64_t tokens) {
    if (ragged_) {
      set(slot, Role::kOutput, statistic, {heads, tokens});
    } else {
      set(slot, Role::kOutput, statistic, {batch, heads, tokens});
    }
  };
  operand(q, Role::kInput, heads, sq, dim);
  operand(k, Role::kInput, heads_kv, sk, dim);
  operand(v, Role::kInput, heads_kv, sk, dim_v);
  operand(out, Role::kOutput, heads, sq, dim_v);
  if (backward || bytes.one_in(2)) rows(lse, sq);
  if (bytes.one_in(2)) rows(total, sk);
  if (backward) {
    operand(dout, Role::kInput, heads, sq, dim_v);
    operand(dq, Role::kOutput, heads, sq, dim);
    operand(dk, Role::kOutput, heads_kv, sk, dim);
    operand(dv, Role::kOutput, heads_kv, sk, dim_v);
  }
  if (ragged_) {
    set(cu_q, Role::kIndex, ONEPASS_INT32, {batch + 1});
    set(cu_k, Role::kIndex, ONEPASS_INT32, {batch + 1});
  }
  if (!ragged_ && bytes.one_in(3)) {
    const std::uint8_t broadcast = bytes.byte();
    const auto size = [&](int bit, std::int64_t full) { return broadcast >> bit & 1 ? 1 : full; };
    set(bias, Role::kInput, dtype, {size(0, batch), size(1, heads), size(2, sq), size(3, sk)});
    if (backward && bytes.one_in(2)) {
      set(dbias, Role::kOutput, statistic, {size(0, batch), size(1, heads), size(2, sq), size(3, sk)});
    }
  }
  if (bytes.one_in(3)) {
    set(sinks, Role::kInput, dtype, {heads});
    if (backward && bytes.one_in(2)) set(dsinks, Role::kOutput, statistic, {heads});
  }
  if (bytes.one_in(4)) set(slopes, Role::kInput, ONEPASS_FLOAT32, {heads});
  if (bytes.one_in(4)) set(key_begin, Role::kIndex, ONEPASS_INT32, {batch});
  if (bytes.one_in(4)) set(key_end, Role::kIndex, ONEPASS_INT32, {batch});
  options.flags = bytes.below(16);
  if (bytes.one_in(3)) options.window_left = bytes.below(50);
  if (bytes.one_in(3)) options.window_right = bytes.below(50);
  if (bytes.one_in(4)) options.softcap = 2.0;
  if (bytes.one_in(4)) {
    options.dropout_p = 0.25;
    options.dropout_seed = bytes.byte();
  }
}

// Up to three fields get any value.
void Call::spoil(Bytes& bytes) {
  for (std::int64_t count = bytes.below(4); count > 0; --count) {
    onepass_tensor& t = slots[static_cast<std::size_t>(bytes.below(static_cast<std::int64_t>(slots.size())))]->tensor;
    const std::int64_t value = bytes.wild();
    switch (bytes.below(13)) {
      case 0: t.shape[bytes.below(ONEPASS_MAX_RANK)] = value; break;
      case 1: t.strides[bytes.below(ONEPASS_MAX_RANK)] = value; break;
      case 2: t.rank = static_cast<std::int32_t>(value); break;
      case 3: t.dtype = static_cast<std::int32_t>(value); break;
      case 4: t.device_type = static_cast<std::int32_t>(value); break;
      case 5: t.device_index = static_cast<std::int32_t>(value); break;
      case 6: t.struct_size = static_cast<std::uint32_t>(value); break;
      case 7: t.reserved = static_cast<std::int32_t>(value); break;
      case 8: options.flags = static_cast<std::uint64_t>(value); break;
      case 9: options.window_left = value; break;
      case 10: options.window_right = value; break;
      case 11: options.softcap = value == 7 ? NAN : static_cast<double>(value); break;
      case 12: options.dropout_p = static_cast<double>(value) / 8; break;
    }
  }
}

void Call::allocate(Bytes& bytes) {
  const bool at_front = bytes.one_in(2);
  std::minstd_rand generator(bytes.byte());
  std::normal_distribution<float> normal;
  const std::uint8_t bad_index = bytes.byte();
  for (Slot* slot : slots) {
    if (!slot->given) continue;
    onepass_tensor& t = slot->tensor;
    std::int64_t low, high;
    if (!extent(t, low, high)) {
      usable = false;
      return;
    }
    const std::int64_t size = element_size(t.dtype);
    slot->memory = std::make_unique<GuardedMemory>((high - low) * size, at_front);
    std::byte* const data = slot->memory->data();
    if (high > low) t.data = data - low * size;
    if (slot->role == Role::kOutput) std::fill_n(data, slot->memory->bytes(), kCanary);
    if (slot->role == Role::kInput) {
      for (std::int64_t i = 0; i < high - low; ++i) {
        if (t.dtype >= 0 && t.dtype <= ONEPASS_BFLOAT16) {
          with_float_type(static_cast<DType>(t.dtype), [&]<class T>(T) {
            T x;
            if constexpr (std::is_same_v<T, double>) {
              x = normal(generator);
            } else {
              x = from_float<T>(normal(generator));
            }
            std::memcpy(data + i * size, &x, sizeof(T));
          });
        }
      }
    }
    if (slot->role == Role::kIndex && t.dtype == ONEPASS_INT32) {
      // Rising, so that cu_seqlens are mostly valid; now and then not.
      const std::int64_t tokens = slot == &cu_q ? q.tensor.shape[0] : k.tensor.shape[ragged_ ? 0 : 2];
      for (std::int64_t i = 0; i < high - low; ++i) {
        auto x = static_cast<std::int32_t>(high - low > 1 ? i * tokens / (high - low - 1) : 0);
        if (bad_index > 240) x = static_cast<std::int32_t>(bytes.wild());
        std::memcpy(data + i * size, &x, sizeof(x));
      }
    }
  }
}

Call::Call(Bytes& bytes) {
  describe(bytes);
  spoil(bytes);
  allocate(bytes);
}

// One of the table, and a refusal says what is needed.
onepass_status checked(onepass_status status) {
  REQUIRE(status >= ONEPASS_OK && status <= ONEPASS_UNSUPPORTED);
  const std::string message = status == ONEPASS_OK ? "" : onepass_last_error();
  REQUIRE(status == ONEPASS_OK || message.find("attention") != std::string::npos);
  REQUIRE(status == ONEPASS_OK || status == ONEPASS_UNSUPPORTED || message.find("; need ") != std::string::npos);
  return status;
}

onepass_status Call::run(const char* backend) {
  const auto view = [](const Slot& slot) { return slot.given ? &slot.tensor : nullptr; };
  options.alibi_slopes = view(slopes);
  options.bias = view(bias);
  options.sinks = view(sinks);
  options.key_begin = view(key_begin);
  options.key_end = view(key_end);
  options.flags |= backward && options.flags < 16 ? ONEPASS_DETERMINISTIC : 0;
  onepass_context context = ONEPASS_CONTEXT_INIT;
  context.backend = backend;
  onepass_varlen_shape shape = ONEPASS_VARLEN_SHAPE_INIT;
  shape.cu_seqlens_q = view(cu_q);
  shape.cu_seqlens_k = view(cu_k);
  onepass_attention_outputs outputs = ONEPASS_ATTENTION_OUTPUTS_INIT;
  outputs.out = view(out);
  outputs.lse = view(lse);
  outputs.total_attention = view(total);
  const onepass_status forward =
      checked(ragged_ ? onepass_varlen_attention(view(q), view(k), view(v), &shape, &outputs, &options, &context)
                      : onepass_attention(view(q), view(k), view(v), &outputs, &options, &context));
  forward_accepted = forward == ONEPASS_OK;
  if (!backward) return forward;
  // Also after a refused forward: with the same spoilt arguments, or with what happens to be in out and lse.
  onepass_attention_gradients gradients = ONEPASS_ATTENTION_GRADIENTS_INIT;
  gradients.dq = view(dq);
  gradients.dk = view(dk);
  gradients.dv = view(dv);
  gradients.dbias = view(dbias);
  gradients.dsinks = view(dsinks);
  return checked(ragged_ ? onepass_varlen_attention_backward(view(dout), view(q), view(k), view(v), &shape, view(out),
                                                             view(lse), &gradients, &options, &context)
                         : onepass_attention_backward(view(dout), view(q), view(k), view(v), view(out), view(lse),
                                                      &gradients, &options, &context));
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

}  // namespace
}  // namespace onepass::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace onepass::fuzz;
  Bytes bytes(data, size);
  Call call(bytes);
  if (!call.usable) return 0;
  const std::vector<Slot*> outputs{&call.out, &call.lse, &call.total, &call.dq,
                                   &call.dk,  &call.dv,  &call.dbias, &call.dsinks};
  const onepass_status status = call.run(nullptr);
  if (status != ONEPASS_OK) {
    for (const Slot* slot : outputs) {
      const bool gradient = slot != &call.out && slot != &call.lse && slot != &call.total;
      if (call.backward && !gradient) continue;  // the forward pass before it may have been fine
      for (std::byte b : bytes_of(*slot)) REQUIRE(b == kCanary);
    }
    return 0;
  }
  if (call.backward && !call.forward_accepted) return 0;  // gradients of nothing in particular
  std::vector<std::vector<std::byte>> first;
  std::vector<std::vector<double>> values;
  for (const Slot* slot : outputs) {
    first.push_back(bytes_of(*slot));
    values.push_back(slot->given ? values_of(*slot) : std::vector<double>{});
  }
  REQUIRE(call.run(nullptr) == ONEPASS_OK);
  for (std::size_t i = 0; i < outputs.size(); ++i) REQUIRE(bytes_of(*outputs[i]) == first[i]);
  REQUIRE(call.run("reference") == ONEPASS_OK);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i]->given) require_close(values[i], values_of(*outputs[i]), call.q.tensor.dtype);
  }
  return 0;
}
