// cuda/portable/decode_instantiate.cuh: the decode kernels of one head dim; included by decode_<dim>.cu only.
#pragma once

#include "cuda/portable/decode.cuh"

namespace onepass::cuda {

template <class Config>
DecodeKernel describe_decode() {
  return {decode_kernel<Config>, Config::kThreads, Config::kSharedBytes,
          Config::kBlocks,       Config::kRows,    Config::kHeadDim};
}
template <class T, DType kStorage, int kHeadDim, int kColumnTiles>
DecodeKernel plain_or_null(int plain_tokens) {
  using Config = DecodeConfig<T, kStorage, kHeadDim, kColumnTiles, true>;
  return plain_tokens > 0 && plain_tokens % Config::kTokens == 0 ? describe_decode<Config>() : DecodeKernel{};
}

// Eight rows at a time, or as many as registers hold the output of; plain calls have one more step between them.
template <class T, DType kStorage, int kHeadDim>
DecodeKernel decode_of(int rows, int plain_tokens) {
  constexpr int kMost = kHeadDim > 128 ? 2 : 4;
  if (rows > 8 * kMost) return {};
  DecodeKernel plain = rows <= 8    ? plain_or_null<T, kStorage, kHeadDim, 1>(plain_tokens)
                       : rows <= 16 ? plain_or_null<T, kStorage, kHeadDim, 2>(plain_tokens)
                                    : plain_or_null<T, kStorage, kHeadDim, kMost>(plain_tokens);
  if (plain.kernel != nullptr) return plain;
  return rows > 8 ? describe_decode<DecodeConfig<T, kStorage, kHeadDim, kMost, false>>()
                  : describe_decode<DecodeConfig<T, kStorage, kHeadDim, 1, false>>();
}

template <int kHeadDim>
DecodeKernel decode_kernel_for(DType storage, int rows, int plain_tokens) {
  switch (storage) {
    case DType::kFloat16: return decode_of<__half, DType::kFloat16, kHeadDim>(rows, plain_tokens);
    case DType::kBFloat16: return decode_of<__nv_bfloat16, DType::kBFloat16, kHeadDim>(rows, plain_tokens);
    case DType::kInt8: return decode_of<__half, DType::kInt8, kHeadDim>(rows, plain_tokens);
    case DType::kFloat8E4M3: return decode_of<__half, DType::kFloat8E4M3, kHeadDim>(rows, plain_tokens);
    case DType::kFloat8E5M2: return decode_of<__half, DType::kFloat8E5M2, kHeadDim>(rows, plain_tokens);
    default: return {};
  }
}

}  // namespace onepass::cuda
