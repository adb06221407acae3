// Linked in builds without CUDA.
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "support/memory.h"

namespace onepass::test {

Memory allocate(std::size_t bytes, Device device) {
  if (device.type != DeviceType::kCpu) throw std::logic_error("device memory in a build without CUDA");
  void* block = std::malloc(bytes);
  if (block == nullptr && bytes != 0) throw std::bad_alloc();
  return Memory(static_cast<std::byte*>(block), [](std::byte* p) { std::free(p); });
}

void synchronize(Device) {}

}  // namespace onepass::test
