// cpu/tile-inl.h: the register-tiled products. Both products of a tile have one shape, C[i][lane] = Σ_s A[i,
// s]·B[s][lane] with B and C lane-major and A a broadcast operand in its natural layout:
//   scores Sᵀ = K·Qᵀ: i key, s channel (contiguous in K);  values Oᵀ += Vᵀ·Pᵀ: i channel, s key (contiguous in i).
// Every element is one chain of FMAs in the order of s, whatever the tile: a row's bits do not depend on its panel.
#if defined(ONEPASS_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_TILE_INL_H_
#undef ONEPASS_CPU_TILE_INL_H_
#else
#define ONEPASS_CPU_TILE_INL_H_
#endif

#include <utility>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

// Accumulators: kRows × kVectors. 24 of 32 registers (AVX-512, NEON, SVE) or 12 of 16; the rest holds one row of B and
// a broadcast. Loads per FMA: 6×4 0.42, 8×3 0.46, 12×2 0.58, 12×1 1.08.
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSSE3 || HWY_TARGET == HWY_SSE4
inline constexpr int kMaxVectors = 3;
template <int kVectors>
inline constexpr int kTileRows = kVectors == 3   ? 4
                                 : kVectors == 2 ? 6
                                                 : 8;
#else
inline constexpr int kMaxVectors = 4;
template <int kVectors>
inline constexpr int kTileRows = kVectors == 4   ? 6
                                 : kVectors == 3 ? 8
                                                 : 12;
#endif

// A operand: element (i, s) at data[i·row_stride + s·step_stride]; one of the strides is 1.
struct Broadcast {
  const float* data;
  std::int64_t stride;  // the other one
};

// The accumulators are a parameter pack and not an array, because SVE vectors cannot be array elements.
// `finish.template done<I>(accumulator)` receives element I = row·kVectors + vector.
template <int kVectors, bool kStepContiguous, std::size_t... I, class Finish, class... Accumulators>
HWY_INLINE void multiply_tile(std::index_sequence<I...>, Broadcast a, const float* HWY_RESTRICT b, std::int64_t width,
                              std::int64_t steps, const Finish& finish, Accumulators... sums) {
  const FloatTag f;
  const std::int64_t lanes = lane_count();
  const float* HWY_RESTRICT at = a.data;
  const std::int64_t row_stride = kStepContiguous ? a.stride : 1, step_stride = kStepContiguous ? 1 : a.stride;
  for (std::int64_t s = 0; s < steps; ++s) {
    ((sums = hn::MulAdd(hn::Set(f, at[(I / kVectors) * row_stride]), hn::Load(f, b + (I % kVectors) * lanes), sums)),
     ...);
    at += step_stride;
    b += width;
  }
  (finish.template done<I>(sums), ...);
}

// Sᵀ rows: stores the product and keeps the column maximum.
template <int kVectors>
struct FinishScores {
  float* HWY_RESTRICT scores;
  std::int64_t width;
  float* HWY_RESTRICT maximum;

  template <std::size_t I>
  HWY_INLINE void done(Floats sum) const {
    const FloatTag f;
    constexpr std::int64_t row = I / kVectors;
    const std::int64_t column = (I % kVectors) * lane_count();
    hn::Store(sum, f, scores + row * width + column);
    hn::Store(hn::Max(sum, hn::Load(f, maximum + column)), f, maximum + column);
  }
};

template <int kVectors>
struct FinishValues {
  float* HWY_RESTRICT out;
  std::int64_t width;

  template <std::size_t I>
  HWY_INLINE void done(Floats sum) const {
    constexpr std::int64_t row = I / kVectors;
    hn::Store(sum, FloatTag(), out + row * width + (I % kVectors) * lane_count());
  }
};

template <int kRows, int kVectors, std::size_t... I>
HWY_INLINE void score_tile(std::index_sequence<I...> all, Broadcast k, const float* q, std::int64_t width,
                           std::int64_t dim, float* scores, float* maximum) {
  multiply_tile<kVectors, true>(all, k, q, width, dim, FinishScores<kVectors>{scores, width, maximum},
                                (static_cast<void>(I), hn::Zero(FloatTag()))...);
}

template <int kRows, int kVectors, std::size_t... I>
HWY_INLINE void value_tile(std::index_sequence<I...> all, Broadcast v, const float* p, std::int64_t width,
                           std::int64_t keys, float* out, const float* rescale) {
  const FloatTag f;
  const std::int64_t lanes = lane_count();
  multiply_tile<kVectors, false>(all, v, p, width, keys, FinishValues<kVectors>{out, width},
                                 hn::Mul(hn::Load(f, out + (I / kVectors) * width + (I % kVectors) * lanes),
                                         hn::Load(f, rescale + (I % kVectors) * lanes))...);
}

// Runs `tile(std::integral_constant<int, rows>, first row)` over `count` rows: full tiles, then 8, 4, 2, 1.
template <int kRows, class Tile>
HWY_INLINE void for_row_tiles(std::int64_t first, std::int64_t count, const Tile& tile) {
  for (; first + kRows <= count; first += kRows) tile.template run<kRows>(first);
  if constexpr (kRows > 1) {
    constexpr int kNext = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows > 2 ? 2 : 1;
    if (first < count) for_row_tiles<kNext>(first, count, tile);
  }
}

template <int kVectors>
struct ScoreRows {
  Broadcast k;
  const float* q;
  std::int64_t width, dim;
  float* scores;
  float* maximum;

  template <int kRows>
  HWY_INLINE void run(std::int64_t first) const {
    score_tile<kRows, kVectors>(std::make_index_sequence<kRows * kVectors>(),
                                Broadcast{k.data + first * k.stride, k.stride}, q, width, dim, scores + first * width,
                                maximum);
  }
};

template <int kVectors>
struct ValueRows {
  Broadcast v;
  const float* p;
  std::int64_t width, keys;
  float* out;
  const float* rescale;

  template <int kRows>
  HWY_INLINE void run(std::int64_t first) const {
    value_tile<kRows, kVectors>(std::make_index_sequence<kRows * kVectors>(), Broadcast{v.data + first, v.stride}, p,
                                width, keys, out + first * width, rescale);
  }
};

// scores[key][lane] = Σ_d k[key][d]·q[d][lane] for `keys` rows; maximum[lane] = max(maximum, scores).
template <int kVectors>
HWY_NOINLINE void multiply_scores(Broadcast k, const float* q, std::int64_t width, std::int64_t keys, std::int64_t dim,
                                  float* scores, float* maximum) {
  for_row_tiles<kTileRows<kVectors>>(0, keys, ScoreRows<kVectors>{k, q, width, dim, scores, maximum});
}

// out[d][lane] = out[d][lane]·rescale[lane] + Σ_key v[key][d]·p[key][lane] for d < dim.
template <int kVectors>
HWY_NOINLINE void multiply_values(Broadcast v, const float* p, std::int64_t width, std::int64_t keys, std::int64_t dim,
                                  float* out, const float* rescale) {
  for_row_tiles<kTileRows<kVectors>>(0, dim, ValueRows<kVectors>{v, p, width, keys, out, rescale});
}

// Calls f(std::integral_constant<int, vectors>).
template <class F>
HWY_INLINE void with_vectors(std::int64_t vectors, const F& f) {
  switch (vectors) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    default: return f(std::integral_constant<int, kMaxVectors>());
  }
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
