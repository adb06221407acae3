// cpu/decode_pairs-inl.h: both products of few bfloat16 query rows with a bfloat16, float8 or int8 cache in pairs,
// where the processor multiplies those (AVX-512 BF16: 32 products an instruction, float32 sums). Products of stored
// elements and queries are exact: float8 is looked up as bfloat16, its NaN and subnormals too; keys of int8 meet
// queries in 16-bit fixed point, more than bfloat16 holds. Weights are rounded to bfloat16, as the output is. Nothing
// becomes a float32 on the way, which takes as long as the products do.
#if defined(ONEPASS_CPU_DECODE_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_PAIRS_INL_H_
#undef ONEPASS_CPU_DECODE_PAIRS_INL_H_
#else
#define ONEPASS_CPU_DECODE_PAIRS_INL_H_
#endif

#include <array>

#include "cpu/arena.h"
#include "cpu/decode_pair_codes-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

struct PairState {
  static constexpr std::int64_t kKeyStride = 512 + kPairUnit;  // odd in cache lines

  std::uint16_t* q;      // [8 channels][tile of 4 rows][row][8 channels]; one row: [channel]
  std::uint16_t* keys;   // float8 only: [key][kKeyStride]
  std::uint32_t* words;  // [pair of keys][row]: their weights
  float* q_unit;         // int8 only: [tile of 4 rows][key of 4][row]

  void take(Arena& arena, std::int64_t dim) {
    q = arena.take<std::uint16_t>(dim * kLanes);
    keys = arena.take<std::uint16_t>(kConvertedKeys * kKeyStride);
    words = arena.take<std::uint32_t>(kDecodeKeys / 2 * kLanes);
    q_unit = arena.take<float>(4 * kLanes);
  }
};

#if HWY_TARGET == HWY_AVX3

// `T` stored element, `kRows` rows of the tile.
template <class T, int kRows>
class PairProducts {
  static constexpr int kStep = 8;                         // channels of a key in the first product: broadcast to 4 rows
  static constexpr int kTiles = (kRows + 3) / 4;          // of 4 rows
  static constexpr int kRowPart = kRows < 8 ? kRows : 8;  // rows of a pass of the second product
  static constexpr int kUnits = kRows == 1 ? 4 : kRows == 4 ? 2 : 1;  // of a pass of the second product
  static constexpr bool kIntegers = std::is_same_v<T, std::int8_t>;
  using Key = std::conditional_t<kIntegers, T, std::uint16_t>;
  using Sum = PairSum<T>;  // of the first product

 public:
  PairProducts(const PairState& state, std::int64_t dim, std::int64_t dim_v) : s_(state), dim_(dim), dim_v_(dim_v) {}

  static bool takes(std::int64_t dim, std::int64_t dim_v) {
    constexpr std::int64_t kChunk = 64 / sizeof(T);
    return dim % kChunk == 0 && dim_v % kChunk == 0;
  }

  // Row r of the queries. False when it is not exactly bfloat16, or has no fixed-point form.
  bool pack_query(std::int64_t r, const float* query) {
    const FloatTag f;
    const WordTag w;
    Floats inverse = hn::Zero(f);
    if constexpr (kIntegers) {
      const float largest = largest_of_query(query, dim_);
      if (largest == 0.0f) return false;
      inverse = hn::Set(f, kOne / largest);
      for (std::int64_t key = 0; key < 4; ++key) s_.q_unit[r / 4 * kLanes + key * 4 + r % 4] = largest / kOne;
    }
    auto lost = hn::Zero(w);
    for (std::int64_t d = 0; d < dim_; d += kLanes) {
      const Floats from = hn::LoadU(f, query + d);
      hn::Vec<WordTag> words;
      if constexpr (kIntegers) {
        words = hn::BitCast(w, hn::NearestInt(hn::Mul(from, inverse)));
      } else {
        const auto bits = hn::BitCast(w, from);
        lost = hn::Or(lost, hn::And(bits, hn::Set(w, 0xFFFFu)));
        words = hn::ShiftRight<16>(bits);
      }
      HWY_ALIGN std::uint16_t halves[kLanes];
      const hn::Rebind<std::uint16_t, WordTag> half;
      hn::Store(hn::TruncateTo(half, words), half, halves);
      for (std::int64_t i = 0; i < kLanes; i += kStep) {
        std::copy_n(halves + i, kStep, s_.q + (kRows == 1 ? d + i : ((d + i) / kStep * kRows + r) * kStep));
      }
    }
    return hn::AllTrue(w, hn::Eq(lost, hn::Zero(w)));
  }

  // scores[key][row] for kConvertedKeys keys. int8: times factors[key].
  void score(const T* const* rows, const float* factors, LineFetcher ahead, float* HWY_RESTRICT scores) const {
    const Key* keys[kConvertedKeys];
    if constexpr (kFloat8<T>) {
      widen_keys(rows);
      for (std::int64_t i = 0; i < kConvertedKeys; ++i) keys[i] = s_.keys + i * PairState::kKeyStride;
    } else {
      for (std::int64_t i = 0; i < kConvertedKeys; ++i) keys[i] = reinterpret_cast<const Key*>(rows[i]);
    }
    if constexpr (kRows == 1) {
      score_one(keys, ahead, scores);
    } else {
      for (std::int64_t i = 0; i < kConvertedKeys; i += kScoreKeys)
        score_some(keys, i, factors, ahead, scores + i * kRows);
    }
  }

  // out[row][position] += Σ_key weight·v[key] for a block's keys, `at_once` of them before the next are read. Weights
  // are yet to be multiplied by factors[key], where these are given.
  void add_values(const T* const* rows, const float* weights, const float* factors, std::int64_t at_once,
                  float* HWY_RESTRICT out, LineFetcher ahead) const {
    if (factors != nullptr) {
      write_words<true>(weights, factors);
    } else {
      write_words<false>(weights, nullptr);
    }
    constexpr std::int64_t kPass = kUnits * kPairUnit;
    for (std::int64_t key = 0; key < kDecodeKeys; key += at_once) {
      const KeyRange keys{key, std::min(key + at_once, kDecodeKeys)};
      std::int64_t position = 0;
      for (; position + kPass <= dim_v_; position += kPass) add_rows<kUnits>(rows, keys, position, out, ahead);
      for (; position < dim_v_; position += kPairUnit) add_rows<1>(rows, keys, position, out, ahead);
    }
  }

 private:
  // The largest query: sums of 512 products with up to 128 fit 32 bits.
  static constexpr float kOne = 32767.0f;

  // 16 accumulators: the instruction takes six clocks and starts twice in one.
  static constexpr int kScoreKeys = kRows == 16 ? 4 : 8, kChains = 16 / (kScoreKeys * kTiles);

  // In channel order.
  HWY_NOINLINE void widen_keys(const T* const* rows) const {
    const ByteVector bytes;
    const PairVector pairs;
    const WidenCodes<T> widen;
    // Eight bytes at a time, so that widening leaves 32 channels in their order.
    HWY_ALIGN static constexpr std::uint64_t kSpread[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    const __m512i spread = _mm512_load_si512(kSpread);
    for (std::int64_t i = 0; i < kConvertedKeys; ++i) {
      const auto* HWY_RESTRICT row = reinterpret_cast<const std::uint8_t*>(rows[i]);
      std::uint16_t* HWY_RESTRICT to = s_.keys + i * PairState::kKeyStride;
      for (std::int64_t d = 0; d < dim_; d += 64) {
        const Bytes codes{_mm512_permutexvar_epi64(spread, hn::LoadU(bytes, row + d).raw)};
        Pairs v[2];
        widen(codes, v);
        hn::Store(v[0], pairs, to + d);
        hn::Store(v[1], pairs, to + d + 32);
      }
    }
  }

  // Key after key, so that rows are read as they lie.
  template <int kVectors>
  HWY_INLINE void add_channels(const Key* const* keys, std::int64_t d, LineFetcher& ahead,
                               Floats* HWY_RESTRICT sums) const {
    const PairVector pairs;
    Pairs q[kVectors];
    HWY_UNROLL(4)
    for (int j = 0; j < kVectors; ++j) q[j] = hn::Load(pairs, s_.q + d + j * kPairUnit);
    for (int i = 0; i < kConvertedKeys; i += kOneRowKeys) {
      HWY_UNROLL(4)
      for (int n = i; n < i + kOneRowKeys; ++n) {
        ahead.keep_pace<kVectors * kPairUnit * sizeof(T)>(n);
        HWY_UNROLL(4)
        for (int j = 0; j < kVectors; ++j) add_pair_dot(load_pairs(keys[n] + d + j * kPairUnit), q[j], sums[n]);
      }
    }
  }
  HWY_NOINLINE void score_one(const Key* const* keys, LineFetcher ahead, float* HWY_RESTRICT scores) const {
    const FloatTag f;
    Floats sums[kConvertedKeys];
    HWY_UNROLL(16)
    for (int i = 0; i < kConvertedKeys; ++i) sums[i] = hn::Zero(f);
    std::int64_t d = 0;
    for (; d + 4 * kPairUnit <= dim_; d += 4 * kPairUnit) add_channels<4>(keys, d, ahead, sums);
    for (; d < dim_; d += kPairUnit) add_channels<1>(keys, d, ahead, sums);
    add_partials<kConvertedKeys, kLanes>(sums);
    hn::Store(sums[0], f, scores);
  }

  // sums[chain][tile][key]: eight channels of a key are loaded once for all tiles of rows.
  HWY_NOINLINE void score_some(const Key* const* keys, std::int64_t key, const float* factors, LineFetcher& fetcher,
                               float* HWY_RESTRICT scores) const {
    const PairVector pairs;
    LineFetcher ahead = fetcher;
    const Key* at[kScoreKeys];
    HWY_UNROLL(8)
    for (int i = 0; i < kScoreKeys; ++i) at[i] = keys[key + i];
    Sum sums[kChains * kTiles * kScoreKeys];
    HWY_UNROLL(16)
    for (int i = 0; i < kChains * kTiles * kScoreKeys; ++i) sums[i] = hn::Zero(hn::DFromV<Sum>());
    for (std::int64_t d = 0; d < dim_; d += kChains * kStep) {
      ahead.keep_pace<kScoreKeys * kChains * kStep * sizeof(T)>(d / (kChains * kStep));
      HWY_UNROLL(2)
      for (int chain = 0; chain < kChains; ++chain) {
        const std::int64_t step = d + chain * kStep;
        Pairs q[kTiles];
        HWY_UNROLL(4)
        for (int t = 0; t < kTiles; ++t) q[t] = hn::Load(pairs, s_.q + step * kRows + t * 4 * kStep);
        HWY_UNROLL(8)
        for (int i = 0; i < kScoreKeys; ++i) {
          const Pairs k = broadcast_pairs(at[i] + step);
          HWY_UNROLL(4)
          for (int t = 0; t < kTiles; ++t) add_pair_dot(k, q[t], sums[(chain * kTiles + t) * kScoreKeys + i]);
        }
      }
    }
    fetcher = ahead;
    if constexpr (kChains == 2) {
      HWY_UNROLL(8)
      for (int i = 0; i < kTiles * kScoreKeys; ++i) sums[i] = hn::Add(sums[i], sums[kTiles * kScoreKeys + i]);
    }
    add_partials<kTiles * kScoreKeys, 4>(sums);
    constexpr int kOfTile = kScoreKeys / 4;
    Floats joined[kTiles * kOfTile];
    HWY_UNROLL(4)
    for (int i = 0; i < kTiles * kOfTile; ++i) {
      joined[i] = to_floats(sums[i]);
      if constexpr (kIntegers) {
        const Floats unit = hn::Load(FloatTag(), s_.q_unit + i / kOfTile * kLanes);
        joined[i] = hn::Mul(joined[i], hn::Mul(unit, factors_of<4>(factors, key + i % kOfTile * 4)));
      }
    }
    store_scores(joined, scores);
  }

  // Those of kLanes / kCount keys from `key` on, each in kCount lanes. Loads are aligned as the stores were, just
  // before: across two of these they would wait.
  template <int kCount>
  static HWY_INLINE Floats factors_of(const float* factors, std::int64_t key) {
    HWY_ALIGN static constexpr auto kKeys = [] {
      std::array<std::int32_t, kLanes> keys{};
      for (int lane = 0; lane < kLanes; ++lane) keys[lane] = lane / kCount;
      return keys;
    }();
    const Ints keys = hn::Add(hn::Load(IntTag(), kKeys.data()), hn::Set(IntTag(), static_cast<int>(key % kLanes)));
    return Floats{_mm512_permutexvar_ps(keys.raw, hn::Load(FloatTag(), factors + key / kLanes * kLanes).raw)};
  }

  // Vectors of 4 keys × 4 rows, tile after tile → [key][row].
  HWY_INLINE void store_scores(const Floats* v, float* HWY_RESTRICT scores) const {
    const FloatTag f;
    if constexpr (kTiles == 1) {
      HWY_UNROLL(2)
      for (int i = 0; i < kScoreKeys / 4; ++i) hn::Store(v[i], f, scores + i * kLanes);
    } else if constexpr (kTiles == 2) {
      HWY_UNROLL(2)
      for (int i = 0; i < kScoreKeys / 4; ++i) {
        const __m512d a = _mm512_castps_pd(v[i].raw), b = _mm512_castps_pd(v[kScoreKeys / 4 + i].raw);
        const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        _mm512_store_pd(scores + 2 * i * kLanes, _mm512_permutex2var_pd(a, low, b));
        _mm512_store_pd(scores + (2 * i + 1) * kLanes, _mm512_permutex2var_pd(a, high, b));
      }
    } else {
      const __m512 ab_low = _mm512_shuffle_f32x4(v[0].raw, v[1].raw, 0x44),
                   ab_high = _mm512_shuffle_f32x4(v[0].raw, v[1].raw, 0xEE);
      const __m512 cd_low = _mm512_shuffle_f32x4(v[2].raw, v[3].raw, 0x44),
                   cd_high = _mm512_shuffle_f32x4(v[2].raw, v[3].raw, 0xEE);
      _mm512_store_ps(scores, _mm512_shuffle_f32x4(ab_low, cd_low, 0x88));
      _mm512_store_ps(scores + kLanes, _mm512_shuffle_f32x4(ab_low, cd_low, 0xDD));
      _mm512_store_ps(scores + 2 * kLanes, _mm512_shuffle_f32x4(ab_high, cd_high, 0x88));
      _mm512_store_ps(scores + 3 * kLanes, _mm512_shuffle_f32x4(ab_high, cd_high, 0xDD));
    }
  }

  // A pair is two keys behind each other.
  template <bool kScaled>
  HWY_NOINLINE void write_words(const float* HWY_RESTRICT weights, const float* HWY_RESTRICT factors) const {
    const FloatTag f;
    HWY_ALIGN std::uint16_t from[32];
    for (int i = 0; i < 32; ++i) {
      const int word = i / 2, first = word / kRows * 2 * kRows + word % kRows;
      from[i] = static_cast<std::uint16_t>(first + i % 2 * kRows);
    }
    const __m512i turns = _mm512_load_si512(from);
    for (std::int64_t i = 0; i < kDecodeKeys * kRows; i += 2 * kLanes) {
      Floats low = hn::Load(f, weights + i), high = hn::Load(f, weights + i + kLanes);
      if constexpr (kScaled) {
        low = hn::Mul(low, factors_of<kRows>(factors, i / kRows));
        high = hn::Mul(high, factors_of<kRows>(factors, (i + kLanes) / kRows));
      }
      const Pairs words{_mm512_permutexvar_epi16(turns, round_to_pairs(high, low).raw)};
      hn::Store(hn::BitCast(WordTag(), words), WordTag(), s_.words + i / 2);
    }
  }

  template <int kCount>
  HWY_INLINE void add_rows(const T* const* rows, KeyRange keys, std::int64_t position, float* HWY_RESTRICT out,
                           LineFetcher& ahead) const {
    for (std::int64_t row = 0; row < kRows; row += kRowPart) {
      if (kCodes<T> && position % 64 != 0) {
        add_some<kCount, 32>(rows, keys, position - 32, row, out, ahead);
      } else {
        add_some<kCount, 0>(rows, keys, position, row, out, ahead);
      }
    }
  }

  // kRowPart rows × kCount units from `position` + kOffset on.
  template <int kCount, int kOffset>
  HWY_NOINLINE void add_some(const T* const* rows, KeyRange keys, std::int64_t position, std::int64_t row,
                             float* HWY_RESTRICT out, LineFetcher& fetcher) const {
    const FloatTag f;
    constexpr int kVectors = 2 * kCount;
    constexpr int kStepBytes = static_cast<int>(2 * kCount * kPairUnit * sizeof(T)) * kRowPart / kRows;
    const WidenCodes<T> widen;
    LineFetcher ahead = fetcher;
    Floats sums[kRowPart * kVectors];
    HWY_UNROLL(16)
    for (int i = 0; i < kRowPart * kVectors; ++i) {
      sums[i] = hn::Load(f, out + (row + i / kVectors) * dim_v_ + position + kOffset + i % kVectors * kLanes);
    }
    for (std::int64_t pair = keys.begin / 2; pair < keys.end / 2; ++pair) {
      const T *const a = rows[2 * pair] + position, *const b = rows[2 * pair + 1] + position;
      Pairs v[kVectors];
      widen.template pair_rows<kOffset>(a, b, v);
      if constexpr (kCount > 1) widen.template pair_rows<32>(a, b, v + 2);
      if constexpr (kCount > 2) widen.template pair_rows<64>(a, b, v + 4);
      if constexpr (kCount > 2) widen.template pair_rows<96>(a, b, v + 6);
      ahead.keep_pace<kStepBytes>(pair);
      HWY_UNROLL(8)
      for (int r = 0; r < kRowPart; ++r) {
        const auto p = hn::BitCast(PairVector(), hn::Set(WordTag(), s_.words[pair * kRows + row + r]));
        HWY_UNROLL(8)
        for (int j = 0; j < kVectors; ++j) add_pair_dot(p, v[j], sums[r * kVectors + j]);
      }
    }
    fetcher = ahead;
    HWY_UNROLL(16)
    for (int i = 0; i < kRowPart * kVectors; ++i) {
      hn::Store(sums[i], f, out + (row + i / kVectors) * dim_v_ + position + kOffset + i % kVectors * kLanes);
    }
  }

  const PairState& s_;
  std::int64_t dim_, dim_v_;
};

#else
template <class T, int kRows>
class PairProducts;
#endif

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
