// fuzz/slots.h: tensors of a call that a fuzzer makes: described, spoilt, then given memory between guard pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bytes.h"
#include "guarded_memory.h"
#include "onepass/onepass_c.h"

namespace onepass::fuzz {

constexpr std::int64_t kMaxBytes = 1 << 20;  // of one tensor
constexpr std::byte kCanary{0xA5};

#define REQUIRE(condition)                                                                                         \
  do {                                                                                                             \
    if (!(condition)) {                                                                                            \
      std::fprintf(stderr, "%s:%d: %s\n  last error: %s\n", __FILE__, __LINE__, #condition, onepass_last_error()); \
      std::abort();                                                                                                \
    }                                                                                                              \
  } while (0)

enum class Role {
  kInput,   // random normal; int8 and float8 below 2 in magnitude before scaling
  kScale,   // positive
  kIndex,   // written by the fuzzer
  kOutput,  // canaries
};

// A tensor and its memory, made after all spoiling so that the memory is as long as the descriptor claims.
struct Slot {
  onepass_tensor tensor = ONEPASS_TENSOR_INIT;
  Role role = Role::kInput;
  bool given = false;
  std::unique_ptr<GuardedMemory> memory = {};

  const onepass_tensor* view() const { return given ? &tensor : nullptr; }
};

void set(Slot& slot, Role role, std::int32_t dtype, std::initializer_list<std::int64_t> shape, bool swapped = false);

// One field of the descriptor gets any value.
void spoil(onepass_tensor& tensor, std::int64_t field, std::int64_t value);
constexpr std::int64_t kSpoilableFields = 8;

// Memory and content; returns the elements, or a negative number when no memory that long can be had.
std::int64_t allocate(Slot& slot, bool at_front, std::minstd_rand& generator);

// Element i of an int32 slot, counted from the lowest address.
void put(Slot& slot, std::int64_t i, std::int32_t value);

std::vector<std::byte> bytes_of(const Slot& slot);

// Elements that the view of a float tensor covers, in row-major order.
std::vector<double> values_of(const Slot& slot);

// Within what two backends may differ by; the same elements are finite.
void require_close(const std::vector<double>& got, const std::vector<double>& want, std::int32_t dtype);

// The status is one of the table, and a refusal says what is needed. Messages begin with an operation's name.
onepass_status checked(onepass_status status);

}  // namespace onepass::fuzz
