// cuda/graph_launch.h: launches of kernels that are set up while the one before them ends.
#pragma once

#include "cuda/device.h"

namespace onepass::cuda {

// Like launch(). On sm_90 the grid may be set up while the one before it ends; the kernel calls
// wait_for_previous_grid() before it touches memory.
template <class... Parameters>
void launch_dependent(const char* operation, void (*kernel)(Parameters...), const LaunchShape& shape, int ordinal,
                      void* stream, const std::type_identity_t<Parameters>&... arguments) {
  if (shape.blocks == 0 || device_info(ordinal).compute_capability < 90) {
    launch(operation, kernel, shape, ordinal, stream, arguments...);
    return;
  }
  if (shape.blocks > kMaxBlocks) {
    throw Error(ErrorCode::kUnsupported,
                std::string(operation) + ": grid: got " + std::to_string(shape.blocks) + " blocks; need below 2^31");
  }
  const void* const address = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(address, shape.shared_memory, ordinal);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_memory);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = 1;
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernelExC(&config, address, pointers), operation, "kernel launch");
}

}  // namespace onepass::cuda
