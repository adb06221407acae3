// cpu/decode-inl.h: both products for few query rows, bound by memory. A row tile is kRows = lanes/E rows, E a power of
// two: a vector holds E channels of every row, so no lane is idle however few rows there are:
//   scores: q[s/E][row·E + s%E]; E channels of a key are broadcast to all rows; the E partial sums of a row meet in
//           log2 E pairwise additions of E keys, which leave S[key][row] contiguous;
//   values: channels along lanes, the weights S[key][row] broadcast.
// Up to four rows read keys as they are stored, a vector of channels along lanes; more rows read a key block that was
// converted once for all. On AVX2 four and eight rows have tiles of their own (decode_avx2-inl.h).
#if defined(ONEPASS_CPU_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_INL_H_
#undef ONEPASS_CPU_DECODE_INL_H_
#else
#define ONEPASS_CPU_DECODE_INL_H_
#endif

#include "cpu/cache_reader.h"
#include "cpu/dequant-inl.h"
#include "cpu/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
#if !HWY_HAVE_SCALABLE

// Keys of a block; blocks begin at multiples of it in the sequence, so that a row's bits depend on nothing else.
inline constexpr std::int64_t kDecodeKeys = 64;

// Keys whose scores are made before their values are read: the longer a stretch of memory, the better a processor
// fetches it by itself.
inline constexpr std::int64_t kSpanKeys = 256;

// Rows that are converted at a time: few, so that they stay in L1 beside the rows fetched ahead.
inline constexpr std::int64_t kConvertedKeys = 16, kConvertedValues = 32;

// Row stride of converted rows: a constant, so that rows are addressed by displacement; odd in cache lines.
inline constexpr std::int64_t kConvertedStride = 512 + 16;

// Accumulators of a tile: keys of the first product, rows × vectors of the second.
// Vectors of one query row that stay in registers beside kLanes sums.
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSSE3 || HWY_TARGET == HWY_SSE4
inline constexpr int kAccumulators = 8, kHeldVectors = 4;
#else
inline constexpr int kAccumulators = 16, kHeldVectors = 8;
#endif

// Keys that one row's code goes through at a time. Few: an AMD processor fetches ahead by the stride of each
// instruction, and at strides of 4 KB (16 keys of 256 bytes) reads half as fast.
inline constexpr int kOneRowKeys = 4;

// What queries, weights and their units may be in fixed point, so that units and their inverses are normal.
inline constexpr float kLargestFixed = 1e30f, kSmallestFixed = 1e-30f;

// The largest magnitude of a query of whole vectors. 0 when it has no fixed-point form: not finite, or out of all
// proportion.
inline float largest_of_query(const float* query, std::int64_t dim) {
  const FloatTag f;
  const Floats limit = hn::Set(f, kLargestFixed);
  Floats largest = hn::Zero(f);
  auto good = hn::Eq(largest, largest);
  for (std::int64_t d = 0; d < dim; d += kLanes) {
    const Floats magnitude = hn::Abs(hn::LoadU(f, query + d));
    good = hn::And(good, hn::Le(magnitude, limit));
    largest = hn::Max(largest, magnitude);
  }
  if (!hn::AllTrue(f, good)) return 0.0f;
  const float all = hn::GetLane(hn::MaxOfLanes(f, largest));
  return all < kSmallestFixed ? 0.0f : all;
}

// Units of a block's weights [key][row] in fixed point, whose largest is `one`: their inverses for every lane. False
// when some weights have no such form.
template <int kRows>
HWY_INLINE bool fixed_point_units(const float* weights, float one, float* inverses, float* units) {
  const FloatTag f;
  auto good = hn::Eq(hn::Zero(f), hn::Zero(f));
  Floats largest = hn::Zero(f);
  for (std::int64_t i = 0; i < kDecodeKeys * kRows; i += kLanes) {
    const Floats w = hn::Load(f, weights + i);
    good = hn::And(good, hn::And(hn::Ge(w, hn::Zero(f)), hn::Lt(w, hn::Set(f, kLargestFixed))));
    largest = hn::Max(largest, w);
  }
  if (!hn::AllTrue(f, good)) return false;
  HWY_ALIGN float lanes[kLanes];
  hn::Store(largest, f, lanes);
  for (std::int64_t r = 0; r < kRows; ++r) {
    float row = 0.0f;
    for (std::int64_t e = 0; e < kLanes / kRows; ++e) row = std::max(row, lanes[e * kRows + r]);
    if (row != 0.0f && row < kSmallestFixed) return false;
    const float inverse = row == 0.0f ? 0.0f : one / row;
    for (std::int64_t e = 0; e < kLanes / kRows; ++e) inverses[e * kRows + r] = inverse;
    units[r] = row / one;
  }
  return true;
}

// Adds neighbours: E partial sums a row in each of kCount vectors → kCount/E vectors of E keys each.
template <int kCount, int kPartials, class Sum>
HWY_INLINE void add_partials(Sum* v) {
  const hn::DFromV<Sum> f;
  if constexpr (HWY_TARGET == HWY_AVX2 && kCount == 8 && kPartials == 8) {
    // Within 128 bits, which shuffles of one clock do not leave, as long as there are several vectors.
    const hn::Repartition<std::uint64_t, decltype(f)> pairs;
    HWY_UNROLL(4)
    for (int i = 0; i < 8; i += 2) {
      v[i] = hn::Add(hn::InterleaveLower(f, v[i], v[i + 1]), hn::InterleaveUpper(f, v[i], v[i + 1]));
    }
    HWY_UNROLL(2)
    for (int i = 0; i < 8; i += 4) {
      const auto first = hn::BitCast(pairs, v[i]), second = hn::BitCast(pairs, v[i + 2]);
      v[i] = hn::Add(hn::BitCast(f, hn::InterleaveLower(pairs, first, second)),
                     hn::BitCast(f, hn::InterleaveUpper(pairs, first, second)));
    }
    v[0] = hn::Add(hn::ConcatLowerLower(f, v[4], v[0]), hn::ConcatUpperUpper(f, v[4], v[0]));
  } else if constexpr (kPartials > 1) {
    HWY_UNROLL(8)
    for (int i = 0; i < kCount / 2; ++i) {
      v[i] = hn::Add(hn::ConcatEven(f, v[2 * i + 1], v[2 * i]), hn::ConcatOdd(f, v[2 * i + 1], v[2 * i]));
    }
    add_partials<kCount / 2, kPartials / 2>(v);
  }
}

// sums[key] += Σ q·k over kChunks chunks from position d on, key after key, so that rows are read as they lie.
template <class T, int kChunks>
HWY_INLINE void add_one_row(const T* const* rows, const float* HWY_RESTRICT q, std::int64_t d, LineFetcher& ahead,
                            NanWatch<T>& watch, Floats* HWY_RESTRICT sums) {
  const FloatTag f;
  constexpr int kVectors = Unpack<T>::kVectors;
  constexpr std::int64_t kChunk = kVectors * kLanes;
  Floats qv[kChunks * kVectors];
  HWY_UNROLL(8)
  for (int j = 0; j < kChunks * kVectors; ++j) qv[j] = hn::Load(f, q + d + j * kLanes);
  for (int i = 0; i < kLanes; i += kOneRowKeys) {
    HWY_UNROLL(4)
    for (int n = i; n < i + kOneRowKeys; ++n) {
      HWY_UNROLL(8)
      for (int c = 0; c < kChunks; ++c) {
        const T* const chunk = rows[n] + d + c * kChunk;
        Floats kv[kVectors];
        Unpack<T>::load(chunk, kv);
        watch.see(chunk);
        ahead.keep_pace<kChunk * sizeof(T)>(n);
        HWY_UNROLL(4)
        for (int j = 0; j < kVectors; ++j) sums[n] = hn::MulAdd(kv[j], qv[c * kVectors + j], sums[n]);
      }
    }
  }
}

// scores[key] for `keys` keys, a multiple of kConvertedKeys, and one row. `ahead` fetches as much as their storage
// meanwhile. Like the other functions that read storage: false when it must be converted exactly.
template <class T>
HWY_NOINLINE bool score_one_row(const T* const* rows, std::int64_t keys, const float* HWY_RESTRICT q, std::int64_t dim,
                                LineFetcher ahead, float* HWY_RESTRICT scores) {
  const FloatTag f;
  constexpr std::int64_t kChunk = Unpack<T>::kVectors * kLanes;
  constexpr int kChunks = kHeldVectors / Unpack<T>::kVectors;
  NanWatch<T> watch;
  for (std::int64_t key = 0; key < keys; key += kLanes) {
    Floats sums[kLanes];
    HWY_UNROLL(16)
    for (int i = 0; i < kLanes; ++i) sums[i] = hn::Zero(f);
    std::int64_t d = 0;
    for (; d + kChunks * kChunk <= dim; d += kChunks * kChunk) {
      add_one_row<T, kChunks>(rows + key, q, d, ahead, watch, sums);
    }
    for (; d < dim; d += kChunk) add_one_row<T, 1>(rows + key, q, d, ahead, watch, sums);
    add_partials<kLanes, kLanes>(sums);
    hn::Store(sums[0], f, scores + key);
  }
  return !watch.found();
}

// Whether queries lie row by row, q[row][position], and keys are multiplied as they are stored. More rows have too few
// registers for it.
template <int kRows>
inline constexpr bool kRowByRow = kRows == 1 || (kRows <= 4 && kLanes >= 8);

// scores[key][row] for `keys` keys, a multiple of kLanes / kRows. A key's vector serves all rows, a query's all keys at
// hand: kLanes sums in all. `ahead` fetches as much of what is stored as T meanwhile.
template <class T, class K, int kRows>
HWY_NOINLINE bool score_row_by_row(const K* const* rows, std::int64_t keys, const float* HWY_RESTRICT q,
                                   std::int64_t dim, LineFetcher ahead, float* HWY_RESTRICT scores) {
  const FloatTag f;
  constexpr int kKeys = kLanes / kRows, kVectors = Unpack<K>::kVectors;
  constexpr std::int64_t kChunk = kVectors * kLanes;
  NanWatch<K> watch;
  for (std::int64_t key = 0; key < keys; key += kKeys) {
    Floats sums[kLanes];
    HWY_UNROLL(16)
    for (int i = 0; i < kLanes; ++i) sums[i] = hn::Zero(f);
    for (std::int64_t d = 0; d < dim; d += kChunk) {
      HWY_UNROLL(8)
      for (int n = 0; n < kKeys; ++n) {
        Floats kv[kVectors];
        Unpack<K>::load(rows[key + n] + d, kv);
        watch.see(rows[key + n] + d);
        ahead.keep_pace<kChunk * sizeof(T)>(n);
        HWY_UNROLL(4)
        for (int j = 0; j < kVectors; ++j) {
          HWY_UNROLL(4)
          for (int r = 0; r < kRows; ++r) {
            sums[n * kRows + r] = hn::MulAdd(kv[j], hn::Load(f, q + r * dim + d + j * kLanes), sums[n * kRows + r]);
          }
        }
      }
    }
    add_partials<kLanes, kLanes>(sums);
    hn::Store(sums[0], f, scores + key * kRows);
  }
  return !watch.found();
}

// E floats at p in every group of E lanes.
template <int kPartials>
HWY_INLINE Floats broadcast(const float* p) {
  const FloatTag f;
  if constexpr (kPartials == 1) {
    return hn::Set(f, *p);
  } else if constexpr (kPartials == 2) {
    const hn::Repartition<std::uint64_t, FloatTag> pairs;
    std::uint64_t pair;
    std::memcpy(&pair, p, sizeof(pair));
    return hn::BitCast(f, hn::Set(pairs, pair));
  } else {
    static_assert(kPartials == 4);
    return hn::LoadDup128(f, p);
  }
}

// scores[key][row] for kConvertedKeys converted keys. `ahead` fetches as much as their storage meanwhile.
template <class T, int kRows>
HWY_NOINLINE void score_rows(const float* HWY_RESTRICT keys, const float* HWY_RESTRICT q, std::int64_t dim,
                             LineFetcher ahead, float* HWY_RESTRICT scores) {
  const FloatTag f;
  constexpr int kPartials = kLanes / kRows;
  constexpr int kStepBytes = kAccumulators * kPartials * sizeof(T);
  for (std::int64_t key = 0; key < kConvertedKeys; key += kAccumulators) {
    const float* HWY_RESTRICT at = keys + key * kConvertedStride;
    Floats sums[kAccumulators];
    HWY_UNROLL(16)
    for (int i = 0; i < kAccumulators; ++i) sums[i] = hn::Zero(f);
    for (std::int64_t s = 0; s < dim; s += kPartials) {
      const Floats qv = hn::Load(f, q + s * kRows);
      ahead.keep_pace<kStepBytes>(s / kPartials);
      HWY_UNROLL(16)
      for (int i = 0; i < kAccumulators; ++i) {
        sums[i] = hn::MulAdd(broadcast<kPartials>(at + i * kConvertedStride + s), qv, sums[i]);
      }
    }
    add_partials<kAccumulators, kPartials>(sums);
    HWY_UNROLL(16)
    for (int i = 0; i < kAccumulators / kPartials; ++i) hn::Store(sums[i], f, scores + key * kRows + i * kLanes);
  }
}

// The listed rows in storage order of Unpack, converted one behind the other.
template <class T>
HWY_NOINLINE bool convert_block(const T* const* rows, const std::int32_t* keys, std::int64_t count, std::int64_t dim,
                                float* dst) {
  const FloatTag f;
  constexpr int kVectors = Unpack<T>::kVectors;
  NanWatch<T> watch;
  for (std::int64_t n = 0; n < count; ++n) {
    const T* HWY_RESTRICT row = rows[keys[n]];
    float* HWY_RESTRICT to = dst + n * kConvertedStride;
    for (std::int64_t d = 0; d < dim; d += kVectors * kLanes) {
      Floats v[kVectors];
      Unpack<T>::load(row + d, v);
      watch.see(row + d);
      HWY_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) hn::Store(v[j], f, to + d + j * kLanes);
    }
  }
  return !watch.found();
}

// out[row][s] += Σ_key weights[key][row]·v[key][s] for kWidth vectors from position s on. Keys are those listed.
// `ahead` fetches as much of what is stored as T meanwhile.
template <class T, class V, int kRows, int kWidth>
HWY_INLINE bool add_value_columns(const V* const* rows, const std::int32_t* keys, std::int64_t count,
                                  const float* HWY_RESTRICT weights, std::int64_t s, float* HWY_RESTRICT out,
                                  std::int64_t stride, LineFetcher& fetcher) {
  const FloatTag f;
  constexpr int kVectors = Unpack<V>::kVectors;
  constexpr int kStepBytes = kWidth * kLanes * sizeof(T);
  LineFetcher ahead = fetcher;
  NanWatch<V> watch;
  Floats sums[kRows * kWidth];
  HWY_UNROLL(16)
  for (int i = 0; i < kRows * kWidth; ++i) sums[i] = hn::Load(f, out + (i / kWidth) * stride + s + i % kWidth * kLanes);
  for (std::int64_t n = 0; n < count; ++n) {
    const std::int32_t key = keys[n];
    Floats v[kWidth];
    ahead.keep_pace<kStepBytes>(n);
    HWY_UNROLL(8)
    for (int j = 0; j < kWidth; j += kVectors) {
      Unpack<V>::load(rows[key] + s + j * kLanes, v + j);
      watch.see(rows[key] + s + j * kLanes);
    }
    HWY_UNROLL(16)
    for (int r = 0; r < kRows; ++r) {
      const Floats p = hn::Set(f, weights[key * kRows + r]);
      HWY_UNROLL(8)
      for (int j = 0; j < kWidth; ++j) sums[r * kWidth + j] = hn::MulAdd(p, v[j], sums[r * kWidth + j]);
    }
  }
  fetcher = ahead;
  HWY_UNROLL(16)
  for (int i = 0; i < kRows * kWidth; ++i) {
    hn::Store(sums[i], f, out + (i / kWidth) * stride + s + i % kWidth * kLanes);
  }
  return !watch.found();
}

// Vectors of a pass over the values: as many as the accumulators hold for this many rows, at most 8.
template <int kRows>
inline constexpr int kValueWidth = kAccumulators / kRows > 8 ? 8 : kAccumulators / kRows;

// Whether the second product can read T as it is stored.
template <class T, int kRows>
inline constexpr bool kReadsStorage = Unpack<T>::kFast&& Unpack<T>::kVectors <= kValueWidth<kRows>;

template <class T, class V, int kRows, int kWidth = kValueWidth<kRows>>
HWY_NOINLINE bool add_values_of(const V* const* rows, const std::int32_t* keys, std::int64_t count,
                                const float* weights, std::int64_t dim, float* out, std::int64_t stride,
                                LineFetcher& ahead, std::int64_t first = 0) {
  bool good = true;
  for (; first + kWidth * kLanes <= dim; first += kWidth * kLanes) {
    good &= add_value_columns<T, V, kRows, kWidth>(rows, keys, count, weights, first, out, stride, ahead);
  }
  if constexpr (kWidth / 2 >= Unpack<V>::kVectors) {
    if (first < dim) {
      good &= add_values_of<T, V, kRows, kWidth / 2>(rows, keys, count, weights, dim, out, stride, ahead, first);
    }
  }
  return good;
}

#endif  // !HWY_HAVE_SCALABLE
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
