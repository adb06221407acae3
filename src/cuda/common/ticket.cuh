// cuda/common/ticket.cuh: the device's side of cuda/ticket.h.
#pragma once

#include "cuda/common/scalar.cuh"
#include "cuda/ticket.h"

namespace onepass::cuda {

// From the second-level cache, where counters are counted.
ONEPASS_DEVICE std::uint64_t load_counter(const std::uint64_t* counter) {
  std::uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
  return value;
}

// To be called by one thread before it counts. `found`: the counter as it was loaded.
ONEPASS_DEVICE void claim_counter(std::uint64_t* counter, std::uint64_t found, std::uint64_t ticket) {
  if ((found ^ ticket) >> kTicketCountBits == 0) return;
  atomicCAS(reinterpret_cast<unsigned long long*>(counter), found, ticket);
}

}  // namespace onepass::cuda
