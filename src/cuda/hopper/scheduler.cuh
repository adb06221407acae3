// cuda/hopper/scheduler.cuh: which tile a CTA works on next. Tiles are drawn from a counter and decoded by a warp of
// the producer; consumers read the result beside Q.
#pragma once

#include <climits>

#include "core/problem.h"
#include "cuda/common/sequence.cuh"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/plan.h"
#include "cuda/hopper/sequence_cursor.cuh"
#include "cuda/hopper/tile_numbers.cuh"

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

// In two halves, so that the warp that decodes tiles need not hold a whole one.
ONEPASS_DEVICE void store_place(std::uint32_t address, const Tile& t) {
  store_shared(address, {t.batch, t.head, t.row, t.split});
}
ONEPASS_DEVICE void store_bounds(std::uint32_t address, const Tile& t) {
  store_shared(address + 16, {t.query_start, t.seqlen_q, t.key_start, t.key_begin});
  store_shared(address + 32, {t.key_end, t.diagonal, t.first_block, t.blocks});
  store_shared(address + 48, {t.mode, 0, INT_MAX, INT_MAX});
}
ONEPASS_DEVICE void store_tile(std::uint32_t address, const Tile& t) {
  store_place(address, t);
  store_bounds(address, t);
}

ONEPASS_DEVICE Tile load_tile(std::uint32_t address) {
  const int4 a = load_shared(address), b = load_shared(address + 16), c = load_shared(address + 32),
             d = load_shared(address + 48);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w, d.x};
}

// Whether sequences begin or end where memory says.
ONEPASS_DEVICE bool has_bounds_in_memory(const Problem& problem) {
  return problem.ragged() || problem.key_begin != nullptr || problem.key_end != nullptr;
}

// How many keys before and behind its own a row sees, as in Problem.
struct Window {
  std::int64_t left, right;
};
ONEPASS_DEVICE Window window_of(const Problem& problem) { return {problem.window_left, problem.window_right}; }

// Visible keys [begin, end) of a row of the sequence.
ONEPASS_DEVICE int visible_begin(const Window& window, const Tile& tile, int row) {
  if (window.left == kUnbounded) return tile.key_begin;
  return max(tile.key_begin, row + tile.diagonal - static_cast<int>(window.left));
}
ONEPASS_DEVICE int visible_end(const Window& window, const Tile& tile, int row) {
  if (window.right == kUnbounded) return tile.key_end;
  return min(tile.key_end, row + tile.diagonal + static_cast<int>(window.right) + 1);
}

// Blocks [begin, end) of a tile, worked through from the last one down.
struct Blocks {
  int begin, end;

  ONEPASS_DEVICE int count() const { return end - begin; }
};

// A tile's blocks; of piecewise attention, which goes first through the blocks that have keys near to one of the tile's
// rows and then through those that have far ones, of either pair.
template <class Config>
ONEPASS_DEVICE Blocks blocks_of(const Plan& plan, const Tile& tile, bool far) {
  Blocks blocks{tile.first_block, tile.first_block + tile.blocks};
  if constexpr (Config::kPiecewise) {
    // Of the tile's rows, the lowest key that is near and the highest that is far.
    const int near_key = tile.row + tile.diagonal - plan.dist_threshold + 1;
    const int far_key = near_key - 1 + min(Config::kRows, tile.seqlen_q - tile.row) - 1;
    if (far) {
      blocks.end = far_key < 0 ? blocks.begin : min(max(far_key / Config::kKeys + 1, blocks.begin), blocks.end);
    } else {
      blocks.begin = min(max(near_key / Config::kKeys, blocks.begin), blocks.end);
    }
  }
  return blocks;
}

// Causal tiles are drawn in sections of heads, a section's tiles with most keys first. As many heads as fill the SMs
// once, so that tiles that load much and tiles that load little run side by side; for long sequences a few heads more,
// so that no SM is left with a long tile at the end, as far as the L2 holds their keys and values.
inline constexpr int kSectionHeads = 8;

// Run by a whole warp.
template <class Config>
class TileStream {
 public:
  ONEPASS_DEVICE TileStream(const Problem& problem, const Plan& plan)
      : problem_(problem), plan_(plan), numbers_(plan.counter) {}

  // Writes the next tile to shared memory; false when none is left.
  ONEPASS_DEVICE bool next(std::uint32_t address) {
    if (index_ >= 0) numbers_.draw();
    index_ = numbers_.number();
    const bool found = problem_.ragged() ? decode_ragged(address) : decode_dense(address);
    if (!found) {
      if (is_first_lane()) store_place(address, {.split = -1});
      numbers_.end(problem_.ragged() ? cursor_.total() : plan_.tiles);
    }
    return found;
  }

 private:
  ONEPASS_DEVICE static bool is_first_lane() { return threadIdx.x % 32 == 0; }

  ONEPASS_DEVICE static int row_tiles_of(int seqlen_q) { return (seqlen_q + Config::kRows - 1) / Config::kRows; }

  ONEPASS_DEVICE bool decode_dense(std::uint32_t address) const {
    if (index_ >= plan_.tiles) return false;
    const int heads = static_cast<int>(problem_.num_heads);
    Tile tile;
    const int plane = place(tile, index_, row_tiles_of(static_cast<int>(problem_.seqlen_q)),
                            static_cast<int>(problem_.batch) * heads, static_cast<int>(problem_.seqlen_k));
    tile.batch = plane / heads;
    tile.head = plane - tile.batch * heads;
    finish(address, tile, device_sequence(problem_, tile.batch));
    return true;
  }

  ONEPASS_DEVICE bool decode_ragged(std::uint32_t address) {
    const int heads = static_cast<int>(problem_.num_heads);
    const auto tiles_of = [&](int batch) {
      const Span queries = ragged_span(problem_.cu_seqlens_q, batch, problem_.seqlen_q, problem_.total_q);
      return row_tiles_of(queries.size) * heads * plan_.splits;
    };
    return cursor_.find(index_, static_cast<int>(problem_.batch), tiles_of, [&](int batch, int index) {
      const DeviceSequence s = device_sequence(problem_, batch);
      Tile tile;
      tile.batch = batch;
      tile.head = place(tile, index, row_tiles_of(s.seqlen_q), heads, s.seqlen_k);
      finish(address, tile, s);
    });
  }

  // Row and split of tile number `index` of `planes` heads with row_tiles row tiles each; returns the head among them.
  ONEPASS_DEVICE int place(Tile& tile, int index, int row_tiles, int planes, int seqlen_k) const {
    tile.split = 0;
    if (plan_.splits > 1) {
      tile.split = index % plan_.splits;
      index /= plan_.splits;
    }
    int section = 1;
    if (plan_.heavy_first) {
      const int cached = plan_.cached_keys / max(seqlen_k, 1), wave = plan_.wave_keys / max(seqlen_k, 1);
      section = min(max(min(cached, max(wave, kSectionHeads)), 1), planes);
    }
    const int section_tiles = section * row_tiles;
    const int number = index / section_tiles;
    const int within = index - number * section_tiles;
    const int width = min(section, planes - number * section);
    const int row_tile = plan_.heavy_first ? row_tiles - 1 - within / width : within;
    tile.row = row_tile * Config::kRows;
    return number * section + (plan_.heavy_first ? within % width : 0);
  }

  ONEPASS_DEVICE void finish(std::uint32_t address, Tile& tile, const DeviceSequence& s) const {
    if (is_first_lane()) store_place(address, tile);
    tile.query_start = static_cast<int>(s.query_start);
    tile.key_start = static_cast<int>(s.key_start);
    tile.seqlen_q = s.seqlen_q;
    tile.key_begin = s.key_begin;
    tile.key_end = s.key_end;
    tile.diagonal = s.diagonal;
    tile.mode = has_bounds_in_memory(problem_) ? kScrub : 0;
    const int last_row = min(tile.row + Config::kRows, s.seqlen_q) - 1;
    const int begin = visible_begin(window_of(problem_), tile, tile.row),
              end_key = visible_end(window_of(problem_), tile, last_row);
    int first = begin / Config::kKeys;
    int end = begin < end_key ? (end_key + Config::kKeys - 1) / Config::kKeys : first;
    if (plan_.splits > 1) {
      const int share = (end - first + plan_.splits - 1) / plan_.splits;
      first = min(first + tile.split * share, end);
      end = min(first + share, end);
    }
    tile.first_block = first;
    tile.blocks = end - first;
    if (is_first_lane()) store_bounds(address, tile);
  }

  const Problem& problem_;
  const Plan& plan_;
  TileNumbers numbers_;
  int index_ = -1;         // of the tile in hand
  SequenceCursor cursor_;  // ragged
};

}  // namespace onepass::cuda::hopper
