// cuda/unavailable.cpp: linked instead of the CUDA backends in a build without CUDA.
#include "core/backend.h"

namespace onepass {
namespace {

Unsupported available() { return "built without CUDA"; }
std::string describe() { return ""; }

}  // namespace

const Backend kHopperBackend{"hopper", DeviceType::kCuda, available, describe, nullptr, nullptr, nullptr, nullptr};
const Backend kCudaBackend{"cuda", DeviceType::kCuda, available, describe, nullptr, nullptr, nullptr, nullptr};

}  // namespace onepass
