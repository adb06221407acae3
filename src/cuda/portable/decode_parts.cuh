// cuda/portable/decode_parts.cuh: exact merge of the parts of a row, always in the same order. The warp that brings the
// last part merges all of them: nobody waits, whatever the order of blocks.
#pragma once

#include "cuda/portable/decode_rows.cuh"

namespace onepass::cuda {

// The parts of a pair, and the one at hand.
struct Parts {
  int count = 1, index = 0;
  int first = 0, others = 0;  // slot of part 0; of part i: others + i
  int counters = 0;           // place of the rows' counters among those of a.rows rows

  ONEPASS_DEVICE int slot(int part) const { return part == 0 ? first : others + part; }
};

// Of a pair, or a block of rows of one, in `count` parts of a.parts: blocks one after the other have them.
ONEPASS_DEVICE Parts fixed_parts(const DecodeArguments& a, int count) {
  const int pair = blockIdx.x / a.parts, first = pair * a.parts;
  return {count, static_cast<int>(blockIdx.x) - first, first, first, pair};
}
// Equal shares of `size` units; the pair has units [begin, begin + count) of the line. A block has a slot for the part
// that it begins with and, behind those of all blocks, one for the part that it ends with.
ONEPASS_DEVICE Parts shared_parts(int begin, int count, int size) {
  const int first = begin / size, last = (begin + count - 1) / size;
  return {last - first + 1, static_cast<int>(blockIdx.x) - first, static_cast<int>(gridDim.x) + first, first, first};
}

// Of a row's numbers for a lane: channels 128c + 4·lane and the three behind.
template <class Config>
inline constexpr int kRowChunks = (Config::kHeadDim + 127) / 128;

template <class Config>
ONEPASS_DEVICE std::uint64_t* arrivals_of(const DecodeArguments& a, const Parts& parts, int row) {
  return a.arrivals + (std::int64_t{parts.counters} * Config::kRows + row);
}
template <class Config>
ONEPASS_DEVICE PartialState* partial_state(const DecodeArguments& a, int slot, int row) {
  return a.states + (std::int64_t{slot} * Config::kRows + row);
}
template <class Config>
ONEPASS_DEVICE float* partial_row(const DecodeArguments& a, int slot, int row) {
  return a.partials + (std::int64_t{slot} * Config::kRows + row) * Config::kHeadDim;
}

// Whether the part that the calling warp has just written is its rows' last. `found`: the counter, loaded before.
ONEPASS_DEVICE bool arrives_last(std::uint64_t* counter, std::uint64_t found, std::uint64_t ticket, int parts) {
  std::uint64_t before = 0;
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    claim_counter(counter, found, ticket);
    before = count_arrival(counter);
    if (before - ticket == parts - 1) *counter = ticket;  // for the next run of a graph
  }
  return __shfl_sync(~0u, static_cast<int>(before - ticket), 0) == parts - 1;
}

// States and outputs of a row in shared memory: of every warp, then, when those are merged, places for parts.
struct SharedStates {
  PartialState* states;
  float* out;
  int step, count;  // rows from one to the next
};

// Takes states into the warp's row of `merged` and `x`.
template <class Config>
ONEPASS_DEVICE void add_states(PartialState& merged, float4 (&x)[kRowChunks<Config>], const SharedStates& source) {
  constexpr int kChunks = kRowChunks<Config>;
  constexpr int kUnroll = Config::kRows == 8 && kChunks == 1 ? 4 : 2;  // registers hold other rows, or the next keys
  const int lane = threadIdx.x % 32;
  const auto base_of = [](float largest) { return largest == -kInfinity ? 0.0f : largest; };
  float largest = merged.largest;
#pragma unroll 4
  for (int i = 0; i < source.count; ++i) largest = fmaxf(largest, source.states[source.step * i].largest);
  const float base = base_of(largest);
  const float mine = merged.sum == 0.0f ? 0.0f : exp2_approx(base_of(merged.largest) - base);
  merged = {largest, mine * merged.sum, mine * merged.rounded, merged.repaired};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) x[c] = {mine * x[c].x, mine * x[c].y, mine * x[c].z, mine * x[c].w};
#pragma unroll kUnroll
  for (int i = 0; i < source.count; ++i) {
    const PartialState part = source.states[source.step * i];
    const float f = part.sum == 0.0f ? 0.0f : exp2_approx(base_of(part.largest) - base);
    merged.sum += f * part.sum;
    merged.rounded += f * part.rounded;
    merged.repaired += part.repaired;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = 4 * lane + 128 * c;
      if (d >= Config::kHeadDim) continue;
      const float4 y = *reinterpret_cast<const float4*>(source.out + source.step * i * Config::kOutputPitch + d);
      x[c] = {fmaf(f, y.x, x[c].x), fmaf(f, y.y, x[c].y), fmaf(f, y.z, x[c].z), fmaf(f, y.w, x[c].w)};
    }
  }
}

// Asks for as many parts of a row as there are places, from part `first` on. By way of shared memory many are on their
// way, whatever registers hold.
template <class Config>
ONEPASS_DEVICE void request_parts(const DecodeArguments& a, const Parts& parts, int first, int row,
                                  const SharedStates& places) {
  const int lane = threadIdx.x % 32;
  __syncwarp();  // states that were there are read
#pragma unroll 1
  for (int i = lane; i < places.count; i += 32) {
    cp_async_16(shared_address(places.states + places.step * i), partial_state<Config>(a, parts.slot(first + i), row),
                true);
  }
#pragma unroll 4
  for (int i = 0; i < places.count; ++i) {
    const float* const source = partial_row<Config>(a, parts.slot(first + i), row);
    float* const place = places.out + places.step * i * Config::kOutputPitch;
#pragma unroll
    for (int c = 0; c < kRowChunks<Config>; ++c) {
      const int d = 4 * lane + 128 * c;
      if (d < Config::kHeadDim) cp_async_16(shared_address(place + d), source + d, true);
    }
  }
  cp_async_commit();
}

// The warp's row of `merged` and `x` becomes the merge of all its parts, the first of which have been asked for.
template <class Config>
ONEPASS_DEVICE void merge_parts(PartialState& merged, float4 (&x)[kRowChunks<Config>], const DecodeArguments& a,
                                const Parts& parts, int row, SharedStates places) {
  merged = {-kInfinity, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int c = 0; c < kRowChunks<Config>; ++c) x[c] = {};
#pragma unroll 1
  for (int first = 0;;) {
    cp_async_wait<0>();
    __syncwarp();
    add_states<Config>(merged, x, places);
    first += places.count;
    if (first >= parts.count) return;
    places.count = min(parts.count - first, places.count);
    request_parts<Config>(a, parts, first, row, places);
  }
}

}  // namespace onepass::cuda
