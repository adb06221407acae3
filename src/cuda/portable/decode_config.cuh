// cuda/portable/decode_config.cuh: shapes of the decode kernels on tensor cores, and their shared memory.
#pragma once

#include <algorithm>

#include "cuda/portable/decode_rows.cuh"

namespace onepass::cuda {

// T: what the tensor cores multiply. kColumnTiles: of 8 query rows. kPlain: a call without options (see is_plain()). At
// small sizes most of the time goes into instructions that run once, so those calls have less of them.
template <class T_, DType kStorage_, int kHeadDim_, int kColumnTiles_, bool kPlain_>
struct DecodeConfig {
  using T = T_;
  static constexpr DType kStorage = kStorage_;
  static constexpr int kHeadDim = kHeadDim_, kColumnTiles = kColumnTiles_;
  static constexpr bool kPlain = kPlain_;
  static constexpr bool kBytes = kStorage != DType::kFloat16 && kStorage != DType::kBFloat16;
  static constexpr int kRowBytes = kHeadDim * (kBytes ? 1 : 2);
  static constexpr int kTokens = kRowBytes > 128 || kColumnTiles > 1 ? 16 : 32;  // of a unit
  static constexpr int kTokenTiles = kTokens / 16;
  // Of the channels, loaded one after the other: registers hold 8 KB of K and of V, or 2 KB beside outputs of 128
  // registers. Before sm_90 the compiler spills there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kLeastSliceBytes = kPlain || kBytes ? 2048 : 1024;
#else
  static constexpr int kLeastSliceBytes = 2048;
#endif
  static constexpr int kSliceBytes = kColumnTiles * kHeadDim > 256 ? kLeastSliceBytes : kPlain ? 8192 : 4096;
  static constexpr int kSlices = std::max(1, kTokens* kRowBytes / kSliceBytes);
  static constexpr int kKeyPieces = kRowBytes / 64 / kSlices;                 // 16 bytes of a row, a lane and slice
  static constexpr int kValueBytes = std::min(16, kRowBytes / 8 / kSlices);   // of a piece
  static constexpr int kValuePieces = kRowBytes / 8 / kValueBytes / kSlices;  // of a row, a lane and slice
  static constexpr int kChannels = kValueBytes / (kBytes ? 1 : 2);            // of a value piece
  static constexpr int kPairs = kChannels / 2;
  static constexpr int kOutputTiles = kHeadDim / 16;  // [slice][piece][pair of channels]
  static constexpr bool kQueriesInRegisters = kPlain && kColumnTiles == 1 && kHeadDim <= 128;
  static constexpr bool kProductSums = !kBytes;  // see ForwardConfig; 8-bit weights carry the values' scales
  static constexpr bool kDirectQueries = kPlain && !kBytes && kQueriesInRegisters;   // not by way of shared memory
  static constexpr bool kCopiedQueries = kPlain && !kBytes && !kQueriesInRegisters;  // as they are
  static constexpr bool kAlone = kDirectQueries;  // warps may have pairs of their own
  static constexpr int kLongestAlone = 16;        // units of such a pair
  // With many columns the registers of keys are needed until the weights are packed.
  static constexpr bool kKeysEarly = kColumnTiles == 1;

  // One block a multiprocessor: few parts to merge. 12 warps where 168 registers are enough, else 8.
  static constexpr int kWarps = kPlain && kColumnTiles * kHeadDim <= 128 ? 12 : 8;
  static constexpr int kBlocks = 1;
  static constexpr int kThreads = 32 * kWarps;
  // Tiles that always have rows, as plain calls of fewer rows have kernels of fewer tiles: their loads of queries do
  // not wait behind branches. Three of four, or two of head_dim 256, spill.
  static constexpr int kLeastTiles = kPlain && kColumnTiles > 1 && kHeadDim <= 128 ? 2 : 1;
  static constexpr int kRows = 8 * kColumnTiles;
  static constexpr int kQueryPitch = kHeadDim * 2 + (kBytes ? 16 : 64);  // bytes: eight rows hit different banks
  static constexpr int kOutputPitch = kHeadDim + 4;                      // floats

  static constexpr int kTermsOffset = kRows * kQueryPitch;
  static constexpr int kReaderOffset = (kTermsOffset + kRows * static_cast<int>(sizeof(RowTerms)) + 15) / 16 * 16;
  static constexpr int kStateOffset = kReaderOffset + kWarps * 32;
  static constexpr int kOutputOffset =
      (kStateOffset + kWarps * 8 * static_cast<int>(sizeof(PartialState)) + 15) / 16 * 16;
  static constexpr int kSharedBytes = kOutputOffset + kWarps * 8 * kOutputPitch * 4;
};

}  // namespace onepass::cuda
