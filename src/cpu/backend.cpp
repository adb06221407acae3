// cpu/backend.cpp: the SIMD CPU backend's table.
#include "core/backend.h"
#include "cpu/append.h"
#include "cpu/backward.h"
#include "cpu/cached.h"
#include "cpu/forward.h"
#include "cpu/isa.h"
#include "cpu/merge.h"
#include "cpu/total_attention.h"

namespace onepass {
namespace {

Unsupported supports_merge(const MergeProblem& problem) {
  if (problem.dtype == DType::kFloat64) return "dtype float64 (float32, float16 or bfloat16)";
  return std::nullopt;
}

}  // namespace

const Backend kCpuBackend{
    .name = "cpu",
    .device = DeviceType::kCpu,
    .available = cpu::isa_missing,
    .describe = cpu::describe_isa,
    .supports_forward = cpu::supports_forward,
    .forward = cpu::forward,
    .supports_backward = cpu::supports_backward,
    .backward = cpu::backward,
    .supports_piecewise = cpu::supports_piecewise,
    .piecewise = cpu::piecewise,
    .supports_piecewise_backward = cpu::supports_piecewise_backward,
    .piecewise_backward = cpu::piecewise_backward,
    .supports_total_attention = cpu::supports_forward,
    .total_attention = cpu::total_attention,
    .supports_merge = supports_merge,
    .merge = cpu::merge,
    .supports_append = cpu::supports_append,
    .append = cpu::append,
    .supports_cached = cpu::supports_cached,
    .cached = cpu::cached,
};

}  // namespace onepass
