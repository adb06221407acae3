// cuda/hopper/tile.cuh: shared-memory tiles in 64-column slabs of 128-byte swizzled rows, and the two matrix products.
//
// A tile of R rows is stored slab by slab: byte (row, column) lies at (column/64)·R·128 + row·128 + swizzled column.
#pragma once

#include "cuda/hopper/config.cuh"
#include "cuda/hopper/ptx.cuh"
#include "cuda/hopper/wgmma.cuh"

namespace onepass::cuda::hopper {

// Matrix descriptor with 128-byte swizzle: groups of 8 rows are 1024 bytes apart, slabs slab_bytes (read for MN-major).
ONEPASS_DEVICE std::uint64_t matrix_descriptor(std::uint32_t address, int slab_bytes) {
  return (std::uint64_t{1} << 62) | (std::uint64_t{1024 / 16} << 32) |
         (static_cast<std::uint64_t>(slab_bytes / 16) << 16) | ((address & 0x3FFFF) >> 4);
}

// S[64][kKeys] = Q[64][kHeadDim]·K[kKeys][kHeadDim]ᵀ: the first kKeys of a block of Config::kKeys.
template <class Config, int kKeys, int R>
ONEPASS_DEVICE void issue_scores(float (&s)[R], std::uint32_t query, std::uint32_t keys) {
  const std::uint64_t a = matrix_descriptor(query, 0), b = matrix_descriptor(keys, 0);
  pin(s);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < Config::kHeadDim / 16; ++i) {
    const int slab = i / 4, step = i % 4 * 2;  // in units of 16 bytes
    Wgmma<typename Config::Element, kKeys>::ss(s, a + slab * (Config::kRows * 8) + step,
                                               b + slab * (Config::kKeys * 8) + step, i != 0);
  }
  wgmma_commit();
}

// O[64][kHeadDim] += P[64][Config::kKeys]·V[Config::kKeys][kHeadDim].
template <class Config, int R, int W>
ONEPASS_DEVICE void issue_values(float (&o)[R], const std::uint32_t (&p)[W], std::uint32_t values) {
  const std::uint64_t b = matrix_descriptor(values, Config::kKeys * 128);
  pin(o);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < Config::kKeys / 16; ++i) {
    Wgmma<typename Config::Element, Config::kHeadDim>::rs(o, p + 4 * i, b + i * (16 * 128 / 16), 1);
  }
  wgmma_commit();
}

}  // namespace onepass::cuda::hopper
