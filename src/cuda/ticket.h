// cuda/ticket.h: counters in memory that nobody clears. A counter has the call's ticket above kTicketCountBits bits of
// count; whoever finds another ticket there puts the call's own in its place (common/ticket.cuh). Memory holds a call's
// ticket by chance once in 2^48 times.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onepass::cuda {

inline constexpr int kTicketCountBits = 16;

// The ticket of a call that counts in `bytes` of memory: another one for every call of the process, and not what memory
// holds. For compute-sanitizer's initcheck, which names every read of what nobody has written, the environment variable
// ONEPASS_CLEAR_COUNTERS has memory cleared on the stream.
std::uint64_t begin_counting(void* counters, std::size_t bytes, const char* operation, void* stream);

}  // namespace onepass::cuda
