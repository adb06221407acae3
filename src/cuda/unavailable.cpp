// cuda/unavailable.cpp: linked instead of the CUDA backends in a build without CUDA.
#include "core/backend.h"
#include "core/parallel.h"
#include "onepass/error.h"

namespace onepass {
namespace {

Unsupported available() { return "built without CUDA"; }
std::string describe() { return ""; }

}  // namespace

Allocator& cuda_allocator() {
  throw Error(ErrorCode::kUnsupported, "workspace: device: got cuda; need a build with ONEPASS_CUDA=ON");
}

const Backend kHopperBackend{"hopper", DeviceType::kCuda, available, describe, nullptr, nullptr, nullptr, nullptr};
const Backend kCudaBackend{"cuda", DeviceType::kCuda, available, describe, nullptr, nullptr, nullptr, nullptr};

}  // namespace onepass
