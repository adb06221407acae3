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

// Units [begin, begin + size) of a pair's are part `part` of `parts`; parts without units are left out everywhere.
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
  int size = 0;                     // of every share
  PairUnits pair = {{0, 0}, 0, 0};  // of the first pair
};

// The part of a block that has one part of one pair.
template <class Config>
ONEPASS_DEVICE Share fixed_share(const DecodeArguments& a) {
  const int pair = blockIdx.x / a.parts, part = blockIdx.x % a.parts;
  const PairUnits units = units_of<Config>(a, pair / a.heads_kv);
  const Part mine = part_of(units.count, part, a.parts);
  return {pair / a.heads_kv, pair % a.heads_kv, mine.begin, mine.size, 0, units};
}

// Of the 32 sequences from `first` on, one a lane: units, and those of the sequences before it among the 32.
struct Scan {
  PairUnits pair;
  int start, end, total;
};
template <class Config>
ONEPASS_DEVICE Scan scan_units(const DecodeArguments& a, int first) {
  const int lane = threadIdx.x % 32, batch = first + lane;
  Scan scan{{{0, 0}, 0, 0}, 0, 0, 0};
  if (batch < a.batch) scan.pair = units_of<Config>(a, batch);
  const int units = scan.pair.count * a.heads_kv;
  scan.end = units;
  if (a.batch > 1) {
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
      const int before = __shfl_up_sync(~0u, scan.end, apart);
      if (lane >= apart) scan.end += before;
    }
  }
  scan.start = scan.end - units;
  scan.total = __shfl_sync(~0u, scan.end, a.batch > 1 ? 31 : 0);
  return scan;
}

// Equal shares of the line, in order, of at least `smallest` units; every warp works it out for itself.
template <class Config>
ONEPASS_DEVICE Share equal_share(const DecodeArguments& a, int smallest) {
  int total = 0, size = 0, begin = 0, before = 0;
  bool counted = false;  // first all units, then, in a second pass where 32 lanes were too few, the share's begin
  Scan scan;
  int first = 0;
#pragma unroll 1
  for (;; first += 32) {
    scan = scan_units<Config>(a, first);
    if (!counted) {
      total += scan.total;
      if (first + 32 < a.batch) continue;
      counted = true;
      size = max(a.grid(total + static_cast<int>(gridDim.x) - 1), smallest);
      const std::int64_t begin64 = std::int64_t{blockIdx.x} * size;
      if (begin64 >= total) return {};
      begin = static_cast<int>(begin64);
      if (a.batch > 32) {
        first = -32;
        continue;
      }
    }
    if (begin < before + scan.total) break;
    before += scan.total;
  }
  const std::uint32_t behind = __ballot_sync(~0u, begin < before + scan.end);
  const int owner = __ffs(static_cast<int>(behind)) - 1;  // the first lane whose sequence ends behind the share's begin
  Share share;
  share.pair = {{__shfl_sync(~0u, scan.pair.keys.begin, owner), __shfl_sync(~0u, scan.pair.keys.end, owner)},
                __shfl_sync(~0u, scan.pair.first, owner),
                __shfl_sync(~0u, scan.pair.count, owner)};
  const int inside = begin - before - __shfl_sync(~0u, scan.start, owner);
  share.batch = first + owner;
  share.head = inside / share.pair.count;
  share.unit = inside - share.head * share.pair.count;
  share.left = min(size, total - begin);
  share.size = size;
  return share;
}

}  // namespace onepass::cuda
