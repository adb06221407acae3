// cuda/portable/fragment_tile.cuh: accumulator fragments (layout: common/score.cuh) into tiles of shared memory.
#pragma once

#include "cuda/portable/fragment.cuh"
#include "cuda/portable/tile.cuh"

namespace onepass::cuda {

// Writes a warp's fragment, times `factor`, as elements of T: its rows from `row0` on, its columns from `column0` on.
template <class T, class Tile, int R, int C>
ONEPASS_DEVICE void store_fragment(unsigned char* tile, int row0, const float (&d)[R][C][4], float factor = 1.0f,
                                   int column0 = 0) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + 16 * r + 8 * half + g;
        const float x = d[r][c][2 * half] * factor, y = d[r][c][2 * half + 1] * factor;
        if constexpr (std::is_same_v<T, float>) {
          *reinterpret_cast<float2*>(tile + Tile::offset(row, column0 / 4 + 2 * c + t / 2) + 8 * (t % 2)) = {x, y};
        } else {
          *reinterpret_cast<std::uint32_t*>(tile + Tile::offset(row, column0 / 8 + c) + 4 * t) = pack<T>(x, y);
        }
      }
}

// The same of fragments that are packed (HalfProduct::as_a).
template <class Tile, int kSteps, int R>
ONEPASS_DEVICE void store_packed(unsigned char* tile, int row0, const std::uint32_t (&a)[kSteps][R][4]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = row0 + 16 * r + 8 * (i % 2) + g;
        *reinterpret_cast<std::uint32_t*>(tile + Tile::offset(row, 2 * step + i / 2) + 4 * t) = a[step][r][i];
      }
}

}  // namespace onepass::cuda
