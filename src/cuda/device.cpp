#include "cuda/device.h"

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace onepass::cuda {
namespace {

constexpr std::int64_t kDefaultSharedMemory = 48 * 1024;  // bytes a kernel may use without opting in

int device_count() {
  static const int count = [] {
    int found = 0;
    const cudaError_t status = cudaGetDeviceCount(&found);
    return status == cudaSuccess ? found : 0;
  }();
  return count;
}

int attribute(cudaDeviceAttr which, int ordinal) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, ordinal), "device", "cudaDeviceGetAttribute");
  return value;
}

std::vector<DeviceInfo> read_devices() {
  std::vector<DeviceInfo> devices(static_cast<std::size_t>(device_count()));
  for (int i = 0; i < device_count(); ++i) {
    devices[i].compute_capability =
        10 * attribute(cudaDevAttrComputeCapabilityMajor, i) + attribute(cudaDevAttrComputeCapabilityMinor, i);
    devices[i].multiprocessors = attribute(cudaDevAttrMultiProcessorCount, i);
    devices[i].shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, i);
    devices[i].l2_bytes = attribute(cudaDevAttrL2CacheSize, i);
    devices[i].memory_pools = attribute(cudaDevAttrMemoryPoolsSupported, i) != 0;
  }
  return devices;
}

}  // namespace

void check(cudaError_t status, const char* operation, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is reported here must not surface again in the caller's next CUDA call
  throw Error(ErrorCode::kDevice,
              std::string(operation) + ": " + call + ": got " + cudaGetErrorString(status) + "; need success");
}

Unsupported driver_available() {
  static const Unsupported reason = []() -> Unsupported {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver";
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    cudaGetLastError();
    if (status != cudaSuccess) return cudaGetErrorString(status);
    if (count == 0) return "no NVIDIA GPU";
    return std::nullopt;
  }();
  return reason;
}

std::string describe_devices() {
  std::string text;
  for (int i = 0; i < device_count(); ++i) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, i), "info", "cudaGetDeviceProperties");
    text += (i == 0 ? "" : ", ") + std::string("cuda:") + std::to_string(i) + " " + properties.name + " (sm_" +
            std::to_string(properties.major) + std::to_string(properties.minor) + ")";
  }
  return text;
}

const DeviceInfo& device_info(int ordinal) {
  static const std::vector<DeviceInfo> devices = read_devices();
  if (ordinal < 0 || ordinal >= static_cast<int>(devices.size())) {
    throw Error(ErrorCode::kInvalidArgument,
                "device: ordinal: got " + std::to_string(ordinal) + "; need below " + std::to_string(devices.size()));
  }
  return devices[static_cast<std::size_t>(ordinal)];
}

DeviceGuard::DeviceGuard(int ordinal) {
  int current = 0;
  check(cudaGetDevice(&current), "device", "cudaGetDevice");
  if (current == ordinal) return;
  check(cudaSetDevice(ordinal), "device", "cudaSetDevice");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

void allow_shared_memory(const void* kernel, std::int64_t bytes, int ordinal) {
  if (bytes <= kDefaultSharedMemory) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, std::int64_t> allowed;
  const std::lock_guard lock(mutex);
  std::int64_t& limit = allowed[{kernel, ordinal}];
  if (limit >= bytes) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), "launch",
        "cudaFuncSetAttribute");
  limit = bytes;
}

}  // namespace onepass::cuda
