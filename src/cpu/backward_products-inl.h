// cpu/backward_products-inl.h: C(i, :) = epilogue(Σ_s A(i, s)·B(s, :)), the one shape of the backward pass's five
// products, over the register tiles of tile-inl.h. A is broadcast; lanes run along the columns of B and C.
#if defined(ONEPASS_CPU_BACKWARD_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_BACKWARD_PRODUCTS_INL_H_
#undef ONEPASS_CPU_BACKWARD_PRODUCTS_INL_H_
#else
#define ONEPASS_CPU_BACKWARD_PRODUCTS_INL_H_
#endif

#include "cpu/backward_layout.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
namespace {

// Epilogues see one vector of C: its address and its column.

// C += A·B.
struct Accumulate {
  HWY_INLINE Floats start(const float* c) const { return hn::Load(FloatTag(), c); }
  HWY_INLINE Floats finish(Floats sum, const float*, std::int64_t) const { return sum; }
};

// C = A·B.
struct Assign {
  HWY_INLINE Floats start(const float*) const { return hn::Zero(FloatTag()); }
  HWY_INLINE Floats finish(Floats sum, const float*, std::int64_t) const { return sum; }
};

// C = e^(scale·A·B − lse): weights from products. The difference is taken in the unit of the logits and rounded once,
// so that large logits lose no more than they must.
struct ToWeights {
  float scale;
  const float* lse;  // by column
  HWY_INLINE Floats start(const float*) const { return hn::Zero(FloatTag()); }
  HWY_INLINE Floats finish(Floats sum, const float*, std::int64_t column) const {
    const FloatTag f;
    const Floats exponent = hn::MulSub(sum, hn::Set(f, scale), hn::Load(f, lse + column));
    return exp2_floats(hn::Mul(exponent, hn::Set(f, 1.44269504088896341f)));
  }
};

// C = C∘(A·B − delta): gradients of scores from weights and gradients of weights.
struct ToScoreGradients {
  const float* delta;  // by column
  HWY_INLINE Floats start(const float*) const { return hn::Zero(FloatTag()); }
  HWY_INLINE Floats finish(Floats sum, const float* c, std::int64_t column) const {
    return hn::Mul(hn::Load(FloatTag(), c), hn::Sub(sum, hn::Load(FloatTag(), delta + column)));
  }
};

// The same under dropout: C = survival·kept∘(A·B) − C∘delta, with the weights that survived beside all of them.
struct ToDroppedScoreGradients {
  const float* delta;
  const float* weights;  // C itself
  const float* kept;     // laid out like C
  float survival;        // 1/(1 − p)
  HWY_INLINE Floats start(const float*) const { return hn::Zero(FloatTag()); }
  HWY_INLINE Floats finish(Floats sum, const float* c, std::int64_t column) const {
    const FloatTag f;
    const Floats all = hn::Mul(hn::Load(f, c), hn::Load(f, delta + column));
    return hn::MulSub(hn::Mul(hn::Set(f, survival), hn::Load(f, kept + (c - weights))), sum, all);
  }
};

template <int kVectors, class Epilogue>
struct FinishTile {
  const Epilogue& epilogue;
  float* HWY_RESTRICT c;
  std::int64_t stride, column;

  template <std::size_t I>
  HWY_INLINE float* at() const {
    return c + static_cast<std::int64_t>(I / kVectors) * stride +
           static_cast<std::int64_t>(I % kVectors) * lane_count();
  }
  template <std::size_t I>
  HWY_INLINE void done(Floats sum) const {
    const std::int64_t offset = static_cast<std::int64_t>(I % kVectors) * lane_count();
    hn::Store(epilogue.finish(sum, at<I>(), column + offset), FloatTag(), at<I>());
  }
};

// One column strip of a product: all rows of C, kVectors vectors of columns.
template <int kVectors, bool kStepContiguous, class Epilogue>
struct ProductRows {
  Broadcast a;
  const float* b;
  std::int64_t b_stride;
  Band band;
  float* c;
  std::int64_t c_stride, column;
  const Epilogue& epilogue;

  template <int kRows>
  HWY_INLINE void run(std::int64_t first) const {
    tile(std::make_index_sequence<kRows * kVectors>(), first, band.begin(first), band.end(first + kRows - 1));
  }

  template <std::size_t... I>
  HWY_INLINE void tile(std::index_sequence<I...> all, std::int64_t first, std::int64_t begin, std::int64_t end) const {
    const FinishTile<kVectors, Epilogue> out{epilogue, c + first * c_stride, c_stride, column};
    const Broadcast rows{a.data + (kStepContiguous ? first * a.stride + begin : first + begin * a.stride), a.stride};
    multiply_tile<kVectors, kStepContiguous>(all, rows, b + begin * b_stride, b_stride, end - begin, out,
                                             epilogue.start(out.template at<I>())...);
  }
};

template <int kVectors, bool kStepContiguous, class Epilogue>
HWY_NOINLINE void multiply_strip(std::int64_t rows, const ProductRows<kVectors, kStepContiguous, Epilogue>& strip) {
  for_row_tiles<kTileRows<kVectors>>(0, rows, strip);
}

// C (rows × columns) from A (rows × band) and B (band × columns). columns is a multiple of the vector length; with
// kStepContiguous A(i, s) stands at data[i·stride + s], else at data[s·stride + i].
template <bool kStepContiguous, int kVectors = kMaxVectors, class Epilogue>
HWY_INLINE void multiply(std::int64_t rows, std::int64_t columns, Broadcast a, const float* b, std::int64_t b_stride,
                         const Band& band, float* c, std::int64_t c_stride, const Epilogue& epilogue,
                         std::int64_t column = 0) {
  const std::int64_t step = kVectors * lane_count();
  for (; column + step <= columns; column += step) {
    multiply_strip<kVectors, kStepContiguous, Epilogue>(
        rows, {a, b + column, b_stride, band, c + column, c_stride, column, epilogue});
  }
  if constexpr (kVectors > 1) {
    multiply<kStepContiguous, kVectors - 1>(rows, columns, a, b, b_stride, band, c, c_stride, epilogue, column);
  }
}

}  // namespace
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
