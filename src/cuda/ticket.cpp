#include "cuda/ticket.h"

#include <atomic>
#include <cstdlib>
#include <random>

#include "cuda/device.h"

namespace onepass::cuda {

std::uint64_t begin_counting(void* counters, std::size_t bytes, std::int64_t most, const char* operation,
                             void* stream) {
  static const bool clears = std::getenv("ONEPASS_CLEAR_COUNTERS") != nullptr;
  static std::atomic<std::uint64_t> next = [] {
    std::random_device random;
    return std::uint64_t{random()} << 32 | random();
  }();
  const bool fits = most < std::int64_t{1} << kTicketCountBits;
  if (clears || !fits) {
    check(cudaMemsetAsync(counters, 0, bytes, static_cast<cudaStream_t>(stream)), operation, "cudaMemsetAsync");
  }
  return fits ? next++ << kTicketCountBits : 0;
}

}  // namespace onepass::cuda
