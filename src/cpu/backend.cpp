// cpu/backend.cpp: the SIMD CPU backend's table.
#include "core/backend.h"
#include "cpu/merge.h"

namespace onepass {
namespace {

Unsupported available() { return std::nullopt; }
std::string describe() { return "no kernels yet"; }
Unsupported supports_merge(const MergeProblem& problem) {
  if (problem.dtype == DType::kFloat64) return "dtype float64 (float32, float16 or bfloat16)";
  return std::nullopt;
}

}  // namespace

const Backend kCpuBackend{
    .name = "cpu",
    .device = DeviceType::kCpu,
    .available = available,
    .describe = describe,
    .supports_merge = supports_merge,
    .merge = cpu::merge,
};

}  // namespace onepass
