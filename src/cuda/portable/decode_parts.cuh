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

// Whether the part that the calling warp has just written is the row's last. `found`: the counter, as it was loaded
// before. Memory holds this ticket by chance once in 2^48 times.
ONEPASS_DEVICE bool arrives_last(std::uint64_t* counter, std::uint64_t found, std::uint64_t ticket, int parts) {
  std::uint64_t before = 0;
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    if ((found ^ ticket) >> kArrivalBits != 0) {
      atomicCAS(reinterpret_cast<unsigned long long*>(counter), found, ticket);
    }
    before = count_arrival(counter);
    if (before - ticket == parts - 1) *counter = ticket;  // for the next run of a graph
  }
  return __shfl_sync(~0u, static_cast<int>(before - ticket), 0) == parts - 1;
}

// The warp's row of `merged` and `x` becomes the merge of all its parts.
template <class Config>
ONEPASS_DEVICE void merge_parts(PartialState& merged, float4 (&x)[kRowChunks<Config>], const DecodeArguments& a,
                                const Parts& parts, int row) {
  constexpr int kChunks = kRowChunks<Config>, kAtOnce = Config::kPlain || Config::kRows <= 8 ? 4 : 2;
  const int lane = threadIdx.x % 32;
  const auto base_of = [](float largest) { return largest == -kInfinity ? 0.0f : largest; };
  merged = {-kInfinity, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) x[c] = {};
#pragma unroll 1
  for (int first = 0; first < parts.count; first += kAtOnce) {
    float4 y[kAtOnce][kChunks];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float* const source = partial_row<Config>(a, parts.slot(min(first + i, parts.count - 1)), row);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = 4 * lane + 128 * c;
        if (d < Config::kHeadDim) y[i][c] = __ldcg(reinterpret_cast<const float4*>(source + d));
      }
    }
    PartialState part{-kInfinity, 0.0f, 0.0f, 0.0f};  // lane i: of part i modulo kAtOnce
    if (const int i = first + lane % kAtOnce; i < parts.count) {
      const float4 state = __ldcg(reinterpret_cast<const float4*>(partial_state<Config>(a, parts.slot(i), row)));
      part = {state.x, state.y, state.z, state.w};
    }
    const std::uint32_t counted = __ballot_sync(~0u, part.sum != 0.0f);  // weights of 0 times infinities are not 0
    float largest = fmaxf(merged.largest, part.largest);
#pragma unroll
    for (int apart = 1; apart < kAtOnce; apart *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, apart));
    const float mine = merged.sum == 0.0f ? 0.0f : exp2_approx(base_of(merged.largest) - base_of(largest));
    const float its = part.sum == 0.0f ? 0.0f : exp2_approx(base_of(part.largest) - base_of(largest));
    part.sum *= its;
    part.rounded *= its;
#pragma unroll
    for (int apart = 1; apart < kAtOnce; apart *= 2) {
      part.sum += __shfl_xor_sync(~0u, part.sum, apart);
      part.rounded += __shfl_xor_sync(~0u, part.rounded, apart);
      part.repaired += __shfl_xor_sync(~0u, part.repaired, apart);
    }
    merged = {largest, mine * merged.sum + part.sum, mine * merged.rounded + part.rounded,
              merged.repaired + part.repaired};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) x[c] = {mine * x[c].x, mine * x[c].y, mine * x[c].z, mine * x[c].w};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float f = __shfl_sync(~0u, its, i);
      if ((counted >> i & 1) == 0) continue;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        x[c] = {fmaf(f, y[i][c].x, x[c].x), fmaf(f, y[i][c].y, x[c].y), fmaf(f, y[i][c].z, x[c].z),
                fmaf(f, y[i][c].w, x[c].w)};
      }
    }
  }
}

}  // namespace onepass::cuda
