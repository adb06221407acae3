// cpu/transpose-inl.h: row-major ↔ lane-major. Queries lie along vector lanes, so a panel of rows is transposed once
// on the way in and its result once on the way out.
#if defined(ONEPASS_CPU_TRANSPOSE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_TRANSPOSE_INL_H_
#undef ONEPASS_CPU_TRANSPOSE_INL_H_
#else
#define ONEPASS_CPU_TRANSPOSE_INL_H_
#endif

#include <algorithm>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

#if !HWY_HAVE_SCALABLE
inline constexpr int kLanes = HWY_MAX_BYTES / sizeof(float);

// v[i][j] ↔ v[j][i] for kLanes vectors: 4×4 inside 128-bit blocks, then the blocks.
HWY_INLINE void transpose_vectors(Floats* v) {
  const FloatTag f;
  const hn::Repartition<std::uint64_t, FloatTag> pairs;
  Floats w[kLanes];
  HWY_UNROLL(4)
  for (int i = 0; i < kLanes; i += 4) {
    const auto a = hn::BitCast(pairs, hn::InterleaveLower(f, v[i], v[i + 1]));
    const auto b = hn::BitCast(pairs, hn::InterleaveLower(f, v[i + 2], v[i + 3]));
    const auto c = hn::BitCast(pairs, hn::InterleaveUpper(f, v[i], v[i + 1]));
    const auto d = hn::BitCast(pairs, hn::InterleaveUpper(f, v[i + 2], v[i + 3]));
    w[i] = hn::BitCast(f, hn::InterleaveLower(pairs, a, b));
    w[i + 1] = hn::BitCast(f, hn::InterleaveUpper(pairs, a, b));
    w[i + 2] = hn::BitCast(f, hn::InterleaveLower(pairs, c, d));
    w[i + 3] = hn::BitCast(f, hn::InterleaveUpper(pairs, c, d));
  }
  // w[4·i + e] holds column 4·b + e of rows 4·i … 4·i + 3 in block b.
  HWY_UNROLL(4)
  for (int e = 0; e < 4; ++e) {
    if constexpr (kLanes == 4) {
      v[e] = w[e];
    } else if constexpr (kLanes == 8) {
      v[e] = hn::ConcatLowerLower(f, w[4 + e], w[e]);
      v[4 + e] = hn::ConcatUpperUpper(f, w[4 + e], w[e]);
    } else {
      const Floats even0 = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(w[4 + e]), w[e]);
      const Floats even1 = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(w[12 + e]), w[8 + e]);
      const Floats odd0 = hn::OddEvenBlocks(w[4 + e], hn::SwapAdjacentBlocks(w[e]));
      const Floats odd1 = hn::OddEvenBlocks(w[12 + e], hn::SwapAdjacentBlocks(w[8 + e]));
      v[e] = hn::ConcatLowerLower(f, even1, even0);
      v[4 + e] = hn::ConcatLowerLower(f, odd1, odd0);
      v[8 + e] = hn::ConcatUpperUpper(f, even1, even0);
      v[12 + e] = hn::ConcatUpperUpper(f, odd1, odd0);
    }
  }
}
#endif

// One square: dst[j·ld_dst + i] = src[i·ld_src + j] for i, j < lane_count(), src and dst rows of floats.
HWY_INLINE void transpose_square(const float* src, std::int64_t ld_src, float* dst, std::int64_t ld_dst) {
#if HWY_HAVE_SCALABLE
  const std::int64_t lanes = lane_count();
  for (std::int64_t i = 0; i < lanes; ++i) {
    for (std::int64_t j = 0; j < lanes; ++j) dst[j * ld_dst + i] = src[i * ld_src + j];
  }
#else
  Floats v[kLanes];
  HWY_UNROLL(16)
  for (int i = 0; i < kLanes; ++i) v[i] = load_floats(src + i * ld_src);
  transpose_vectors(v);
  HWY_UNROLL(16)
  for (int i = 0; i < kLanes; ++i) store_floats(v[i], dst + i * ld_dst);
#endif
}

// Multiple of the vector length that holds `count`: the row length of the staging buffers below.
HWY_INLINE std::int64_t padded(std::int64_t count) { return (count + lane_count() - 1) / lane_count() * lane_count(); }

// Addresses of as many rows as a vector has lanes.
template <class T>
struct RowPointers {
  T* at[HWY_MAX_BYTES / sizeof(float)];
};

// dst[j·ld + i] = rows[i][d + j] as float for i, j < lane_count(): a square whose rows are full.
template <class T>
HWY_INLINE void pack_square(const RowPointers<const T>& rows, std::int64_t d, float* dst, std::int64_t ld,
                            float* staging) {
#if HWY_HAVE_SCALABLE
  const std::int64_t lanes = lane_count();
  for (std::int64_t i = 0; i < lanes; ++i) {
    store_floats(load_floats(rows.at[i] + d), staging + i * lanes);
  }
  transpose_square(staging, lanes, dst, ld);
#else
  static_cast<void>(staging);
  Floats v[kLanes];
  HWY_UNROLL(16)
  for (int i = 0; i < kLanes; ++i) v[i] = load_floats(rows.at[i] + d);
  transpose_vectors(v);
  HWY_UNROLL(16)
  for (int i = 0; i < kLanes; ++i) store_floats(v[i], dst + i * ld);
#endif
}

// Rows → lanes. panel[d·width + lane] = rows[lane][d] for d < dim and lane < count; lanes from count to the next
// multiple of lane_count() are 0. `row_of(lane)` gives a row's address. panel holds padded(dim)·width floats (rows past
// dim become 0), staging lane_count()² floats.
template <class T, class RowOf>
HWY_INLINE void pack_panel(const RowOf& row_of, std::int64_t count, std::int64_t dim, float* panel, std::int64_t width,
                           float* staging) {
  const std::int64_t lanes = lane_count();
  RowPointers<const T> rows;
  for (std::int64_t first = 0; first < count; first += lanes) {
    const std::int64_t filled = std::min(lanes, count - first);
    for (std::int64_t i = 0; i < filled; ++i) rows.at[i] = static_cast<const T*>(row_of(first + i));
    for (std::int64_t d = 0; d < dim; d += lanes) {
      float* const square = panel + d * width + first;
      if (filled == lanes && d + lanes <= dim) {
        pack_square<T>(rows, d, square, width, staging);
        continue;
      }
      std::fill_n(staging, lanes * lanes, 0.0f);
      for (std::int64_t i = 0; i < filled; ++i) {
        convert_row(rows.at[i] + d, std::min(lanes, dim - d), staging + i * lanes);
      }
      transpose_square(staging, lanes, square, width);
    }
  }
}

// Lanes → rows: rows[lane][d] = panel[d·width + lane]·factors[lane], rounded to T, for d < dim and lane < count.
// Reads panel rows up to padded(dim): what they hold past dim does not matter. staging: lane_count()² floats.
template <class T, class RowOf>
HWY_INLINE void unpack_panel(const float* panel, std::int64_t width, const float* factors, std::int64_t count,
                             std::int64_t dim, const RowOf& row_of, float* staging) {
  const std::int64_t lanes = lane_count();
  RowPointers<T> rows;
  for (std::int64_t first = 0; first < count; first += lanes) {
    const std::int64_t filled = std::min(lanes, count - first);
    for (std::int64_t i = 0; i < filled; ++i) rows.at[i] = static_cast<T*>(row_of(first + i));
    for (std::int64_t d = 0; d < dim; d += lanes) {
      transpose_square(panel + d * width + first, width, staging, lanes);
      for (std::int64_t i = 0; i < filled; ++i) {
        float* const row = staging + i * lanes;
        T* const dst = rows.at[i] + d;
        const Floats scaled = hn::Mul(load_floats(row), hn::Set(FloatTag(), factors[first + i]));
        if (d + lanes <= dim) {
          store_floats(scaled, dst);
        } else {
          store_floats(scaled, row);
          store_row(row, dim - d, dst);
        }
      }
    }
  }
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
