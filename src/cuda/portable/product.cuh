// cuda/portable/product.cuh: the matrix products of one warp, out of shared memory into mma fragments.
//
// HalfProduct uses the tensor cores. FloatProduct fills the same fragment layout with FFMA, because three tf32 products
// would round the accumulation of float32 operands more coarsely than a plain float32 implementation does.
// Names: "rows × rows" is A·Bᵀ (both row-major along the summed dimension); "rows × columns" is A·B.
#pragma once

#include "cuda/portable/fragment.cuh"
#include "cuda/portable/tile.cuh"

namespace onepass::cuda {

template <class T>
struct HalfProduct {
  // A fragment of the 16×16 block at (row, 16·step) of a tile.
  template <class Tile>
  ONEPASS_DEVICE static void load_a(std::uint32_t (&a)[4], std::uint32_t tile, int row, int step) {
    const int lane = lane_id();
    load_matrices(a, tile + Tile::offset(row + lane % 16, 2 * step + lane / 16));
  }
  // The same block of the transposed tile: rows of A are columns of the tile.
  template <class Tile>
  ONEPASS_DEVICE static void load_a_transposed(std::uint32_t (&a)[4], std::uint32_t tile, int row, int step) {
    const int lane = lane_id();
    load_matrices_transposed(a, tile + Tile::offset(16 * step + (lane / 16) * 8 + lane % 8, row / 8 + (lane / 8) % 2));
  }
  // B fragments of two n8 tiles: B is the transpose of tile rows [row, row + 16) at summed columns 16·step.
  template <class Tile>
  ONEPASS_DEVICE static void load_b_rows(std::uint32_t (&b)[4], std::uint32_t tile, int row, int step) {
    const int lane = lane_id();
    load_matrices(b, tile + Tile::offset(row + (lane / 16) * 8 + lane % 8, 2 * step + (lane / 8) % 2));
  }
  // B fragments of two n8 tiles: B is tile rows [16·step, +16) at columns [column, column + 16).
  template <class Tile>
  ONEPASS_DEVICE static void load_b_columns(std::uint32_t (&b)[4], std::uint32_t tile, int step, int column) {
    const int lane = lane_id();
    load_matrices_transposed(b, tile + Tile::offset(16 * step + lane % 16, column / 8 + lane / 16));
  }

  // d += A·Bᵀ: A rows [row, +16R) of tile a, B rows [0, 8C) of tile b, summed over kDepth.
  template <class TileA, class TileB, int kDepth, int R, int C>
  ONEPASS_DEVICE static void rows_by_rows(float (&d)[R][C][4], std::uint32_t tile_a, int row, std::uint32_t tile_b) {
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      std::uint32_t a[R][4];
#pragma unroll
      for (int r = 0; r < R; ++r) load_a<TileA>(a[r], tile_a, row + 16 * r, step);
      multiply_rows<TileB>(d, a, tile_b, step);
    }
  }

  // The same with A already in registers.
  template <class TileB, int kSteps, int R, int C>
  ONEPASS_DEVICE static void fragments_by_rows(float (&d)[R][C][4], const std::uint32_t (&a)[kSteps][R][4],
                                               std::uint32_t tile_b) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) multiply_rows<TileB>(d, a[step], tile_b, step);
  }

  // d += P·B: P in registers (as accumulators, already packed), B rows of tile b.
  template <class TileB, int kSteps, int R, int C>
  ONEPASS_DEVICE static void fragments_by_columns(float (&d)[R][C][4], const std::uint32_t (&p)[kSteps][R][4],
                                                  std::uint32_t tile_b) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) multiply_columns<TileB>(d, p[step], tile_b, step, 0);
  }

  // The same with P in shared memory: rows [row, +16R) of tile a over its first kDepth columns, and columns [column,
  // +8C) of tile b.
  template <class TileA, class TileB, int kDepth, int R, int C>
  ONEPASS_DEVICE static void rows_by_columns(float (&d)[R][C][4], std::uint32_t tile_a, int row, std::uint32_t tile_b,
                                             int column) {
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      std::uint32_t a[R][4];
#pragma unroll
      for (int r = 0; r < R; ++r) load_a<TileA>(a[r], tile_a, row + 16 * r, step);
      multiply_columns<TileB>(d, a, tile_b, step, column);
    }
  }

  // sums[r] += the rows of P, in the layout of an accumulator whose columns are all the same.
  template <int kSteps, int R>
  ONEPASS_DEVICE static void add_row_sums(float (&sums)[R][4], const std::uint32_t (&p)[kSteps][R][4]) {
    constexpr std::uint32_t kOnes = std::is_same_v<T, __half> ? 0x3C003C00u : 0x3F803F80u;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int r = 0; r < R; ++r) mma<T>(sums[r], p[step][r], kOnes, kOnes);
  }

  // d += Aᵀ·B: rows of d are columns [row, +16R) of tile a, columns of d are columns [column, +8C) of tile b, summed
  // over the tiles' first kDepth rows.
  template <class TileA, class TileB, int kDepth, int R, int C>
  ONEPASS_DEVICE static void columns_by_columns(float (&d)[R][C][4], std::uint32_t tile_a, int row,
                                                std::uint32_t tile_b, int column) {
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      std::uint32_t a[R][4];
#pragma unroll
      for (int r = 0; r < R; ++r) load_a_transposed<TileA>(a[r], tile_a, row + 16 * r, step);
      multiply_columns<TileB>(d, a, tile_b, step, column);
    }
  }

  // Accumulators of two neighbouring n8 tiles are the A fragment of one k16 step.
  template <int R, int C>
  ONEPASS_DEVICE static void as_a(std::uint32_t (&a)[C / 2][R][4], const float (&d)[R][C][4]) {
#pragma unroll
    for (int step = 0; step < C / 2; ++step)
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const pair = &d[r][2 * step + i / 2][2 * (i % 2)];
          a[step][r][i] = pack<T>(pair[0], pair[1]);
        }
  }

 private:
  template <class TileB, int R, int C>
  ONEPASS_DEVICE static void multiply_columns(float (&d)[R][C][4], const std::uint32_t (&a)[R][4], std::uint32_t tile_b,
                                              int step, int column) {
#pragma unroll
    for (int c = 0; c < C; c += 2) {
      std::uint32_t b[4];
      load_b_columns<TileB>(b, tile_b, step, column + 8 * c);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        mma<T>(d[r][c], a[r], b[0], b[1]);
        mma<T>(d[r][c + 1], a[r], b[2], b[3]);
      }
    }
  }
  template <class TileB, int R, int C>
  ONEPASS_DEVICE static void multiply_rows(float (&d)[R][C][4], const std::uint32_t (&a)[R][4], std::uint32_t tile_b,
                                           int step) {
#pragma unroll
    for (int c = 0; c < C; c += 2) {
      std::uint32_t b[4];
      load_b_rows<TileB>(b, tile_b, 8 * c, step);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        mma<T>(d[r][c], a[r], b[0], b[1]);
        mma<T>(d[r][c + 1], a[r], b[2], b[3]);
      }
    }
  }
};

}  // namespace onepass::cuda
