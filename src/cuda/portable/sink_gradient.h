// cuda/portable/sink_gradient.h: the gradient of the sinks, from the row statistics of the backward pass.
#pragma once

#include "cuda/portable/backward.h"

namespace onepass::cuda {

struct SinkGradientKernel {
  void (*kernel)(BackwardArguments);  // one block a head
  int threads;
};

SinkGradientKernel sink_gradient();

}  // namespace onepass::cuda
