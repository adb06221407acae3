// cuda/hopper/key_tile_order.h: in which order the CTAs of a launch take tiles of keys (key_tiles.cuh).
#pragma once

#include "cuda/hopper/tile_counter.h"

namespace onepass::cuda::hopper {

struct KeyTileOrder {
  int tiles = 0;  // key tiles × heads; ragged: an upper bound
  TileCounter counter;
  bool heavy_first = false;
  int section_queries = 0;  // queries of all heads of a section together
};

}  // namespace onepass::cuda::hopper
