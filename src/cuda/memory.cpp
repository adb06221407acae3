// cuda/memory.cpp: the default workspace allocator, stream-ordered and therefore usable inside a graph capture.
#include <memory>
#include <mutex>
#include <vector>

#include "core/parallel.h"
#include "cuda/device.h"

namespace onepass {
namespace {

// Memory that the pool keeps across synchronisations instead of giving it back to the driver.
constexpr std::uint64_t kKeptBytes = std::uint64_t{256} << 20;

class StreamOrderedAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes, Device device, void* stream) override {
    const cuda::DeviceGuard guard(device.index);
    void* block = nullptr;
    const cudaError_t status =
        cudaMallocFromPoolAsync(&block, bytes, pool_of(device.index), static_cast<cudaStream_t>(stream));
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    cuda::check(status, "workspace", "cudaMallocFromPoolAsync");
    return block;
  }

  void deallocate(void* block, std::size_t, Device device, void* stream) override {
    const cuda::DeviceGuard guard(device.index);
    cudaFreeAsync(block, static_cast<cudaStream_t>(stream));
  }

 private:
  // A pool of the library's own: the device's default pool belongs to the caller, who may have tuned it.
  cudaMemPool_t pool_of(int ordinal) {
    const std::lock_guard lock(mutex_);
    if (static_cast<std::size_t>(ordinal) >= pools_.size()) pools_.resize(static_cast<std::size_t>(ordinal) + 1);
    cudaMemPool_t& pool = pools_[static_cast<std::size_t>(ordinal)];
    if (pool != nullptr) return pool;
    if (!cuda::device_info(ordinal).memory_pools) {
      throw Error(ErrorCode::kUnsupported,
                  "workspace: allocator: got none; need one on this GPU, which lacks stream-ordered allocation");
    }
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location = {cudaMemLocationTypeDevice, ordinal};
    cuda::check(cudaMemPoolCreate(&pool, &properties), "workspace", "cudaMemPoolCreate");
    std::uint64_t kept = kKeptBytes;
    cuda::check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "workspace",
                "cudaMemPoolSetAttribute");
    return pool;
  }

  std::mutex mutex_;
  std::vector<cudaMemPool_t> pools_;
};

}  // namespace

Allocator& cuda_allocator() {
  // Never destroyed: the driver may already be gone when static objects are.
  static StreamOrderedAllocator* const allocator = new StreamOrderedAllocator;
  return *allocator;
}

}  // namespace onepass
