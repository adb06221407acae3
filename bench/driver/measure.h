// driver/measure.h: calls timed in turns.
#pragma once

#include <functional>
#include <vector>

#include "onepass/tensor.h"

namespace onepass::bench {

// Milliseconds of one call: the median over iterations, and the quartiles.
struct Timing {
  double median = 0.0, low = 0.0, high = 0.0;
};

// Every call once per iteration, after `warmup` rounds. A call shorter than half a millisecond is repeated within its
// turn until the turn is that long.
std::vector<Timing> interleave(const std::vector<std::function<void()>>& calls, Device device, int warmup,
                               int iterations);

}  // namespace onepass::bench
