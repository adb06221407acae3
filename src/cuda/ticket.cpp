#include "cuda/ticket.h"

#include <atomic>
#include <random>

namespace onepass::cuda {

std::uint64_t next_ticket() {
  static std::atomic<std::uint64_t> next = [] {
    std::random_device random;
    return std::uint64_t{random()} << 32 | random();
  }();
  return next++ << kTicketCountBits;
}

}  // namespace onepass::cuda
