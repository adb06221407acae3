// cuda/portable/schedule.cuh: which tile of which head a block works on.
#pragma once

#include "cuda/common/scalar.cuh"

namespace onepass::cuda {

struct TilePosition {
  int plane, tile;
};

// Blocks take all tiles of a group of planes (as many as share the L2 cache) before the next group's, and within a
// group a tile of every plane before the next tile, so that the longest come first when tiles are sorted by length.
ONEPASS_DEVICE TilePosition tile_position(int index, int tiles, int planes, int planes_per_group) {
  const int group = index / (tiles * planes_per_group), rest = index - group * tiles * planes_per_group;
  const int first_plane = group * planes_per_group;
  const int planes_here = min(planes_per_group, planes - first_plane);
  return {first_plane + rest % planes_here, rest / planes_here};
}

}  // namespace onepass::cuda
