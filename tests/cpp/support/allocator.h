// support/allocator.h: an allocator that knows what it has given out and can fail on demand.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

#include "onepass/execution.h"
#include "support/memory.h"

namespace onepass::test {

// Keeps every block in a map; fails at the nth allocation.
class StrictAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes, Device device, void*) override {
    const std::lock_guard lock(mutex_);
    if (++count_ == fail_at) return nullptr;
    constexpr std::size_t kAlignment = 256;
    Memory memory = test::allocate(bytes + kAlignment, device);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.get());
    void* const block = memory.get() + (kAlignment - address % kAlignment) % kAlignment;
    live_[block] = {std::move(memory), bytes};
    return block;
  }
  void deallocate(void* block, std::size_t bytes, Device device, void*) override {
    const std::lock_guard lock(mutex_);
    const auto found = live_.find(block);
    if (found == live_.end() || found->second.second != bytes) std::abort();
    synchronize(device);  // kernels may still use it
    live_.erase(found);
  }
  bool balanced() const { return live_.empty(); }
  int count() const { return count_; }

  int fail_at = 0;  // 0: never

 private:
  std::mutex mutex_;
  std::map<void*, std::pair<Memory, std::size_t>> live_;
  int count_ = 0;
};

}  // namespace onepass::test
