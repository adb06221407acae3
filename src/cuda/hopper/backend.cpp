// cuda/hopper/backend.cpp: the Hopper backend's table (sm_90a).
#include "core/backend.h"
#include "cuda/device.h"
#include "cuda/hopper/backward.h"
#include "cuda/hopper/forward.h"
#include "cuda/hopper/total_attention.h"

namespace onepass {

const Backend kHopperBackend{
    .name = "hopper",
    .device = DeviceType::kCuda,
    .available = cuda::driver_available,
    .describe = cuda::describe_devices,
    .supports_forward = cuda::hopper::supports_forward,
    .forward = cuda::hopper::forward,
    .supports_backward = cuda::hopper::supports_backward,
    .backward = cuda::hopper::backward,
    .supports_piecewise = cuda::hopper::supports_piecewise,
    .piecewise = cuda::hopper::piecewise,
    .supports_piecewise_backward = cuda::hopper::supports_piecewise_backward,
    .piecewise_backward = cuda::hopper::piecewise_backward,
    .supports_total_attention = cuda::hopper::supports_total_attention,
    .total_attention = cuda::hopper::total_attention,
};

}  // namespace onepass
