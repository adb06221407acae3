// support/memory.h: memory that both the tests and a device's kernels can touch.
#pragma once

#include <cstddef>
#include <memory>

#include "onepass/tensor.h"

namespace onepass::test {

using Memory = std::shared_ptr<std::byte[]>;

// Exactly `bytes` long on the CPU, so that AddressSanitizer sees the first byte past it; managed memory on CUDA.
Memory allocate(std::size_t bytes, Device device);

// Waits until the device has written its results.
void synchronize(Device device);

}  // namespace onepass::test
