// cpu/arena.h: one block carved into aligned arrays. Run the carving over a null block to learn the size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onepass::cpu {

class Arena {
 public:
  // Cache lines are fetched in pairs: arrays of two workers never share 128 bytes.
  static constexpr std::size_t kAlignment = 128;

  explicit Arena(void* block = nullptr) : begin_(static_cast<std::byte*>(block)) {}

  template <class T>
  T* take(std::int64_t count) {
    std::byte* const array = begin_ == nullptr ? nullptr : begin_ + used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(array);
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* begin_;
  std::size_t used_ = 0;
};

}  // namespace onepass::cpu
