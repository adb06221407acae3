// cpu/backward_pack-inl.h: operands on their way into scratch, as floats: rows with zeros up to whole vectors, and the
// same transposed, so that queries lie along lanes.
#if defined(ONEPASS_CPU_BACKWARD_PACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_BACKWARD_PACK_INL_H_
#undef ONEPASS_CPU_BACKWARD_PACK_INL_H_
#else
#define ONEPASS_CPU_BACKWARD_PACK_INL_H_
#endif

#include "cpu/backward_block-inl.h"
#include "cpu/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
namespace {

inline bool all_finite(const float* rows, std::int64_t stride, std::int64_t count, std::int64_t columns) {
  const FloatTag f;
  Floats sum = hn::Zero(f);  // x·0 is NaN for NaN and ±Inf
  for (std::int64_t r = 0; r < count; ++r) {
    for (std::int64_t c = 0; c < columns; c += lane_count()) {
      sum = hn::MulAdd(hn::Load(f, rows + r * stride + c), hn::Zero(f), sum);
    }
  }
  return hn::AllFalse(f, hn::IsNaN(sum));
}

// rows (count, dim) with zeros up to whole vectors.
template <class T>
void load_rows(const T* src, std::int64_t src_stride, std::int64_t count, std::int64_t dim, float* dst,
               std::int64_t stride) {
  convert_rows(src, src_stride, count, dim, dst, stride);
  for (std::int64_t r = 0; r < count; ++r) std::fill(dst + r * stride + dim, dst + r * stride + padded(dim), 0.0f);
}

// Rows of a panel as strips; rows for which `empty(row)` holds become zero.
template <class T, class Empty>
void load_strips(const T* src, std::int64_t src_stride, std::int64_t count, std::int64_t dim, const Empty& empty,
                 float* rows) {
  for (std::int64_t column = 0; column < dim; column += kStrip) {
    float* const strip = rows + strip_offset(0, column);
    const std::int64_t columns = std::min(dim - column, kStrip);
    load_rows(src + column, src_stride, count, columns, strip, kStrip);
    for (std::int64_t i = 0; i < padded(count); ++i) {
      if (i >= count || empty(i)) std::fill_n(strip + i * kStrip, padded(columns), 0.0f);
    }
  }
}

inline bool strips_finite(const float* rows, std::int64_t count, std::int64_t dim) {
  bool finite = true;
  for (std::int64_t column = 0; column < dim; column += kStrip) {
    finite &= all_finite(rows + strip_offset(0, column), kStrip, count, padded(std::min(dim - column, kStrip)));
  }
  return finite;
}

// lanes(d, row) = factor·rows(row, d) for `width` rows.
inline void strips_to_lanes(const float* rows, std::int64_t width, std::int64_t dim, float factor, float* lanes) {
  for (std::int64_t d = 0; d < dim; d += lane_count()) {
    for (std::int64_t i = 0; i < width; i += lane_count()) {
      transpose_square(rows + strip_offset(i, d), kStrip, lanes + d * kPanel + i, kPanel);
    }
  }
  const Floats factors = hn::Set(FloatTag(), factor);
  for (std::int64_t d = 0; d < dim; ++d) {
    for (std::int64_t i = d * kPanel; i < d * kPanel + width; i += lane_count()) {
      store_floats(hn::Mul(load_floats(lanes + i), factors), lanes + i);
    }
  }
}

// products(lane) = Σ_d a(d, lane)·b(d, lane), by the same chain of FMAs as the product dO·Vᵀ: where a query sees one
// key, out is that key's value, dO·V − delta is exactly 0, and so are the gradients of its score.
inline void lane_products(const float* a, const float* b, std::int64_t width, std::int64_t dim, float* products) {
  const FloatTag f;
  for (std::int64_t i = 0; i < width; i += lane_count()) {
    Floats sum = hn::Zero(f);
    for (std::int64_t d = 0; d < dim; ++d) {
      sum = hn::MulAdd(hn::Load(f, a + d * kPanel + i), hn::Load(f, b + d * kPanel + i), sum);
    }
    hn::Store(sum, f, products + i);
  }
}

}  // namespace
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
