#include "cuda/hopper/tensor_map.h"

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/device.h"
#include "onepass/error.h"

namespace onepass::cuda::hopper {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's entry point: the library links no driver.
Encode encode_function(const char* operation) {
  static void* const address = [operation] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
          operation, "cudaGetDriverEntryPointByVersion");
    if (result != cudaDriverEntryPointSuccess) found = nullptr;
    return found;
  }();
  if (address == nullptr) {
    throw Error(ErrorCode::kDevice, std::string(operation) + ": driver: got none of cuTensorMapEncodeTiled; need 12.0");
  }
  return reinterpret_cast<Encode>(address);
}

constexpr std::int64_t kElementBytes = 2;

// Any legal stride serves for a dimension of size 1.
std::uint64_t stride_bytes(std::int64_t stride, std::int64_t size) {
  return size > 1 ? static_cast<std::uint64_t>(stride * kElementBytes) : 16;
}

}  // namespace

Unsupported tma_rejects(const char* name, const Operand& operand, const OperandShape& shape) {
  if (reinterpret_cast<std::uintptr_t>(operand.data) % 16 != 0) return std::string(name) + ": address off 16 bytes";
  const struct {
    const char* dimension;
    std::int64_t stride, size;
  } strides[] = {{"token", operand.token_stride, shape.tokens},
                 {"head", operand.head_stride, shape.heads},
                 {"batch", operand.batch_stride, shape.batch}};
  for (const auto& [dimension, stride, size] : strides) {
    if (size <= 1) continue;
    if (stride <= 0 || stride * kElementBytes % 16 != 0 || stride * kElementBytes >= std::int64_t{1} << 40) {
      return std::string(name) + ": " + dimension + " stride " + std::to_string(stride) +
             " (TMA needs a positive multiple of 8 elements)";
    }
  }
  return std::nullopt;
}

CUtensorMap tensor_map(const Problem& problem, const Operand& operand, const OperandShape& shape, int box_tokens) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(shape.dim), static_cast<cuuint64_t>(shape.tokens),
                               static_cast<cuuint64_t>(shape.heads), static_cast<cuuint64_t>(shape.batch)};
  const cuuint64_t strides[3] = {stride_bytes(operand.token_stride, shape.tokens),
                                 stride_bytes(operand.head_stride, shape.heads),
                                 stride_bytes(operand.batch_stride, shape.batch)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_tokens), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode_function(problem.operation)(
      &map, problem.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      operand.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw Error(ErrorCode::kDevice, std::string(problem.operation) + ": cuTensorMapEncodeTiled: got CUresult " +
                                        std::to_string(status) + "; need success");
  }
  return map;
}

}  // namespace onepass::cuda::hopper
