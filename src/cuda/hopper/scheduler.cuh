// cuda/hopper/scheduler.cuh: which tile a CTA works on next. Tiles are drawn from a counter, those with the most keys
// first within a section of heads whose keys and values share the L2; the producer decodes them, consumers read the
// result beside Q.
#pragma once

#include <climits>

#include "core/problem.h"
#include "cuda/common/sequence.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/plan.h"

namespace onepass::cuda::hopper {

// kScrub: memory beyond the visible keys is not zero, V's rows there must be cleared. kCareful: the second attempt at a
// tile where something was not finite.
enum TileMode : int { kScrub = 1, kCareful = 2 };

// kRows queries of one head against the blocks [first_block, first_block + blocks) of kKeys keys.
struct Tile {
  int batch, head, row, split;  // row: of the sequence; split −1: no tile is left
  int query_start, seqlen_q;
  int key_start, key_begin, key_end, diagonal;
  int first_block, blocks;
  int mode;  // bits of TileMode

  ONEPASS_DEVICE bool valid() const { return split >= 0; }
};

static_assert(sizeof(Tile) <= kRepeatAt);

ONEPASS_DEVICE void store_tile(std::uint32_t address, const Tile& t) {
  store_shared(address, {t.batch, t.head, t.row, t.split});
  store_shared(address + 16, {t.query_start, t.seqlen_q, t.key_start, t.key_begin});
  store_shared(address + 32, {t.key_end, t.diagonal, t.first_block, t.blocks});
  store_shared(address + 48, {t.mode, 0, INT_MAX, INT_MAX});
}

ONEPASS_DEVICE Tile load_tile(std::uint32_t address) {
  const int4 a = load_shared(address), b = load_shared(address + 16), c = load_shared(address + 32),
             d = load_shared(address + 48);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w, d.x};
}

// Run by a whole warp; every lane gets the same tile.
template <class Config>
class TileStream {
 public:
  ONEPASS_DEVICE TileStream(const Problem& problem, const Plan& plan)
      : problem_(problem), plan_(plan), drawn_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  ONEPASS_DEVICE Tile next() {
    index_ = static_cast<int>(gridDim.x) + __shfl_sync(~0u, drawn_, 0);
    Tile tile{};
    tile.split = -1;
    if (index_ < plan_.tiles) problem_.ragged() ? decode_ragged(tile) : decode_dense(tile);
    draw();
    return tile;
  }

 private:
  // Nobody waits for the number here: it is on its way while the tile's blocks are loaded.
  ONEPASS_DEVICE void draw() {
    if (plan_.tiles <= gridDim.x) {  // every CTA has had its only one
      drawn_ = plan_.tiles;
    } else if (threadIdx.x % 32 == 0) {
      drawn_ = atomicAdd(plan_.counter, 1);
    }
  }

  ONEPASS_DEVICE void decode_dense(Tile& tile) const {
    const int row_tiles = (static_cast<int>(problem_.seqlen_q) + Config::kRows - 1) / Config::kRows;
    const int heads = static_cast<int>(problem_.num_heads);
    int plane = 0;
    place(tile, index_, row_tiles, static_cast<int>(problem_.batch) * heads, static_cast<int>(problem_.seqlen_k),
          plane);
    tile.batch = plane / heads;
    tile.head = plane - tile.batch * heads;
    set_bounds(tile, device_sequence(problem_, tile.batch));
  }

  // Sequences in the order given; the cursor only moves forward because a CTA draws rising indices.
  ONEPASS_DEVICE void decode_ragged(Tile& tile) {
    const int lane = threadIdx.x % 32, batch = static_cast<int>(problem_.batch);
    const int heads = static_cast<int>(problem_.num_heads);
    while (sequence_ < batch) {
      int tiles = 0;
      if (sequence_ + lane < batch) {
        const Span queries = ragged_span(problem_.cu_seqlens_q, sequence_ + lane, problem_.seqlen_q, problem_.total_q);
        tiles = (queries.size + Config::kRows - 1) / Config::kRows * heads * plan_.splits;
      }
      int through = tiles;  // inclusive prefix sum
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, through, step);
        if (lane >= step) through += other;
      }
      const unsigned beyond = __ballot_sync(~0u, before_ + through > index_);
      if (beyond == 0) {
        before_ += __shfl_sync(~0u, through, 31);
        sequence_ += 32;
        continue;
      }
      const int found = __ffs(static_cast<int>(beyond)) - 1;
      const int start = before_ + __shfl_sync(~0u, through - tiles, found);
      tile.batch = sequence_ + found;
      const DeviceSequence s = device_sequence(problem_, tile.batch);
      place(tile, index_ - start, (s.seqlen_q + Config::kRows - 1) / Config::kRows, heads, s.seqlen_k, tile.head);
      set_bounds(tile, s);
      return;
    }
  }

  // Tile number `index` of `planes` heads with row_tiles row tiles each.
  ONEPASS_DEVICE void place(Tile& tile, int index, int row_tiles, int planes, int seqlen_k, int& plane) const {
    tile.split = index % plan_.splits;
    index /= plan_.splits;
    int section = 1;
    if (plan_.heavy_first) section = clamp_to(plan_.section_keys / max(seqlen_k, 1), 1, planes);
    const int section_tiles = section * row_tiles;
    const int number = index / section_tiles;
    const int within = index - number * section_tiles;
    const int width = min(section, planes - number * section);
    const int row_tile = plan_.heavy_first ? row_tiles - 1 - within / width : within;
    plane = number * section + (plan_.heavy_first ? within % width : 0);
    tile.row = row_tile * Config::kRows;
  }

  ONEPASS_DEVICE void set_bounds(Tile& tile, const DeviceSequence& s) const {
    tile.query_start = static_cast<int>(s.query_start);
    tile.key_start = static_cast<int>(s.key_start);
    tile.seqlen_q = s.seqlen_q;
    tile.key_begin = s.key_begin;
    tile.key_end = s.key_end;
    tile.diagonal = s.diagonal;
    tile.mode = problem_.ragged() || problem_.key_begin != nullptr || problem_.key_end != nullptr ? kScrub : 0;
    const int last_row = min(tile.row + Config::kRows, s.seqlen_q) - 1;
    const Range keys = tile_keys(problem_, s, tile.row, last_row).any;
    int first = keys.begin / Config::kKeys;
    int end = keys.begin < keys.end ? (keys.end + Config::kKeys - 1) / Config::kKeys : first;
    const int share = (end - first + plan_.splits - 1) / plan_.splits;
    first = min(first + tile.split * share, end);
    end = min(first + share, end);
    tile.first_block = first;
    tile.blocks = end - first;
  }

  const Problem& problem_;
  const Plan& plan_;
  int drawn_;                      // the next tile's number beyond the CTAs' first ones, in lane 0
  int index_ = 0;                  // of the tile in hand
  int sequence_ = 0, before_ = 0;  // ragged: the cursor's sequence and the tiles before it
};

}  // namespace onepass::cuda::hopper
