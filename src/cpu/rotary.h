// cpu/rotary.h: the rotary embedding of one row of floats.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/cache_problem.h"
#include "core/half.h"

namespace onepass::cpu {

// In place. Queries before the first valid key have no position of their own: they see nothing.
inline void rotate_row(const RotaryTable& table, std::int64_t position, float* row) {
  position = std::max<std::int64_t>(position, 0);
  const std::int64_t x_step = table.interleaved ? 2 : 1, y_first = table.interleaved ? 1 : table.pairs;
  with_float_type(table.dtype, [&]<class T>(T) {
    const T* cos = static_cast<const T*>(table.cos) + position * table.cos_stride;
    const T* sin = static_cast<const T*>(table.sin) + position * table.sin_stride;
    for (std::int64_t i = 0; i < table.pairs; ++i) {
      const auto c = static_cast<float>(to_float(cos[i])), s = static_cast<float>(to_float(sin[i]));
      float& x = row[i * x_step];
      float& y = row[i * x_step + y_first];
      const float turned = x * c - y * s;
      y = x * s + y * c;
      x = turned;
    }
  });
}

}  // namespace onepass::cpu
