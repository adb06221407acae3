// cuda/backend.cpp: the portable CUDA backend's table (sm_80 and newer).
#include "core/backend.h"
#include "cuda/device.h"

namespace onepass {

const Backend kCudaBackend{
    .name = "cuda",
    .device = DeviceType::kCuda,
    .available = cuda::driver_available,
    .describe = cuda::describe_devices,
};

}  // namespace onepass
