// cpu/backward_layout.h: sizes and addresses that every part of the backward pass agrees on. Scores are held
// transposed, (key, query), so that queries run along the vector lanes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace onepass::cpu {

inline constexpr std::int64_t kPanel = 64;  // queries of a panel
inline constexpr std::int64_t kBlock = 64;  // keys of a block
inline constexpr std::int64_t kStrip = 64;  // columns of a strip

// Rows of a panel are held as strips of kStrip columns, each (kPanel, kStrip) and contiguous: a product reads one strip
// at a time, which stays in L1 whatever the head dim.
inline constexpr std::int64_t strip_offset(std::int64_t row, std::int64_t column) {
  return column / kStrip * (kPanel * kStrip) + row * kStrip + column % kStrip;
}
inline constexpr std::int64_t round_up(std::int64_t count, std::int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}
inline constexpr std::int64_t strips_size(std::int64_t columns) { return round_up(columns, kStrip) * kPanel; }

// Row length of floats in scratch: whole vectors of up to 16 lanes, and an odd number of cache lines, so that the same
// column of consecutive rows falls into different sets.
inline constexpr std::int64_t row_stride(std::int64_t columns) {
  const std::int64_t lines = round_up(columns, 16) / 16;
  return (lines | 1) * 16;
}

// The steps [begin, end) of a sum that row i of a product needs: i + begin_offset … i + end_offset, within [0, size).
// Along the diagonal of a mask the terms outside are zero.
struct Band {
  std::int64_t begin_offset, end_offset, size;

  static Band whole(std::int64_t size) { return {-kFar, kFar, size}; }
  std::int64_t begin(std::int64_t row) const { return std::clamp<std::int64_t>(row + begin_offset, 0, size); }
  std::int64_t end(std::int64_t row) const { return std::clamp<std::int64_t>(row + end_offset, begin(row), size); }

 private:
  static constexpr std::int64_t kFar = std::int64_t{1} << 40;
};

}  // namespace onepass::cpu
