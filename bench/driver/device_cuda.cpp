// Linked in builds with CUDA.
#include <cuda_runtime_api.h>

#include <cstring>

#include "device.h"
#include "onepass/error.h"

namespace onepass::bench {
namespace {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw Error(ErrorCode::kDevice,
              std::string("onepass-bench: ") + call + ": got " + cudaGetErrorString(status) + "; need success");
}

struct Event {
  cudaEvent_t handle = nullptr;
  Event() { check(cudaEventCreate(&handle), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(handle); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
};

}  // namespace

void require_device(Device device) {
  if (device.type == DeviceType::kCuda) check(cudaSetDevice(device.index), "cudaSetDevice");
}

std::string machine_name(Device device) {
  if (device.type == DeviceType::kCpu) return cpu_name();
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device.index), "cudaGetDeviceProperties");
  return properties.name;
}

std::shared_ptr<std::byte[]> allocate(std::size_t bytes, Device device) {
  if (device.type == DeviceType::kCpu) return allocate_host(bytes);
  void* block = nullptr;
  check(cudaMalloc(&block, bytes), "cudaMalloc");
  return {static_cast<std::byte*>(block), [](std::byte* p) { cudaFree(p); }};
}

void copy_to_device(void* target, const void* host, std::size_t bytes, Device device) {
  if (device.type == DeviceType::kCpu) {
    std::memcpy(target, host, bytes);
  } else {
    check(cudaMemcpy(target, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
}

void copy_to_host(void* host, const void* source, std::size_t bytes, Device device) {
  if (device.type == DeviceType::kCpu) {
    std::memcpy(host, source, bytes);
  } else {
    check(cudaMemcpy(host, source, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
}

double milliseconds(Device device, int repeats, const std::function<void()>& call) {
  if (device.type == DeviceType::kCpu) return host_milliseconds(repeats, call);
  Event begin, end;
  check(cudaEventRecord(begin.handle), "cudaEventRecord");
  for (int i = 0; i < repeats; ++i) call();
  check(cudaEventRecord(end.handle), "cudaEventRecord");
  check(cudaEventSynchronize(end.handle), "cudaEventSynchronize");
  float elapsed = 0.0f;
  check(cudaEventElapsedTime(&elapsed, begin.handle, end.handle), "cudaEventElapsedTime");
  return static_cast<double>(elapsed);
}

}  // namespace onepass::bench
