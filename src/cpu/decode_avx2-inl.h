// cpu/decode_avx2-inl.h: both products of four and eight rows as floats where there are sixteen registers of eight
// lanes. Tiles of four rows × two keys, or two vectors of values, are what the registers hold: eight sums (two FMAs a
// clock that take four each need as many), two vectors of each key. Eight rows are two such tiles, and unpack stored
// rows twice: that takes less than a converted copy, whose channels must be broadcast one by one.
#if defined(ONEPASS_CPU_DECODE_AVX2_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_AVX2_INL_H_
#undef ONEPASS_CPU_DECODE_AVX2_INL_H_
#else
#define ONEPASS_CPU_DECODE_AVX2_INL_H_
#endif

#include "cpu/decode-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

inline constexpr int kQuad = 4;

// Whether rows are multiplied in such tiles; queries then lie [position / kLanes][row][lane].
template <int kRows>
inline constexpr bool kTiled = HWY_TARGET == HWY_AVX2&& kRows >= kQuad;

#if HWY_TARGET == HWY_AVX2

// Two vectors at a time, chunk after chunk: halves of a chunk of four.
template <class T>
inline constexpr int kHalves = Unpack<T>::kVectors == 4 ? 2 : 1;
template <class T>
inline constexpr std::int64_t kTwoVectorStep = kHalves<T> * 2 * kLanes;

template <int kHalf, class T>
HWY_INLINE void load_two(const T* p, Floats* HWY_RESTRICT v) {
  if constexpr (kHalves<T> == 2) {
    Unpack<T>::template load_half<kHalf>(p, v);
  } else if constexpr (Unpack<T>::kVectors == 2) {
    Unpack<T>::load(p, v);
  } else {
    v[0] = load_floats(p);
    v[1] = load_floats(p + kLanes);
  }
}

// Keeps a vector that several instructions read in a register: GCC would rather load it again for each, and two loads a
// clock are as much a limit as two FMAs.
template <class Vector>
HWY_INLINE Vector held(Vector v) {
  asm("" : "+x"(v.raw));
  return v;
}

// sums[key][row] += q·k for two keys and four rows, kVectors vectors.
template <int kRows, int kVectors>
HWY_INLINE void add_tile_products(const Floats (&k)[2][2], const float* HWY_RESTRICT q, Floats* HWY_RESTRICT sums) {
  const FloatTag f;
  HWY_UNROLL(2)
  for (int j = 0; j < kVectors; ++j) {
    HWY_UNROLL(4)
    for (int r = 0; r < kQuad; ++r) {
      const Floats qv = held(hn::Load(f, q + (j * kRows + r) * kLanes));
      sums[r] = hn::MulAdd(k[0][j], qv, sums[r]);
      sums[kQuad + r] = hn::MulAdd(k[1][j], qv, sums[kQuad + r]);
    }
  }
}

// scores[key][row] for an even number of keys. `ahead` fetches as much of what is stored as T meanwhile.
template <class T, class K, int kRows>
HWY_NOINLINE bool score_tiles(const K* const* rows, std::int64_t keys, const float* HWY_RESTRICT q, std::int64_t dim,
                              const LineFetcher& fetcher, float* HWY_RESTRICT scores) {
  const FloatTag f;
  LineWalker ahead(fetcher);
  constexpr std::int64_t kStep = kTwoVectorStep<K>;
  NanWatch<K> watch;
  for (std::int64_t key = 0; key < keys; key += 2) {
    const K *const a = rows[key], *const b = rows[key + 1];
    const auto add_part = [&](auto part) {
      constexpr int kPart = decltype(part)::value;
      const float* const q_part = q + kPart * kQuad * kLanes;
      Floats sums[2 * kQuad];
      HWY_UNROLL(8)
      for (int i = 0; i < 2 * kQuad; ++i) sums[i] = hn::Zero(f);
      Floats k[2][2];
      std::int64_t d = 0;
      for (; d + kStep <= dim; d += kStep) {
        ahead.keep_pace<2 * kStep * sizeof(T) * kQuad / kRows>(d / kStep);
        if constexpr (kPart == 0) {
          watch.see(a + d);
          watch.see(b + d);
        }
        load_two<0>(a + d, k[0]);
        load_two<0>(b + d, k[1]);
        add_tile_products<kRows, 2>(k, q_part + d * kRows, sums);
        if constexpr (kHalves<K> == 2) {
          load_two<1>(a + d, k[0]);
          load_two<1>(b + d, k[1]);
          add_tile_products<kRows, 2>(k, q_part + (d + 2 * kLanes) * kRows, sums);
        }
      }
      if constexpr (Unpack<K>::kVectors == 1) {
        if (d < dim) {
          k[0][0] = load_floats(a + d);
          k[1][0] = load_floats(b + d);
          add_tile_products<kRows, 1>(k, q_part + d * kRows, sums);
        }
      }
      add_partials<2 * kQuad, kLanes>(sums);
      if constexpr (kRows == kQuad) {
        hn::Store(sums[0], f, scores + key * kRows);
      } else {
        const hn::Half<FloatTag> of_key;
        hn::Store(hn::LowerHalf(of_key, sums[0]), of_key, scores + key * kRows + kPart * kQuad);
        hn::Store(hn::UpperHalf(of_key, sums[0]), of_key, scores + (key + 1) * kRows + kPart * kQuad);
      }
    };
    add_part(std::integral_constant<int, 0>());
    if constexpr (kRows > kQuad) add_part(std::integral_constant<int, 1>());
  }
  return !watch.found();
}

// out[row][position] += Σ_key weights[key][row]·v[key][position] for four rows and kVectors vectors: those at `at`.
template <class T, class V, int kRows, int kHalf, int kVectors>
HWY_NOINLINE bool add_value_tile(const V* const* rows, std::int64_t count, const float* HWY_RESTRICT weights,
                                 std::int64_t at, float* HWY_RESTRICT out, std::int64_t stride, LineWalker& walker) {
  const FloatTag f;
  constexpr int kStepBytes = static_cast<int>(kVectors * kLanes * sizeof(T)) * kQuad / kRows;
  LineWalker ahead = walker;
  NanWatch<V> watch;
  Floats sums[kQuad * kVectors];
  HWY_UNROLL(8)
  for (int i = 0; i < kQuad * kVectors; ++i) {
    sums[i] = hn::Load(f, out + i / kVectors * stride + i % kVectors * kLanes);
  }
  const auto add = [&](std::int64_t n) {
    Floats v[2];
    if constexpr (kVectors == 2) {
      if constexpr (kHalf == 0) watch.see(rows[n] + at);
      load_two<kHalf>(rows[n] + at, v);
    } else {
      v[0] = load_floats(rows[n] + at);
    }
    HWY_UNROLL(4)
    for (int r = 0; r < kQuad; ++r) {
      const Floats p = hn::Set(f, weights[n * kRows + r]);
      HWY_UNROLL(2)
      for (int j = 0; j < kVectors; ++j) sums[r * kVectors + j] = hn::MulAdd(p, v[j], sums[r * kVectors + j]);
    }
  };
  std::int64_t n = 0;
  for (; n + 4 <= count; n += 4) {
    ahead.keep_pace<4 * kStepBytes>(n / 4);
    HWY_UNROLL(4)
    for (int i = 0; i < 4; ++i) add(n + i);
  }
  for (; n < count; ++n) add(n);
  walker = ahead;
  HWY_UNROLL(8)
  for (int i = 0; i < kQuad * kVectors; ++i) {
    hn::Store(sums[i], f, out + i / kVectors * stride + i % kVectors * kLanes);
  }
  return !watch.found();
}

// The same for all positions and rows.
template <class T, class V, int kRows>
bool add_value_tiles(const V* const* rows, std::int64_t count, const float* weights, std::int64_t dim, float* out,
                     std::int64_t stride, LineWalker& ahead) {
  bool good = true;
  std::int64_t s = 0;
  const auto add = [&]<int kHalf, int kVectors>() {
    for (std::int64_t row = 0; row < kRows; row += kQuad) {
      good &= add_value_tile<T, V, kRows, kHalf, kVectors>(rows, count, weights + row, s,
                                                           out + row * stride + s + kHalf * 2 * kLanes, stride, ahead);
    }
  };
  for (; s + kTwoVectorStep<V> <= dim; s += kTwoVectorStep<V>) {
    add.template operator()<0, 2>();
    if constexpr (kHalves<V> == 2) add.template operator()<1, 2>();
  }
  if constexpr (Unpack<V>::kVectors == 1) {
    if (s < dim) add.template operator()<0, 1>();
  }
  return good;
}

#else
template <class T, class K, int kRows>
bool score_tiles(const K* const* rows, std::int64_t keys, const float* q, std::int64_t dim, const LineFetcher& ahead,
                 float* scores);
template <class T, class V, int kRows>
bool add_value_tiles(const V* const* rows, std::int64_t count, const float* weights, std::int64_t dim, float* out,
                     std::int64_t stride, LineWalker& ahead);
#endif

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
