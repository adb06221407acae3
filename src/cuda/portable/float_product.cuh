// cuda/portable/float_product.cuh: FFMA counterparts of HalfProduct for float32 operands, in the same fragment layout.
#pragma once

#include "cuda/portable/product.cuh"

namespace onepass::cuda {

struct FloatProduct {
  ONEPASS_DEVICE static const float4& at4(const unsigned char* tile, int offset) {
    return *reinterpret_cast<const float4*>(tile + offset);
  }
  ONEPASS_DEVICE static float dot4(float sum, const float4& a, const float4& b) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
  }

  // d += A·Bᵀ: A rows [row, +16R) of tile a, B rows [0, 8C) of tile b, summed over kDepth.
  template <class TileA, class TileB, int kDepth, int R, int C>
  ONEPASS_DEVICE static void rows_by_rows(float (&d)[R][C][4], const unsigned char* tile_a, int row,
                                          const unsigned char* tile_b) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 1
    for (int chunk = 0; chunk < kDepth / 4; ++chunk) {
      float4 a[R][2];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          a[r][half] = at4(tile_a, TileA::offset(row + 16 * r + 8 * half + g, chunk));
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 b = at4(tile_b, TileB::offset(8 * c + 2 * t + e, chunk));
#pragma unroll
          for (int r = 0; r < R; ++r) {
            d[r][c][e] = dot4(d[r][c][e], a[r][0], b);
            d[r][c][2 + e] = dot4(d[r][c][2 + e], a[r][1], b);
          }
        }
    }
  }

  // d += A·B: A rows [row, +16R) of tile a over its first kDepth columns, B rows [0, kDepth) of tile b at columns
  // [column, column + 8C). With kSkipMasked an element of A that is −1 stands for a masked weight, whose value row must
  // not be touched: 0·NaN would not be 0.
  template <class TileA, class TileB, int kDepth, bool kSkipMasked, int R, int C>
  ONEPASS_DEVICE static void rows_by_columns(float (&d)[R][C][4], const unsigned char* tile_a, int row,
                                             const unsigned char* tile_b, int column = 0) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll 1
    for (int k = 0; k < kDepth; ++k) {
      float a[R][2];
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[r][half] = *reinterpret_cast<const float*>(tile_a + TileA::offset(row + 16 * r + 8 * half + g, 0) + 4 * k);
        }
      multiply_row<TileB, kSkipMasked>(d, a, tile_b, k, column + 2 * t);
    }
  }

  // sums[r][0] and [2] += the sums of rows of A that are 8 apart, in the order in which rows_by_columns adds them up.
  template <class TileA, int kDepth, int R>
  ONEPASS_DEVICE static void add_row_sums(float (&sums)[R][4], const unsigned char* tile_a, int row) {
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = TileA::offset(row + 16 * r + 8 * half + lane_id() / 4, 0) + 4 * k;
          const float a = *reinterpret_cast<const float*>(tile_a + at);
          if (!(a < 0.0f)) sums[r][2 * half] += a;
        }
    }
  }

 private:
  template <class TileB, bool kSkipMasked, int R, int C>
  ONEPASS_DEVICE static void multiply_row(float (&d)[R][C][4], const float (&a)[R][2], const unsigned char* tile_b,
                                          int k, int column) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float2 b = *reinterpret_cast<const float2*>(tile_b + TileB::offset(k, 0) + 4 * (8 * c + column));
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (kSkipMasked && a[r][half] < 0.0f) continue;
          d[r][c][2 * half] = fmaf(a[r][half], b.x, d[r][c][2 * half]);
          d[r][c][2 * half + 1] = fmaf(a[r][half], b.y, d[r][c][2 * half + 1]);
        }
    }
  }
};

}  // namespace onepass::cuda
