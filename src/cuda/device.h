// cuda/device.h: host-side CUDA plumbing that every CUDA backend uses: errors, the current device, limits, launches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "core/backend.h"
#include "onepass/error.h"

namespace onepass::cuda {

// Throws Error(kDevice) "<operation>: <call>: got <CUDA's message>; need success".
void check(cudaError_t status, const char* operation, const char* call);

// nullopt when a driver and at least one GPU are present. Asked once per process.
Unsupported driver_available();

// One line a GPU: ordinal, name, compute capability.
std::string describe_devices();

struct DeviceInfo {
  int compute_capability = 0;  // 10·major + minor
  int multiprocessors = 0;
  std::int64_t shared_memory = 0;  // bytes that one block may opt into
  std::int64_t l2_bytes = 0;
  bool memory_pools = false;
};

// Limits of a device, read once per process; throws Error(kInvalidArgument) for an ordinal that does not exist.
const DeviceInfo& device_info(int ordinal);

// Makes a device current and restores the caller's on exit.
class DeviceGuard {
 public:
  explicit DeviceGuard(int ordinal);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;  // −1: nothing to restore
};

// Lets `kernel` use `bytes` of dynamic shared memory on a device; the driver is asked once per kernel and device.
void allow_shared_memory(const void* kernel, std::int64_t bytes, int ordinal);

inline constexpr std::int64_t kMaxBlocks = 0x7FFFFFFF;  // of a one-dimensional grid

struct LaunchShape {
  std::int64_t blocks;
  int threads;
  std::int64_t shared_memory = 0;
};

// Launches on the current device. A grid of no blocks is a no-op; an error comes back as Error(kDevice).
template <class... Parameters>
void launch(const char* operation, void (*kernel)(Parameters...), const LaunchShape& shape, int ordinal, void* stream,
            const std::type_identity_t<Parameters>&... arguments) {
  if (shape.blocks == 0) return;
  if (shape.blocks > kMaxBlocks) {
    throw Error(ErrorCode::kUnsupported,
                std::string(operation) + ": grid: got " + std::to_string(shape.blocks) + " tiles; need below 2^31");
  }
  const void* const address = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(address, shape.shared_memory, ordinal);
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernel(address, dim3(static_cast<unsigned>(shape.blocks)), dim3(static_cast<unsigned>(shape.threads)),
                         pointers, static_cast<std::size_t>(shape.shared_memory), static_cast<cudaStream_t>(stream)),
        operation, "kernel launch");
}

}  // namespace onepass::cuda
