// cpu/decode_pairs-inl.h: both products of few bfloat16 query rows with a bfloat16 or float8 cache in pairs, where the
// processor multiplies those (AVX-512 BF16: 32 products an instruction, float32 sums). Products of stored elements and
// queries are exact: float8 is looked up as bfloat16, its NaN and subnormals too. Weights are rounded to bfloat16, as
// the output is. Nothing becomes a float32 on the way, which takes as long as the products do.
#if defined(ONEPASS_CPU_DECODE_PAIRS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_PAIRS_INL_H_
#undef ONEPASS_CPU_DECODE_PAIRS_INL_H_
#else
#define ONEPASS_CPU_DECODE_PAIRS_INL_H_
#endif

#include <bit>

#include "cpu/arena.h"
#include "cpu/decode-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

// In the tier; processors with AVX-512 may still lack it, or have it at half the FMA's product rate (Sapphire Rapids,
// measured: no gain over floats). Zen 5 has twice the FMA's.
inline constexpr bool kHasPairDot = HWY_TARGET == HWY_AVX3;
inline bool has_pair_dot() {
  if constexpr (!kHasPairDot) return false;
  static const bool present =
      __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  return present;
}

// Storage that multiplies as pairs.
template <class T>
inline constexpr bool kPairStorage =
    std::is_same_v<T, BFloat16> || std::is_same_v<T, Float8E4M3> || std::is_same_v<T, Float8E5M2>;

inline constexpr std::int64_t kPairUnit = 32;  // channels that two vectors of pairs of keys hold

// Position s of the output as the second product leaves it: interleaving takes the four quarters of a register apart.
template <class T>
std::int64_t pair_channel(std::int64_t s) {
  const std::int64_t unit = s / kPairUnit, vector = s % kPairUnit / 16, quarter = s % 16 / 4, i = s % 4;
  if constexpr (sizeof(T) == 2) return unit * kPairUnit + 8 * quarter + 4 * vector + i;
  return unit / 2 * 64 + 16 * quarter + unit % 2 * 8 + 4 * vector + i;
}

struct PairState {
  static constexpr std::int64_t kKeyStride = 512 + kPairUnit;  // odd in cache lines

  std::uint16_t* q;      // [8 channels][tile of 4 rows][row][8 channels]; one row: [channel]
  std::uint16_t* keys;   // float8 only: [key][kKeyStride]
  std::uint32_t* words;  // [pair of keys][row]: their weights

  void take(Arena& arena, std::int64_t dim) {
    q = arena.take<std::uint16_t>(dim * kLanes);
    keys = arena.take<std::uint16_t>(kConvertedKeys * kKeyStride);
    words = arena.take<std::uint32_t>(kDecodeKeys / 2 * kLanes);
  }
};

#if HWY_TARGET == HWY_AVX3

using PairVector = hn::Repartition<std::uint16_t, FloatTag>;
using Bytes = hn::Vec<ByteVector>;
using Pairs = hn::Vec<PairVector>;

// sum += a pair's two products a lane. Inline assembly, so that the tier's other code may not use the extension.
HWY_INLINE void add_pair_dot(Pairs a, Pairs b, Floats& sum) {
  const __m512i first = a.raw, second = b.raw;
  __m512 total = sum.raw;
  asm("vdpbf16ps %[b], %[a], %[sum]" : [sum] "+v"(total) : [a] "v"(first), [b] "v"(second));
  sum.raw = total;
}

// 32 floats rounded to bfloat16: those of `low`, then those of `high`.
HWY_INLINE Pairs round_to_pairs(Floats high, Floats low) {
  Pairs pairs;
  asm("vcvtne2ps2bf16 %[low], %[high], %[pairs]" : [pairs] "=v"(pairs.raw) : [low] "v"(low.raw), [high] "v"(high.raw));
  return pairs;
}

// table[code & 127] of 128 bytes.
HWY_INLINE Bytes look_up(Bytes codes, Bytes first_half, Bytes second_half) {
  asm("vpermi2b %[second], %[first], %[codes]"
      : [codes] "+v"(codes.raw)
      : [first] "v"(first_half.raw), [second] "v"(second_half.raw));
  return codes;
}

// The bfloat16 of every float8 code without its sign, low bytes and high bytes apart.
struct CodeBytes {
  alignas(64) std::uint8_t low[128], high[128];
};
template <class T>
const CodeBytes& code_bytes() {
  static const CodeBytes all = [] {
    CodeBytes bytes;
    for (int code = 0; code < 128; ++code) {
      const auto bits = std::bit_cast<std::uint32_t>(to_float(T{static_cast<std::uint8_t>(code)}));
      bytes.low[code] = static_cast<std::uint8_t>(bits >> 16);
      bytes.high[code] = static_cast<std::uint8_t>(bits >> 24);
    }
    return bytes;
  }();
  return all;
}

// Two vectors of pairs of one register of codes, or of two registers of bfloat16.
template <class T>
struct WidenCodes {
  Bytes low[2], high[2];

  WidenCodes() {
    const ByteVector bytes;
    const CodeBytes& all = code_bytes<T>();
    for (int i = 0; i < 2; ++i) low[i] = hn::Load(bytes, all.low + 64 * i);
    for (int i = 0; i < 2; ++i) high[i] = hn::Load(bytes, all.high + 64 * i);
  }

  // The lower eight codes of every 16 as bfloat16 in v[0], the upper ones in v[1].
  HWY_INLINE void operator()(Bytes codes, Pairs* v) const {
    const ByteVector bytes;
    const Bytes l = look_up(codes, low[0], low[1]);
    const Bytes h = hn::OrAnd(look_up(codes, high[0], high[1]), codes, hn::Set(bytes, std::uint8_t{0x80}));
    v[0] = hn::BitCast(PairVector(), hn::InterleaveLower(bytes, l, h));
    v[1] = hn::BitCast(PairVector(), hn::InterleaveUpper(bytes, l, h));
  }

  // Positions [kOffset, kOffset + 32) of two rows, each position's two elements side by side.
  template <int kOffset>
  HWY_INLINE void pair_rows(const T* a, const T* b, Pairs* v) const {
    const ByteVector bytes;
    const auto first = hn::LoadU(bytes, reinterpret_cast<const std::uint8_t*>(a + kOffset / 64 * 64));
    const auto second = hn::LoadU(bytes, reinterpret_cast<const std::uint8_t*>(b + kOffset / 64 * 64));
    (*this)(kOffset % 64 == 0 ? hn::InterleaveLower(bytes, first, second) : hn::InterleaveUpper(bytes, first, second),
            v);
  }
};
template <>
struct WidenCodes<BFloat16> {
  template <int kOffset>
  HWY_INLINE void pair_rows(const BFloat16* a, const BFloat16* b, Pairs* v) const {
    const PairVector pairs;
    const auto first = hn::LoadU(pairs, reinterpret_cast<const std::uint16_t*>(a + kOffset));
    const auto second = hn::LoadU(pairs, reinterpret_cast<const std::uint16_t*>(b + kOffset));
    v[0] = hn::InterleaveLower(pairs, first, second);
    v[1] = hn::InterleaveUpper(pairs, first, second);
  }
};

// `T` stored element, `kRows` rows of the tile.
template <class T, int kRows>
class PairProducts {
  static constexpr int kStep = 8;                         // channels of a key in the first product: broadcast to 4 rows
  static constexpr int kTiles = (kRows + 3) / 4;          // of 4 rows
  static constexpr int kRowPart = kRows < 8 ? kRows : 8;  // rows of a pass of the second product
  static constexpr int kUnits = kRows == 1 ? 4 : kRows == 4 ? 2 : 1;  // of a pass of the second product
  static constexpr bool kCodes = sizeof(T) == 1;

 public:
  PairProducts(const PairState& state, std::int64_t dim, std::int64_t dim_v) : s_(state), dim_(dim), dim_v_(dim_v) {}

  static bool takes(std::int64_t dim, std::int64_t dim_v) {
    constexpr std::int64_t kChunk = 64 / sizeof(T);
    return dim % kChunk == 0 && dim_v % kChunk == 0;
  }

  // Row r of the queries. False when it is not exactly bfloat16.
  bool pack_query(std::int64_t r, const float* query) {
    for (std::int64_t d = 0; d < dim_; ++d) {
      std::uint32_t bits;
      std::memcpy(&bits, query + d, sizeof(bits));
      if ((bits & 0xFFFFu) != 0) return false;
      const std::int64_t at = kRows == 1 ? d : (d / kStep * kRows + r) * kStep + d % kStep;
      s_.q[at] = static_cast<std::uint16_t>(bits >> 16);
    }
    return true;
  }

  // scores[key][row] for kConvertedKeys keys.
  void score(const T* const* rows, LineFetcher ahead, float* HWY_RESTRICT scores) const {
    const std::uint16_t* keys[kConvertedKeys];
    if constexpr (kCodes) {
      widen_keys(rows);
      for (std::int64_t i = 0; i < kConvertedKeys; ++i) keys[i] = s_.keys + i * PairState::kKeyStride;
    } else {
      for (std::int64_t i = 0; i < kConvertedKeys; ++i) keys[i] = reinterpret_cast<const std::uint16_t*>(rows[i]);
    }
    if constexpr (kRows == 1) {
      score_one(keys, ahead, scores);
    } else {
      for (std::int64_t i = 0; i < kConvertedKeys; i += kScoreKeys) score_some(keys + i, ahead, scores + i * kRows);
    }
  }

  // out[row][position] += Σ_key weight·v[key] for a block's keys, `at_once` of them before the next are read.
  void add_values(const T* const* rows, const float* weights, std::int64_t at_once, float* HWY_RESTRICT out,
                  LineFetcher ahead) const {
    write_words(weights);
    constexpr std::int64_t kPass = kUnits * kPairUnit;
    for (std::int64_t key = 0; key < kDecodeKeys; key += at_once) {
      const KeyRange keys{key, std::min(key + at_once, kDecodeKeys)};
      std::int64_t position = 0;
      for (; position + kPass <= dim_v_; position += kPass) add_rows<kUnits>(rows, keys, position, out, ahead);
      for (; position < dim_v_; position += kPairUnit) add_rows<1>(rows, keys, position, out, ahead);
    }
  }

 private:
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
  HWY_INLINE void add_channels(const std::uint16_t* const* keys, std::int64_t d, LineFetcher& ahead,
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
        for (int j = 0; j < kVectors; ++j) add_pair_dot(hn::LoadU(pairs, keys[n] + d + j * kPairUnit), q[j], sums[n]);
      }
    }
  }
  HWY_NOINLINE void score_one(const std::uint16_t* const* keys, LineFetcher ahead, float* HWY_RESTRICT scores) const {
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
  HWY_NOINLINE void score_some(const std::uint16_t* const* keys, LineFetcher& fetcher,
                               float* HWY_RESTRICT scores) const {
    const PairVector pairs;
    LineFetcher ahead = fetcher;
    const std::uint16_t* at[kScoreKeys];
    HWY_UNROLL(8)
    for (int i = 0; i < kScoreKeys; ++i) at[i] = keys[i];
    Floats sums[kChains * kTiles * kScoreKeys];
    HWY_UNROLL(16)
    for (int i = 0; i < kChains * kTiles * kScoreKeys; ++i) sums[i] = hn::Zero(FloatTag());
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
          const Pairs k = hn::LoadDup128(pairs, at[i] + step);
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
    store_scores(sums, scores);
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
  HWY_NOINLINE void write_words(const float* HWY_RESTRICT weights) const {
    const FloatTag f;
    HWY_ALIGN std::uint16_t from[32];
    for (int i = 0; i < 32; ++i) {
      const int word = i / 2, first = word / kRows * 2 * kRows + word % kRows;
      from[i] = static_cast<std::uint16_t>(first + i % 2 * kRows);
    }
    const __m512i turns = _mm512_load_si512(from);
    for (std::int64_t i = 0; i < kDecodeKeys * kRows; i += 2 * kLanes) {
      const Pairs halves = round_to_pairs(hn::Load(f, weights + i + kLanes), hn::Load(f, weights + i));
      const Pairs words{_mm512_permutexvar_epi16(turns, halves.raw)};
      hn::Store(hn::BitCast(WordTag(), words), WordTag(), s_.words + i / 2);
    }
  }

  template <int kCount>
  HWY_INLINE void add_rows(const T* const* rows, KeyRange keys, std::int64_t position, float* HWY_RESTRICT out,
                           LineFetcher& ahead) const {
    for (std::int64_t row = 0; row < kRows; row += kRowPart) {
      if (kCodes && position % 64 != 0) {
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
