// reference/rotary.h: the rotary embedding of one row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cache_problem.h"
#include "reference/scalar.h"

namespace onepass::reference {

// In place. Queries before the first valid key have no position of their own: they see nothing.
inline void rotate(const RotaryTable& table, std::int64_t position, double* row) {
  if (!table) return;
  position = std::max<std::int64_t>(position, 0);
  for (std::int64_t i = 0; i < table.pairs; ++i) {
    const double cos = load(table.cos, table.dtype, position * table.cos_stride + i);
    const double sin = load(table.sin, table.dtype, position * table.sin_stride + i);
    double& x = row[table.interleaved ? 2 * i : i];
    double& y = row[table.interleaved ? 2 * i + 1 : i + table.pairs];
    const double rotated = x * cos - y * sin;
    y = x * sin + y * cos;
    x = rotated;
  }
}

}  // namespace onepass::reference
