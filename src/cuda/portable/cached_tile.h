// cuda/portable/cached_tile.h: many query rows over a cache (prefill, chunks): what the host and the kernel agree on.
#pragma once

#include "cuda/portable/decode.h"
#include "cuda/portable/forward.h"

namespace onepass::cuda {

struct CachedTileArguments {
  DecodeArguments rows;  // of the pairs; max_rows is unused
  int min_rows;          // sequences of fewer rows are another kernel's
  int row_tiles;         // of a pair with the most rows
  bool last_rows_first;
  bool vectorized_q;
  bool direct_keys, direct_values;    // rows can be copied as they are, 16 bytes at a time
  bool aligned_keys, aligned_values;  // 8-bit rows can be read 8 bytes at a time
  float scale_log2;                   // of the logits that the softmax sees
};

struct CachedTileKernel {
  void (*kernel)(CachedTileArguments);
  int rows;  // of a tile
  int threads, shared_bytes;
};

// The kernel for queries of `dtype` and operands padded to kHeadDim. Instantiated in cached_<dim>.cu.
template <int kHeadDim>
CachedTileKernel cached_tile_kernel_for(DType dtype);

}  // namespace onepass::cuda
