// fuzz/bytes.h: the fuzzer's bytes as a source of choices; zeros when they run out.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onepass::fuzz {

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  // Of [0, count).
  std::int64_t below(std::int64_t count) { return byte() % count; }
  bool one_in(std::int64_t count) { return byte() % count == 1; }

  // Anything: small, negative, at the limits of 32 and 64 bits.
  std::int64_t wild() {
    constexpr std::int64_t kLimits[] = {-1,        INT64_MIN, INT64_MAX, std::int64_t{1} << 31, std::int64_t{1} << 40,
                                        INT32_MAX, 256,       257,       std::int64_t{1} << 62, INT64_MIN + 1};
    const std::uint8_t choice = byte();
    return choice < 128 ? choice % 12 : choice < 160 ? -static_cast<std::int64_t>(choice - 128) : kLimits[choice % 10];
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

}  // namespace onepass::fuzz
