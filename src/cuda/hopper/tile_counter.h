// cuda/hopper/tile_counter.h: the counter from which the CTAs of a launch draw tiles beyond their first ones.
#pragma once

#include <cstdint>

#include "cuda/ticket.h"

namespace onepass::cuda::hopper {

struct TileCounter {
  std::uint64_t* count = nullptr;  // null: every CTA has its only tile
  std::uint64_t ticket = 0;        // see begin_counting()
};

inline constexpr std::int64_t kTileCounterBytes = 256;  // keeps aligned what follows it

// For at most `tiles` numbers, at `memory`.
inline TileCounter make_tile_counter(void* memory, std::int64_t tiles, const char* operation, void* stream) {
  return {static_cast<std::uint64_t*>(memory),
          begin_counting(memory, sizeof(*TileCounter::count), tiles, operation, stream)};
}

}  // namespace onepass::cuda::hopper
