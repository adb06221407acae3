// reference/append.cpp: new tokens into a cache, rotated in float64, quantized in float32 as every backend does.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/cache_problem.h"
#include "core/float8.h"
#include "core/parallel.h"
#include "reference/reference.h"
#include "reference/rotary.h"

namespace onepass::reference {
namespace {

// max(absmax/127, 1e-5); NaN when a value is not finite.
float scale_of(const float* values, std::int64_t count) {
  float largest = 0.0f;
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(values[i]);
    largest = std::max(largest, std::fabs(values[i]));
  }
  return finite ? std::max(largest / 127.0f, 1e-5f) : std::numeric_limits<float>::quiet_NaN();
}

std::int8_t quantized(float x, float scale) {
  const float quotient = x / scale;
  return quotient != quotient ? std::int8_t{0}
                              : static_cast<std::int8_t>(std::nearbyint(std::clamp(quotient, -127.0f, 127.0f)));
}

// One of K and V.
struct Side {
  const Operand& source;
  const Operand& stored;
  const CacheScale& scale;
  std::int64_t dim;
};

class Append {
 public:
  explicit Append(const AppendProblem& problem) : p_(problem), c_(problem.cache) {}

  void sequence(std::int64_t b) const {
    for (std::int64_t i = 0; i < p_.tokens.count(b); ++i) {
      token({p_.k_new, c_.k, c_.k_scale, c_.head_dim}, p_.rotary, b, i);
      token({p_.v_new, c_.v, c_.v_scale, c_.head_dim_v}, {}, b, i);
    }
  }

 private:
  void token(const Side& side, const RotaryTable& rotary, std::int64_t b, std::int64_t i) const {
    const std::int64_t heads = c_.num_heads_kv, position = c_.seqlens[b] + i;
    const Slot slot = c_.slot(b, position);
    std::vector<double> exact(heads * side.dim);
    for (std::int64_t g = 0; g < heads; ++g) {
      double* row = &exact[g * side.dim];
      with_float_type(p_.dtype, [&](auto zero) {
        const auto* source = side.source.row<decltype(zero)>(b, g, p_.tokens.first(b) + i);
        std::transform(source, source + side.dim, row, [](auto x) { return to_double(x); });
      });
      rotate(rotary, position - c_.start(b), row);
    }
    const std::vector<float> values(exact.begin(), exact.end());
    for (std::int64_t g = 0; g < heads; ++g) {
      write_scales(side, values, g, slot);
      for (std::int64_t d = 0; d < side.dim; ++d) write(side, exact[g * side.dim + d], slot, g, d);
    }
  }

  void write_scales(const Side& side, const std::vector<float>& values, std::int64_t g, Slot slot) const {
    const float* row = &values[g * side.dim];
    float* const scale = side.scale ? side.scale.at(slot.block, g, slot.offset) : nullptr;
    switch (c_.granularity) {
      case ScaleGranularity::kNone:
      case ScaleGranularity::kTensor: return;
      case ScaleGranularity::kToken: *scale = scale_of(values.data(), c_.num_heads_kv * side.dim); return;
      case ScaleGranularity::kHead: *scale = scale_of(row, side.dim); return;
      case ScaleGranularity::kGroup:
        for (std::int64_t d = 0; d < side.dim; d += c_.group_channels) {
          scale[d / c_.group_channels] = scale_of(row + d, c_.group_channels);
        }
    }
  }

  void write(const Side& side, double x, Slot slot, std::int64_t g, std::int64_t d) const {
    const float scale = side.scale ? side.scale.at(slot.block, g, slot.offset)[d / c_.group_channels] : 1.0f;
    with_cache_type(c_.dtype, [&](auto zero) {
      using T = decltype(zero);
      T& element = side.stored.row<T>(slot.block, g, slot.offset)[d];
      if constexpr (std::is_same_v<T, std::int8_t>) {
        element = quantized(static_cast<float>(x), scale);
      } else if constexpr (sizeof(T) == 1) {
        element = from_float<T>(static_cast<float>(x) / scale);
      } else {
        element = round_to<T>(x);
      }
    });
  }

  const AppendProblem& p_;
  const KVStorage& c_;
};

}  // namespace

void append(const AppendProblem& problem, const ExecutionContext& context) {
  executor_of(context).run(problem.cache.batch, [&](std::int64_t b) { Append(problem).sequence(b); });
  if (!problem.advance) return;
  for (std::int64_t b = 0; b < problem.cache.batch; ++b) {
    problem.cache.seqlens[b] += static_cast<std::int32_t>(problem.tokens.count(b));
  }
}

}  // namespace onepass::reference
