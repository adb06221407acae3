// cpu/backend.cpp: the SIMD CPU backend's table.
#include "core/backend.h"

namespace onepass {
namespace {

Unsupported available() { return std::nullopt; }
std::string describe() { return "no kernels yet"; }

}  // namespace

const Backend kCpuBackend{"cpu", DeviceType::kCpu, available, describe, nullptr, nullptr, nullptr, nullptr};

}  // namespace onepass
