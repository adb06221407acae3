// cuda/ticket.h: counters in memory that nobody clears. A counter has the call's ticket above kTicketCountBits bits of
// count; whoever finds another ticket there puts the call's own in its place (common/ticket.cuh). Memory holds a call's
// ticket by chance once in 2^48 times.
#pragma once

#include <cstddef>
#include <cstdint>

namespace onepass::cuda {

inline constexpr int kTicketCountBits = 16;

// The ticket of a call that counts up to `most` in `bytes` of memory: another one for every call of the process, and
// not what memory holds. Where it leaves too few bits, memory is cleared on the stream and the ticket is 0: nobody has
// to put it there. For compute-sanitizer's initcheck, which names every read of what nobody has written, the
// environment variable ONEPASS_CLEAR_COUNTERS has memory cleared in any case.
std::uint64_t begin_counting(void* counters, std::size_t bytes, std::int64_t most, const char* operation, void* stream);

}  // namespace onepass::cuda
