// cuda/hopper/key_tiles.cuh: which tile of keys a CTA works on next, of the kernels in which keys stay. Tiles are drawn
// from a counter; under a causal mask low keys, which most queries see, first within a section of heads whose queries
// share the L2.
#pragma once

#include "core/problem.h"
#include "cuda/common/sequence.cuh"
#include "cuda/hopper/key_tile_order.h"
#include "cuda/hopper/ptx.cuh"
#include "cuda/hopper/sequence_cursor.cuh"
#include "cuda/hopper/tile_numbers.cuh"

namespace onepass::cuda::hopper {

// Keys of one head from `key` on, against the blocks [first_block, first_block + blocks) of queries.
struct KeyTile {
  int batch, head, key, blocks;  // blocks −1: no tile is left
  int first_block, query_start, seqlen_q, seqlen_k;
  int key_start, key_begin, key_end, diagonal;

  ONEPASS_DEVICE bool valid() const { return blocks >= 0; }
  ONEPASS_DEVICE DeviceSequence sequence() const {
    return {query_start, key_start, seqlen_q, seqlen_k, key_begin, key_end, diagonal};
  }
};

ONEPASS_DEVICE void store_key_tile(std::uint32_t address, const KeyTile& t) {
  store_shared(address, int4{t.batch, t.head, t.key, t.blocks});
  store_shared(address + 16, int4{t.first_block, t.query_start, t.seqlen_q, t.seqlen_k});
  store_shared(address + 32, int4{t.key_start, t.key_begin, t.key_end, t.diagonal});
}

ONEPASS_DEVICE KeyTile load_key_tile(std::uint32_t address) {
  const int4 a = load_shared(address), b = load_shared(address + 16), c = load_shared(address + 32);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
}

// Run by a whole warp; every lane gets the same tile.
template <class Config>
class KeyTileStream {
 public:
  // heads: of every sequence that have tiles of their own.
  ONEPASS_DEVICE KeyTileStream(const Problem& problem, std::int64_t heads, const KeyTileOrder& order)
      : problem_(problem), heads_(static_cast<int>(heads)), order_(order), numbers_(order.counter) {}

  ONEPASS_DEVICE KeyTile next() {
    index_ = numbers_.number();
    KeyTile tile{};
    tile.blocks = -1;
    problem_.ragged() ? decode_ragged(tile) : decode_dense(tile);
    if (tile.valid()) {
      numbers_.draw();  // on its way while the tile's blocks are loaded
    } else {
      numbers_.end(problem_.ragged() ? cursor_.total() : order_.tiles);
    }
    return tile;
  }

 private:
  ONEPASS_DEVICE static int tiles_of(int seqlen_k) { return (seqlen_k + Config::kKeys - 1) / Config::kKeys; }

  ONEPASS_DEVICE void decode_dense(KeyTile& tile) const {
    if (index_ >= order_.tiles) return;
    const int plane = place(tile, index_, static_cast<int>(problem_.batch) * heads_,
                            static_cast<int>(problem_.seqlen_q), static_cast<int>(problem_.seqlen_k));
    tile.batch = plane / heads_;
    tile.head = plane - tile.batch * heads_;
    set_bounds(tile, device_sequence(problem_, tile.batch));
  }

  ONEPASS_DEVICE void decode_ragged(KeyTile& tile) {
    const auto tiles = [&](int batch) {
      const Span keys = ragged_span(problem_.cu_seqlens_k, batch, problem_.seqlen_k, problem_.total_k);
      return tiles_of(keys.size) * heads_;
    };
    cursor_.find(index_, static_cast<int>(problem_.batch), tiles, [&](int batch, int index) {
      const DeviceSequence s = device_sequence(problem_, batch);
      tile.batch = batch;
      tile.head = place(tile, index, heads_, s.seqlen_q, s.seqlen_k);
      set_bounds(tile, s);
    });
  }

  // Tile number `index` of `planes` heads; returns the head.
  ONEPASS_DEVICE int place(KeyTile& tile, int index, int planes, int seqlen_q, int seqlen_k) const {
    const int key_tiles = tiles_of(seqlen_k);
    const int section = order_.heavy_first ? clamp_to(order_.section_queries / max(seqlen_q, 1), 1, planes) : 1;
    const int number = index / (section * key_tiles);
    const int within = index - number * section * key_tiles;
    const int width = min(section, planes - number * section);
    const int key_tile = within / width;
    tile.key = key_tile * Config::kKeys;
    return number * section + within - key_tile * width;
  }

  ONEPASS_DEVICE void set_bounds(KeyTile& tile, const DeviceSequence& s) const {
    tile.query_start = static_cast<int>(s.query_start);
    tile.key_start = static_cast<int>(s.key_start);
    tile.seqlen_q = s.seqlen_q;
    tile.seqlen_k = s.seqlen_k;
    tile.key_begin = s.key_begin;
    tile.key_end = s.key_end;
    tile.diagonal = s.diagonal;
    const Range queries = tile_queries(problem_, s, tile.key, tile.key + Config::kKeys).any;
    tile.first_block = queries.begin / Config::kQueries;
    tile.blocks = 0;
    if (queries.begin < queries.end) {
      tile.blocks = (queries.end + Config::kQueries - 1) / Config::kQueries - tile.first_block;
    }
  }

  const Problem& problem_;
  const int heads_;
  const KeyTileOrder& order_;
  TileNumbers numbers_;
  int index_ = 0;          // of the tile in hand
  SequenceCursor cursor_;  // ragged
};

}  // namespace onepass::cuda::hopper
