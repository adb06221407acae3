// cuda/hopper/unavailable.cpp: linked instead of the Hopper backend in a build without its kernels.
#include "core/backend.h"

namespace onepass {
namespace {

Unsupported available() { return "built without sm_90a kernels"; }
std::string describe() { return ""; }

}  // namespace

const Backend kHopperBackend{
    .name = "hopper", .device = DeviceType::kCuda, .available = available, .describe = describe};

}  // namespace onepass
