// cuda/hopper/tile_counter.h: the counter from which the CTAs of a launch draw tiles beyond their first ones.
#pragma once

#include <cstdint>

#include "core/parallel.h"

namespace onepass::cuda::hopper {

struct TileCounter {
  std::uint64_t* count = nullptr;  // null: every CTA has its only tile
  std::uint64_t ticket = 0;        // see cuda/ticket.h; 0: the count is 0 at launch
};

inline constexpr std::int64_t kTileCounterBytes = 256;  // keeps aligned what follows it

// For at most `tiles` numbers, at `memory`. Where a ticket leaves too few bits to count them, memory is cleared on the
// stream: the call is long then.
TileCounter make_tile_counter(void* memory, std::int64_t tiles, const char* operation, void* stream);

}  // namespace onepass::cuda::hopper
