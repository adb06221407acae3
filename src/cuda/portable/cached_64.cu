#include "cuda/portable/cached_tile.cuh"

namespace onepass::cuda {

template CachedTileKernel cached_tile_kernel_for<64>(DType dtype);

}  // namespace onepass::cuda
