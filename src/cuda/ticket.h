// cuda/ticket.h: counters in memory that nobody clears. A counter has the call's ticket above kTicketCountBits bits of
// count; whoever finds another ticket there puts the call's own in its place (common/ticket.cuh). Memory holds a call's
// ticket by chance once in 2^48 times.
#pragma once

#include <cstdint>

namespace onepass::cuda {

inline constexpr int kTicketCountBits = 16;

// Another one for every call of the process, and not what memory holds.
std::uint64_t next_ticket();

}  // namespace onepass::cuda
