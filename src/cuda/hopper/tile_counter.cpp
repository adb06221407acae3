#include "cuda/hopper/tile_counter.h"

#include "cuda/device.h"
#include "cuda/ticket.h"

namespace onepass::cuda::hopper {

TileCounter make_tile_counter(void* memory, std::int64_t tiles, const char* operation, void* stream) {
  TileCounter counter{static_cast<std::uint64_t*>(memory)};
  if (tiles < std::int64_t{1} << kTicketCountBits) {
    counter.ticket = begin_counting(memory, sizeof(*counter.count), operation, stream);
  } else {
    check(cudaMemsetAsync(memory, 0, sizeof(*counter.count), static_cast<cudaStream_t>(stream)), operation,
          "cudaMemsetAsync");
  }
  return counter;
}

}  // namespace onepass::cuda::hopper
