// fuzz/guarded_memory.h: memory whose first byte past the end (or before the beginning) faults.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace onepass::fuzz {

class GuardedMemory {
 public:
  // `bytes` usable bytes that end (or, at_front, begin) at an inaccessible page.
  GuardedMemory(std::size_t bytes, bool at_front) : bytes_(bytes) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t usable = (bytes + page - 1) / page * page;
    mapped_ = usable + 2 * page;
    void* block = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) std::abort();
    block_ = static_cast<std::byte*>(block);
    if (usable != 0 && mprotect(block_ + page, usable, PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = block_ + page + (at_front ? 0 : usable - bytes);
  }
  ~GuardedMemory() { munmap(block_, mapped_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_, mapped_;
  std::byte* block_;
  std::byte* data_;
};

}  // namespace onepass::fuzz
