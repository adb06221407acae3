// cuda/common/grid_order.cuh: kernels of launch_dependent() (cuda/graph_launch.h) and the grid before them.
#pragma once

#include "cuda/common/scalar.cuh"

namespace onepass::cuda {

// A grid may be launched while the one before it still runs (sm_90): before this, nothing that that one writes may be
// read, and nothing written.
ONEPASS_DEVICE void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next grid be launched as soon as every block of this one has come here.
ONEPASS_DEVICE void allow_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace onepass::cuda
