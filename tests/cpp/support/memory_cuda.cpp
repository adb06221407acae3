// Linked in builds with CUDA.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "support/memory.h"

namespace onepass::test {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace

Memory allocate(std::size_t bytes, Device device) {
  void* block = nullptr;
  if (device.type == DeviceType::kCpu) {
    block = std::malloc(bytes);
    if (block == nullptr && bytes != 0) throw std::bad_alloc();
    return Memory(static_cast<std::byte*>(block), [](std::byte* p) { std::free(p); });
  }
  check(cudaSetDevice(device.index));
  if (bytes != 0) check(cudaMallocManaged(&block, bytes));
  return Memory(static_cast<std::byte*>(block), [](std::byte* p) { cudaFree(p); });
}

void synchronize(Device device) {
  if (device.type == DeviceType::kCuda) check(cudaDeviceSynchronize());
}

}  // namespace onepass::test
