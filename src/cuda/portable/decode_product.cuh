// cuda/portable/decode_product.cuh: queries, and the two products of a unit on tensor cores.
#pragma once

#include "cuda/portable/decode_source.cuh"
#include "cuda/portable/decode_state.cuh"

namespace onepass::cuda {

// Four channels of a query: those of one step of a lane's piece of a key.
template <class Config>
ONEPASS_DEVICE uint2 query_fragment(const unsigned char* shared, int row, int step) {
  return *reinterpret_cast<const uint2*>(shared + row * Config::kQueryPitch + 8 * step);
}

template <class Config>
ONEPASS_DEVICE void multiply_keys(float (&s)[Config::kTokenTiles][Config::kColumnTiles][4],
                                  const uint4 (&keys)[Config::kTokens / 8][Config::kKeyPieces], int slice, int tiles,
                                  const uint2* query_fragments, const unsigned char* shared) {
  using T = typename Config::T;
  constexpr int M = Config::kTokenTiles, kSteps = Config::kBytes ? 4 : 2;  // mma of one piece
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int c = 0; c < Config::kKeyPieces; ++c)
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int piece = slice * Config::kKeyPieces + c;
      std::uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const auto* const upper = &keys[2 * m][c].x;
        const auto* const lower = &keys[2 * m + 1][c].x;
        if constexpr (Config::kBytes) {
          const HalfQuad up = widen<Config::kStorage>(upper[step]), low = widen<Config::kStorage>(lower[step]);
          a[m][0] = up.x, a[m][1] = low.x, a[m][2] = up.y, a[m][3] = low.y;
        } else {
          a[m][0] = upper[2 * step], a[m][1] = lower[2 * step];
          a[m][2] = upper[2 * step + 1], a[m][3] = lower[2 * step + 1];
        }
      }
#pragma unroll
      for (int n = 0; n < Config::kColumnTiles; ++n) {
        if (n >= Config::kLeastTiles && n >= tiles) break;
        uint2 q;
        if constexpr (Config::kQueriesInRegisters) {
          q = query_fragments[piece * kSteps + step];
        } else {
          q = query_fragment<Config>(shared, 8 * n + g, (piece * 4 + t) * kSteps + step);
        }
#pragma unroll
        for (int m = 0; m < M; ++m) mma<T>(s[m][n], a[m], q.x, q.y);
      }
    }
}

// weights[n][2m + i]: of tokens 16m + 8i + 2t + {0, 1} for query row 8n + g.
template <class Config>
ONEPASS_DEVICE void multiply_values(DecodeState<Config>& state,
                                    const uint4 (&values)[Config::kTokenTiles][4][Config::kValuePieces], int slice,
                                    int tiles,
                                    const std::uint32_t (&weights)[Config::kColumnTiles][2 * Config::kTokenTiles]) {
  using T = typename Config::T;
#pragma unroll
  for (int m = 0; m < Config::kTokenTiles; ++m)
#pragma unroll
    for (int c = 0; c < Config::kValuePieces; ++c)
#pragma unroll
      for (int w = 0; w < Config::kValueBytes / 4; ++w) {
        const auto word = [&](int i) {
          const uint4& x = values[m][i][c];
          return w == 0 ? x.x : w == 1 ? x.y : w == 2 ? x.z : x.w;
        };
        constexpr int kOfWord = Config::kBytes ? 2 : 1;  // mma of one word
        const int tile = (slice * Config::kValuePieces + c) * Config::kPairs + w * kOfWord;
#pragma unroll
        for (int i = 0; i < kOfWord; ++i) {
          // Rows g and 8 + g of the mma are two neighbouring channels; each register pairs two tokens.
          std::uint32_t a[4];
          if constexpr (Config::kBytes) {
            const int select = i == 0 ? 0x5140 : 0x7362;
            const HalfQuad low = widen<Config::kStorage>(__byte_perm(word(0), word(1), select));
            const HalfQuad high = widen<Config::kStorage>(__byte_perm(word(2), word(3), select));
            a[0] = low.x, a[1] = low.y, a[2] = high.x, a[3] = high.y;
          } else {
            a[0] = __byte_perm(word(0), word(1), 0x5410), a[1] = __byte_perm(word(0), word(1), 0x7632);
            a[2] = __byte_perm(word(2), word(3), 0x5410), a[3] = __byte_perm(word(2), word(3), 0x7632);
          }
#pragma unroll
          for (int n = 0; n < Config::kColumnTiles; ++n) {
            if (n == 0 || n < tiles) mma<T>(state.out[n][tile + i], a, weights[n][2 * m], weights[n][2 * m + 1]);
          }
        }
      }
}

}  // namespace onepass::cuda
