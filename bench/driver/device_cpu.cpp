// Linked in builds without CUDA.
#include <cstring>

#include "device.h"
#include "onepass/error.h"

namespace onepass::bench {

void require_device(Device device) {
  if (device.type != DeviceType::kCpu) {
    throw Error(ErrorCode::kUnsupported, "onepass-bench: --device: got cuda; need cpu, in a build without CUDA");
  }
}

std::string machine_name(Device) { return cpu_name(); }
std::shared_ptr<std::byte[]> allocate(std::size_t bytes, Device) { return allocate_host(bytes); }
void copy_to_device(void* target, const void* host, std::size_t bytes, Device) { std::memcpy(target, host, bytes); }
void copy_to_host(void* host, const void* source, std::size_t bytes, Device) { std::memcpy(host, source, bytes); }
double milliseconds(Device, int repeats, const std::function<void()>& call) { return host_milliseconds(repeats, call); }

}  // namespace onepass::bench
