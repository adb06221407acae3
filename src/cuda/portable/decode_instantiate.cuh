// cuda/portable/decode_instantiate.cuh: the decode kernels of one head dim; included by decode_<dim>.cu only.
#pragma once

#include "cuda/portable/decode.cuh"

namespace onepass::cuda {

template <class T, DType kStorage, int kHeadDim, int kColumnTiles, bool kPlain>
DecodeKernel describe_decode() {
  using Config = DecodeConfig<T, kStorage, kHeadDim, kColumnTiles, kPlain>;
  return {decode_kernel<Config>, Config::kThreads, Config::kSharedBytes, Config::kBlocks,
          Config::kRows,         Config::kHeadDim, Config::kTokens};
}

// Eight rows at a time, or as many as registers hold the output of.
template <class T, DType kStorage, int kHeadDim>
DecodeKernel decode_of(int rows, bool plain) {
  constexpr int kMost = kHeadDim > 128 ? 2 : 4;
  if (rows > 8 * kMost) return {};
  if (rows > 8) return describe_decode<T, kStorage, kHeadDim, kMost, false>();
  return plain ? describe_decode<T, kStorage, kHeadDim, 1, true>() : describe_decode<T, kStorage, kHeadDim, 1, false>();
}

template <int kHeadDim>
DecodeKernel decode_kernel_for(DType storage, int rows, bool plain) {
  switch (storage) {
    case DType::kFloat16: return decode_of<__half, DType::kFloat16, kHeadDim>(rows, plain);
    case DType::kBFloat16: return decode_of<__nv_bfloat16, DType::kBFloat16, kHeadDim>(rows, plain);
    case DType::kInt8: return decode_of<__half, DType::kInt8, kHeadDim>(rows, plain);
    case DType::kFloat8E4M3: return decode_of<__half, DType::kFloat8E4M3, kHeadDim>(rows, plain);
    case DType::kFloat8E5M2: return decode_of<__half, DType::kFloat8E5M2, kHeadDim>(rows, plain);
    default: return {};
  }
}

}  // namespace onepass::cuda
