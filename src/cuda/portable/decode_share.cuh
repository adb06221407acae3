// cuda/portable/decode_share.cuh: which units of which pairs a block computes.
#pragma once

#include "cuda/portable/cached_sequence.cuh"

namespace onepass::cuda {

// Units of unit_tokens keys that rows of one pair see between them, and the keys themselves.
struct PairUnits {
  Range keys;
  int first, count;
};

// Of rows [first_row, first_row + a.rows). No units: no such rows, or another kernel's sequence. Rows that see nothing
// have one unit, so that somebody writes them.
ONEPASS_DEVICE PairUnits units_of(const DecodeArguments& a, const DeviceSequence& sequence, int first_row,
                                  int unit_tokens) {
  const int rows = sequence.seqlen_q * a.group_size;
  if (first_row >= rows || rows > a.max_rows) return {{0, 0}, 0, 0};
  const int last_row = min(first_row + a.rows, rows) - 1;
  const Range keys = tile_keys(a, sequence, a.group(first_row), a.group(last_row)).any;
  if (keys.begin >= keys.end) return {{0, 0}, 0, 1};
  const int first = keys.begin / unit_tokens;
  return {keys, first, (keys.end + unit_tokens - 1) / unit_tokens - first};
}
// Of all rows, which fill at most one block of them.
template <class Config>
ONEPASS_DEVICE PairUnits units_of(const DecodeArguments& a, const DeviceSequence& sequence) {
  const int rows = sequence.seqlen_q * a.group_size;
  if constexpr (!Config::kPlain) {
    if (rows == 0 || rows > a.max_rows) return {{0, 0}, 0, 0};
  }
  const Range keys = tile_keys(a, sequence, 0, sequence.seqlen_q - 1).any;
  if (keys.begin >= keys.end) return {{0, 0}, 0, 1};
  const int first = keys.begin / Config::kTokens;
  return {keys, first, (keys.end + Config::kTokens - 1) / Config::kTokens - first};
}
template <class Config>
ONEPASS_DEVICE PairUnits units_of(const DecodeArguments& a, int batch) {
  return units_of<Config>(a, cached_sequence<Config::kPlain>(a, batch));
}

// Units [begin, begin + size) of a pair's are part `part` of `parts`.
struct Part {
  int begin, size;
};
ONEPASS_DEVICE Part part_of(std::int64_t count, int part, int parts) {
  const int begin = static_cast<int>(count * part / parts);
  return {begin, static_cast<int>(count * (part + 1) / parts) - begin};
}

// A place in the line of units, and how many units from there on are this block's.
struct Share {
  int batch = 0, head = 0, unit = 0, left = 0;
  int size = 0, end = 0;            // of every share; of this one, in the line
  bool alone = false;               // every warp has pairs of its own, all of which are short
  PairUnits pair = {{0, 0}, 0, 0};  // of the first pair
  DeviceSequence sequence = {};     // plain calls: its sequence
  DeviceSequence of_lane = {};      // plain calls: sequence `lane`, as the share was worked out of it
};

// The part of a block that has one part of one pair.
template <class Config>
ONEPASS_DEVICE Share fixed_share(const DecodeArguments& a) {
  const int pair = blockIdx.x / a.parts, part = blockIdx.x % a.parts;
  const PairUnits units = units_of<Config>(a, pair / a.heads_kv);
  const int parts = min(a.parts, units.count);  // others have no units
  if (part >= parts) return {};
  const Part mine = part_of(units.count, part, parts);
  return {pair / a.heads_kv, pair % a.heads_kv, mine.begin, mine.size, 0, 0, false, units, {}};
}

// Equal shares of the line, in order; every warp works it out for itself. In plain calls a lane has up to four
// sequences 32 apart, so that 128 of them cost one wait for memory.
template <class Config>
ONEPASS_DEVICE Share equal_share(const DecodeArguments& a) {
  constexpr int kEach = Config::kPlain ? 4 : 1, kAtOnce = 32 * kEach;
  const int lane = threadIdx.x % 32;
  int total = 0, size = 0, begin = 0, before = 0, longest = 0;
  bool counted = false;  // first all units, then, in a second pass where the lanes were too few, the share's begin
  DeviceSequence sequences[kEach];
  int ends[kEach], units[kEach];  // of the sequences up to a lane's, from the first of these 32 on; of its own
  int sums[kEach + 1] = {};       // of the 32s before
  int first = 0;
#pragma unroll 1
  for (;; first += kAtOnce) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i > 0 && first + 32 * i >= a.batch) break;
      sequences[i] = cached_sequence<Config::kPlain>(a, min(first + 32 * i + lane, a.batch - 1));
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      ends[i] = units[i] = 0;
      sums[i + 1] = sums[i];
      if (i > 0 && first + 32 * i >= a.batch) continue;
      if (first + 32 * i + lane < a.batch) {
        const int count = units_of<Config>(a, sequences[i]).count;
        longest = max(longest, count);
        units[i] = count * a.heads_kv;
      }
      ends[i] = units[i];
      if (a.batch > 1) {
#pragma unroll
        for (int apart = 1; apart < 32; apart *= 2) {
          const int others = __shfl_up_sync(~0u, ends[i], apart);
          if (lane >= apart) ends[i] += others;
        }
      }
      sums[i + 1] += __shfl_sync(~0u, ends[i], a.batch > 1 ? 31 : 0);
    }
    if (!counted) {
      total += sums[kEach];
      if (first + kAtOnce < a.batch) continue;
      counted = true;
      size = max(a.grid(total + static_cast<int>(gridDim.x) - 1), 1);
      const std::int64_t begin64 = std::int64_t{blockIdx.x} * size;
      if (begin64 >= total) return {};
      begin = static_cast<int>(begin64);
      if (a.batch > kAtOnce) {
        first = -kAtOnce;
        continue;
      }
    }
    if (begin < before + sums[kEach]) break;
    before += sums[kEach];
  }
  int index = 0, end = ends[0], mine = units[0], sum = 0;
  DeviceSequence sequence = sequences[0];
#pragma unroll
  for (int i = 1; i < kEach; ++i) {
    if (begin < before + sums[i] || first + 32 * i >= a.batch) break;
    index = i, end = ends[i], mine = units[i], sum = sums[i];
    sequence = sequences[i];
  }
  int inside = begin - before - sum;
  const std::uint32_t behind = __ballot_sync(~0u, inside < end);
  const int owner = __ffs(static_cast<int>(behind)) - 1;  // the first lane whose sequence ends behind the share's begin
  inside -= __shfl_sync(~0u, end - mine, owner);
  Share share;
  share.of_lane = sequences[0];
  share.batch = first + 32 * index + owner;
  if constexpr (Config::kPlain) {
    sequence.seqlen_k = sequence.key_end = __shfl_sync(~0u, sequence.seqlen_k, owner);
    sequence.key_begin = __shfl_sync(~0u, sequence.key_begin, owner);
    sequence.diagonal = sequence.seqlen_k - sequence.seqlen_q;
    share.pair = units_of<Config>(a, sequence);
    share.sequence = sequence;
  } else {
    share.pair = units_of<Config>(a, share.batch);
  }
  share.head = inside / share.pair.count;
  share.unit = inside - share.head * share.pair.count;
  share.left = min(size, total - begin);
  share.size = size;
  if constexpr (Config::kAlone) {
    longest = static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(longest)));
    share.alone = longest <= Config::kLongestAlone && size >= Config::kWarps * longest;
  }
  share.end = begin + share.left;
  return share;
}

}  // namespace onepass::cuda
