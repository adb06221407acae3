// cuda/portable/decode_source.cuh: a warp's way through the units of its share, and the loads of a unit's keys and
// values straight into the registers that hold mma fragments.
#pragma once

#include "cuda/portable/decode_config.cuh"
#include "cuda/portable/decode_share.cuh"
#include "cuda/portable/fragment.cuh"

namespace onepass::cuda {

// A warp's next unit, and, in shared memory, the pair that holds it. A block's warps take turns, or have pairs of their
// own, kWarps apart.
struct ReaderPair {
  PairUnits units;
  int batch, head;
};
struct Reader {
  int token;    // the unit's first
  int in_pair;  // units of the pair from that one on
  int left;     // units of the block's share from that one on; none: ≤ 0
};

// To the pair that has the unit.
template <class Config>
ONEPASS_DEVICE void settle(Reader& reader, ReaderPair* shared, const DecodeArguments& a) {
  if (reader.in_pair > 0 || reader.left <= 0) return;
  ReaderPair pair = *shared;
#pragma unroll 1
  do {
    if (++pair.head == a.heads_kv) {
      pair.head = 0;
      do {
        pair.batch = min(pair.batch + 1, a.batch - 1);  // ends the guess of a share from lengths that change
        pair.units = units_of<Config>(a, pair.batch);
      } while (pair.units.count == 0);
    }
    reader.in_pair += pair.units.count;
  } while (reader.in_pair <= 0);
  __syncwarp();
  *shared = pair;
  __syncwarp();
  reader.token = (pair.units.first + pair.units.count - reader.in_pair) * Config::kTokens;
}

// To the pair `count` pairs behind.
template <class Config>
ONEPASS_DEVICE void pass_pairs(Reader& reader, ReaderPair* shared, const DecodeArguments& a, int count) {
  ReaderPair pair = *shared;
  reader.left -= reader.in_pair;
  ++pair.head;
  --count;
#pragma unroll 1
  while (reader.left > 0) {
    if (pair.head == a.heads_kv) {
      pair.head = 0;
      pair.batch = min(pair.batch + 1, a.batch - 1);
      pair.units = units_of<Config>(a, pair.batch);
    }
    const int passed = min(count, a.heads_kv - pair.head);
    pair.head += passed;
    count -= passed;
    reader.left -= passed * pair.units.count;
    if (pair.head < a.heads_kv) break;
  }
  reader.in_pair = pair.units.count;
  reader.token = pair.units.first * Config::kTokens;
  __syncwarp();
  *shared = pair;
  __syncwarp();
}

template <class Config>
ONEPASS_DEVICE void advance(Reader& reader, ReaderPair* shared, const DecodeArguments& a, bool alone) {
  if (alone) {
    reader.token += Config::kTokens;
    --reader.left;
    if (--reader.in_pair == 0) pass_pairs<Config>(reader, shared, a, Config::kWarps);
    return;
  }
  reader.token += Config::kWarps * Config::kTokens;
  reader.in_pair -= Config::kWarps;
  reader.left -= Config::kWarps;
  settle<Config>(reader, shared, a);
}

// Where the keys of a unit lie. Plain calls: one after the other, whatever they are stored in, and the visible ones
// are [low, high]; what is loaded instead of others is not zero.
struct PlainUnit {
  const char *key, *value;
  int token, low, high;
  float key_scale, value_scale;  // of token lane_id()

  ONEPASS_DEVICE bool is_live(int i) const { return i >= low && i <= high; }
};
// Else: each of the first kTokens lanes knows one; others are loaded as zeros.
struct ListedUnit {
  std::int64_t key, value;  // bytes from the storage's begin
  int token;
  std::uint32_t live;  // bit t: token t exists and some row sees it
  float key_scale, value_scale;

  ONEPASS_DEVICE bool is_live(int i) const { return live >> i & 1; }
};
template <class Config>
using UnitOf = std::conditional_t<Config::kPlain, PlainUnit, ListedUnit>;

template <class Config>
ONEPASS_DEVICE bool is_whole(const PlainUnit& unit) {
  return unit.low == 0 && unit.high == Config::kTokens - 1;
}
template <class Config>
ONEPASS_DEVICE bool is_whole(const ListedUnit& unit) {
  return unit.live == (Config::kTokens == 32 ? ~0u : 0xFFFFu);
}

template <class Config>
ONEPASS_DEVICE void find_unit(PlainUnit& unit, const DecodeArguments& a, const Reader& reader, const ReaderPair& pair) {
  if constexpr (Config::kStorage == DType::kInt8) {
    // A token that is nowhere must not raise the accumulator's unit.
    unit.key_scale = unit.value_scale = a.problem.cache.granularity == ScaleGranularity::kTensor ? 1.0f : 0.0f;
  }
  unit.token = reader.token;
  unit.low = max(pair.units.keys.begin - reader.token, 0);
  unit.high = reader.left > 0 ? min(pair.units.keys.end - reader.token, Config::kTokens) - 1 : -1;
  if (unit.high < unit.low) return;
  int block = pair.batch, offset = reader.token;
  if (a.page_table != nullptr) {
    const int page = a.block_tokens(reader.token);
    block = load_index(a.page_table + std::int64_t{pair.batch} * a.page_table_stride + page);
    offset -= page * a.page_tokens;
  } else if (a.batch_index != nullptr) {
    block = load_index(a.batch_index + pair.batch);
  }
  if (static_cast<unsigned>(block) >= static_cast<unsigned>(a.num_blocks)) {
    unit.high = -1;
    return;
  }
  const auto place = [&](const StoredRows& rows) {
    return rows.data + block * rows.block_stride + pair.head * rows.head_stride +
           offset * std::int64_t{rows.token_stride};
  };
  unit.key = place(a.k);
  unit.value = place(a.v);
  if constexpr (Config::kStorage == DType::kInt8) {
    const KVStorage& cache = a.problem.cache;
    if (cache.granularity != ScaleGranularity::kTensor && unit.is_live(lane_id())) {
      const TokenSlot slot{block, offset + lane_id()};
      // Past the first-level cache, like lengths: before the grid ahead is done this is a guess.
      unit.key_scale = __ldcg(cache.k_scale.data + offset_in(cache.k_scale, slot, pair.head));
      unit.value_scale = __ldcg(cache.v_scale.data + offset_in(cache.v_scale, slot, pair.head));
    }
  }
}

template <class Config>
ONEPASS_DEVICE void find_unit(ListedUnit& unit, const DecodeArguments& a, const Reader& reader,
                              const ReaderPair& pair) {
  const KVStorage& cache = a.problem.cache;
  const int token = reader.token + lane_id();
  bool live = lane_id() < Config::kTokens && reader.left > 0 && pair.units.keys.contains(token);
  TokenSlot slot{0, 0};
  if (live) slot = slot_of(cache, a.block_tokens, pair.batch, token);
  live = live && slot.block >= 0;
  constexpr int kElementBytes = Config::kBytes ? 1 : 2;
  // A token that is nowhere must not raise the accumulator's unit: its scale is 0 where tokens have scales of their
  // own.
  const float scale = cache.granularity == ScaleGranularity::kTensor ? 1.0f : 0.0f;
  unit = {0, 0, reader.token, __ballot_sync(~0u, live), scale, scale};
  if (live) {
    unit.key = offset_in(cache.k, slot, pair.head) * kElementBytes;
    unit.value = offset_in(cache.v, slot, pair.head) * kElementBytes;
    if constexpr (Config::kStorage == DType::kInt8) {
      if (cache.granularity != ScaleGranularity::kTensor) {
        unit.key_scale = cache.k_scale.data[offset_in(cache.k_scale, slot, pair.head)];
        unit.value_scale = cache.v_scale.data[offset_in(cache.v_scale, slot, pair.head)];
      }
    }
  }
}

// Asks rows [first, last] of a unit, or behind it, into the second-level cache.
template <class Config>
ONEPASS_DEVICE void prefetch_rows(const PlainUnit& unit, const DecodeArguments& a, int first, int last) {
  constexpr int kLines = std::max(1, Config::kRowBytes / 128);  // of a row
#pragma unroll
  for (int i = 0; i < Config::kTokens * kLines; i += 32) {
    const int row = min(first + (i + lane_id()) / kLines, last), byte = (i + lane_id()) % kLines * 128;
    prefetch_line(unit.key + std::int64_t{row} * a.k.token_stride + byte);
    prefetch_line(unit.value + std::int64_t{row} * a.v.token_stride + byte);
  }
}
template <class Config>
ONEPASS_DEVICE void prefetch_unit(const PlainUnit& unit, const DecodeArguments& a) {
  if (unit.high >= unit.low) prefetch_rows<Config>(unit, a, unit.low, unit.high);
}
// The warp's unit after this one, where it is not far to seek.
template <class Config>
ONEPASS_DEVICE void prefetch_second(const PlainUnit& unit, const DecodeArguments& a, const Reader& reader,
                                    const ReaderPair& pair, bool alone) {
  const int units = alone ? 1 : Config::kWarps, ahead = units * Config::kTokens;
  const int last = min(pair.units.keys.end - unit.token, ahead + Config::kTokens) - 1;
  if (a.page_table != nullptr || unit.high < unit.low || reader.left <= units || last < ahead) return;
  prefetch_rows<Config>(unit, a, ahead, last);
}

// Token rows g, 8 + g, … of a unit; lane t of a quad takes every fourth piece.
template <class Config, class Unit>
ONEPASS_DEVICE void request_keys(uint4 (&data)[Config::kTokens / 8][Config::kKeyPieces], const DecodeArguments& a,
                                 const Unit& unit, int slice) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  if constexpr (Config::kPlain) {
    if (unit.high < unit.low) return;
    const char* const first = unit.key + slice * Config::kKeyPieces * 64 + 16 * t;
#pragma unroll
    for (int r = 0; r < Config::kTokens / 8; ++r) {
      const char* const row = first + std::int64_t{min(max(8 * r + g, unit.low), unit.high) * a.k.token_stride};
#pragma unroll
      for (int c = 0; c < Config::kKeyPieces; ++c) load_streamed<16>(data[r][c], row + 64 * c);
    }
  } else {
    const KVStorage& cache = a.problem.cache;
    const int row_bytes = static_cast<int>(cache.head_dim) * (Config::kBytes ? 1 : 2);
#pragma unroll
    for (int r = 0; r < Config::kTokens / 8; ++r) {
      const std::int64_t offset = __shfl_sync(~0u, unit.key, 8 * r + g);
      const bool live = unit.is_live(8 * r + g);
#pragma unroll
      for (int c = 0; c < Config::kKeyPieces; ++c) {
        const int column = (slice * Config::kKeyPieces + c) * 64 + 16 * t;
        load_streamed<16>(data[r][c], static_cast<const char*>(cache.k.data) + offset + column,
                          live && column < row_bytes);
      }
    }
  }
}

// Token whose values a lane has as its i-th of four, of 16.
ONEPASS_DEVICE int value_token(int m, int i) { return 16 * m + 8 * (i / 2) + 2 * (lane_id() % 4) + i % 2; }

// Tokens 2t, 2t + 1, 8 + 2t and 9 + 2t of every 16; lane g takes every eighth piece.
template <class Config, class Unit>
ONEPASS_DEVICE void request_values(uint4 (&data)[Config::kTokenTiles][4][Config::kValuePieces],
                                   const DecodeArguments& a, const Unit& unit, int slice) {
  const int g = lane_id() / 4;
  if constexpr (Config::kPlain) {
    if (unit.high < unit.low) return;
    const char* const first = unit.value + (slice * Config::kValuePieces * 8 + g) * Config::kValueBytes;
#pragma unroll
    for (int m = 0; m < Config::kTokenTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const char* const row =
            first + std::int64_t{min(max(value_token(m, i), unit.low), unit.high) * a.v.token_stride};
#pragma unroll
        for (int c = 0; c < Config::kValuePieces; ++c) {
          load_streamed<Config::kValueBytes>(data[m][i][c], row + 8 * c * Config::kValueBytes);
        }
      }
  } else {
    const KVStorage& cache = a.problem.cache;
    const int row_bytes = static_cast<int>(cache.head_dim_v) * (Config::kBytes ? 1 : 2);
#pragma unroll
    for (int m = 0; m < Config::kTokenTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::int64_t offset = __shfl_sync(~0u, unit.value, value_token(m, i));
        const bool live = unit.is_live(value_token(m, i));
#pragma unroll
        for (int c = 0; c < Config::kValuePieces; ++c) {
          const int column = ((slice * Config::kValuePieces + c) * 8 + g) * Config::kValueBytes;
          load_streamed<Config::kValueBytes>(data[m][i][c], static_cast<const char*>(cache.v.data) + offset + column,
                                             live && column < row_bytes);
        }
      }
  }
}

// Zeroes the values of tokens that no row sees, where loads have not done so.
template <class Config>
ONEPASS_DEVICE void drop_hidden(uint4 (&values)[Config::kTokenTiles][4][Config::kValuePieces], const PlainUnit& unit) {
#pragma unroll
  for (int m = 0; m < Config::kTokenTiles; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool live = unit.is_live(value_token(m, i));
#pragma unroll
      for (int c = 0; c < Config::kValuePieces; ++c) {
        uint4& x = values[m][i][c];
        x = {live ? x.x : 0, live ? x.y : 0, live ? x.z : 0, live ? x.w : 0};
      }
    }
}

// Zeroes infinities and NaNs among the values; whether there were any.
template <class Config>
ONEPASS_DEVICE bool make_values_finite(uint4 (&values)[Config::kTokenTiles][4][Config::kValuePieces]) {
  bool found = false;
#pragma unroll
  for (int m = 0; m < Config::kTokenTiles; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int c = 0; c < Config::kValuePieces; ++c) {
        uint4& x = values[m][i][c];
        found |= make_word_finite<Config::kStorage>(x.x) | make_word_finite<Config::kStorage>(x.y) |
                 make_word_finite<Config::kStorage>(x.z) | make_word_finite<Config::kStorage>(x.w);
      }
  return __any_sync(~0u, found);
}

}  // namespace onepass::cuda
