// cuda/backend.cpp: the portable CUDA backend's table (sm_80 and newer).
#include "core/backend.h"
#include "cuda/device.h"
#include "cuda/portable/operations.h"

namespace onepass {

const Backend kCudaBackend{
    .name = "cuda",
    .device = DeviceType::kCuda,
    .available = cuda::driver_available,
    .describe = cuda::describe_devices,
    .supports_forward = cuda::supports_forward,
    .forward = cuda::forward,
    .supports_backward = cuda::supports_backward,
    .backward = cuda::backward,
    .supports_piecewise = cuda::supports_piecewise,
    .piecewise = cuda::piecewise,
    .supports_piecewise_backward = cuda::supports_piecewise_backward,
    .piecewise_backward = cuda::piecewise_backward,
    .supports_total_attention = cuda::supports_total_attention,
    .total_attention = cuda::total_attention,
    .supports_merge = cuda::supports_merge,
    .merge = cuda::merge,
    .supports_append = cuda::supports_append,
    .append = cuda::append,
    .supports_cached = cuda::supports_cached,
    .cached = cuda::cached,
};

}  // namespace onepass
