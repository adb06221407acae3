// cpu/decode_words-inl.h: both products of few bfloat16 query rows with an int8 cache in 16-bit integers, where vectors
// have 256 bits (AVX2: vpmaddwd, 16 products an instruction, as many of them in a clock as of FMAs with 8). Stored
// bytes are widened by the instruction that loads them, the values of two keys then interleaved. Queries, and the
// weights of a block, become 16-bit fixed point, more than bfloat16 holds; sums are exact.
#if defined(ONEPASS_CPU_DECODE_WORDS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_WORDS_INL_H_
#undef ONEPASS_CPU_DECODE_WORDS_INL_H_
#else
#define ONEPASS_CPU_DECODE_WORDS_INL_H_
#endif

#include <array>

#include "cpu/arena.h"
#include "cpu/decode-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

inline constexpr bool kHasWordDot = HWY_TARGET == HWY_AVX2;

inline constexpr std::int64_t kWordUnit = 16;  // channels: a vector of words

// Position s of a unit as the second product leaves it: interleaving takes the halves of a register apart.
inline std::int64_t word_channel(std::int64_t s) { return s % 8 / 4 * 8 + s / 8 * 4 + s % 4; }

struct WordState {
  std::int16_t* q;        // [unit][row][channel]
  float* q_unit;          // [lane]
  float* scaled;          // [key][row]: weights times V's scales
  std::uint32_t* words;   // [pair of keys][row]: weights
  float* weight_inverse;  // [lane]: 1 / unit
  float* weight_unit;     // [row]

  void take(Arena& arena, std::int64_t dim) {
    q = arena.take<std::int16_t>(dim * kLanes);
    q_unit = arena.take<float>(kLanes);
    scaled = arena.take<float>(kDecodeKeys * kLanes);
    words = arena.take<std::uint32_t>(kDecodeKeys / 2 * kLanes);
    weight_inverse = arena.take<float>(kLanes);
    weight_unit = arena.take<float>(kLanes);
  }
};

#if HWY_TARGET == HWY_AVX2

template <int kRows>
class WordProducts {
  static constexpr int kRowPart = kRows < 4 ? kRows : 4;  // rows of a pass
  static constexpr int kScoreKeys = 8 / kRowPart;         // keys of a pass of the first product: 8 sums
  static constexpr int kUnits = kRowPart == 4 ? 1 : 2;    // of a pass of the second one: 4 or 8 sums

  using WordVector = hn::Repartition<std::int16_t, FloatTag>;
  using Words16 = hn::Vec<WordVector>;

 public:
  WordProducts(const WordState& state, std::int64_t dim, std::int64_t dim_v) : s_(state), dim_(dim), dim_v_(dim_v) {}

  static bool takes(std::int64_t dim, std::int64_t dim_v) {
    return dim % kWordUnit == 0 && dim_v % (kUnits * kWordUnit) == 0;
  }

  // Row r of the queries. False when it has no fixed-point form.
  bool pack_query(std::int64_t r, const float* query) {
    const FloatTag f;
    const float largest = largest_of_query(query, dim_);
    if (largest == 0.0f) return false;
    const Floats inverse = hn::Set(f, kOne / largest);
    for (std::int64_t d = 0; d < dim_; d += kLanes) {
      HWY_ALIGN std::int32_t fixed[kLanes];
      hn::Store(hn::NearestInt(hn::Mul(hn::LoadU(f, query + d), inverse)), IntTag(), fixed);
      std::int16_t* const to = s_.q + (d / kWordUnit * kRows + r) * kWordUnit + d % kWordUnit;
      for (std::int64_t i = 0; i < kLanes; ++i) to[i] = static_cast<std::int16_t>(fixed[i]);
    }
    for (std::int64_t lane = r; lane < kLanes; lane += kRows) s_.q_unit[lane] = largest / kOne;
    return true;
  }

  // scores[key][row] for a block of keys, times factors[key], where these are given.
  HWY_NOINLINE void score(const std::int8_t* const* rows, const float* factors, const LineFetcher& fetcher,
                          float* HWY_RESTRICT scores) const {
    LineWalker ahead(fetcher);
    for (std::int64_t key = 0; key < kDecodeKeys; key += kScoreKeys) {
      for (int row = 0; row < kRows; row += kRowPart) score_some(rows, key, row, factors, ahead, scores);
    }
  }

  // The weights of a block in fixed point, multiplied by factors[key] on the way, where these are given: `weights` then
  // becomes where the products are. False when some have no such form.
  bool pack_weights(const float*& weights, const float* factors) {
    if (factors != nullptr) {
      const FloatTag f;
      for (std::int64_t i = 0; i < kDecodeKeys * kRows; i += kLanes) {
        hn::Store(hn::Mul(hn::Load(f, weights + i), factors_of<kRows>(factors, i / kRows)), f, s_.scaled + i);
      }
      weights = s_.scaled;
    }
    if (!fixed_point_units<kRows>(weights, kOne, s_.weight_inverse, s_.weight_unit)) return false;
    write_words(weights);
    return true;
  }

  // out[row][position] += Σ_key weight·v[key] for a block's keys, after pack_weights; `at_once` of them before the next
  // are read.
  void add_values(const std::int8_t* const* rows, std::int64_t at_once, float* HWY_RESTRICT out,
                  const LineFetcher& fetcher) const {
    LineWalker ahead(fetcher);
    for (std::int64_t key = 0; key < kDecodeKeys; key += at_once) {
      const KeyRange pairs{key / 2, std::min(key + at_once, kDecodeKeys) / 2};
      for (std::int64_t position = 0; position < dim_v_; position += kUnits * kWordUnit) {
        for (int row = 0; row < kRows; row += kRowPart) add_some(rows, pairs, position, row, out, ahead);
      }
    }
  }

 private:
  // The largest query and weight: sums of 512 products with up to 128 fit 32 bits.
  static constexpr float kOne = 32767.0f;

  static HWY_INLINE Words16 load_words(const std::int8_t* p) {
    return hn::PromoteTo(WordVector(), hn::LoadU(hn::Rebind<std::int8_t, WordVector>(), p));
  }
  // sum += two products a lane. Inline assembly: left to itself GCC makes all products before it adds any, and has no
  // registers left for sums.
  static HWY_INLINE void add_dot(Words16 a, Words16 b, Ints& sum) {
    const __m256i first = a.raw, second = b.raw;
    __m256i product, total = sum.raw;
    asm("vpmaddwd %[b], %[a], %[product]\n\tvpaddd %[product], %[sum], %[sum]"
        : [sum] "+x"(total), [product] "=&x"(product)
        : [a] "x"(first), [b] "xm"(second));
    sum.raw = total;
  }

  HWY_INLINE void score_some(const std::int8_t* const* rows, std::int64_t key, int row, const float* factors,
                             LineWalker& walker, float* HWY_RESTRICT scores) const {
    const FloatTag f;
    LineWalker ahead = walker;
    Ints sums[kScoreKeys * kRowPart];
    HWY_UNROLL(8)
    for (int i = 0; i < kScoreKeys * kRowPart; ++i) sums[i] = hn::Zero(IntTag());
    for (std::int64_t d = 0; d < dim_; d += kWordUnit) {
      const std::int16_t* const q = s_.q + d * kRows + row * kWordUnit;
      ahead.keep_pace<static_cast<int>(kScoreKeys * kWordUnit) * kRowPart / kRows>(d / kWordUnit);
      Words16 k[kScoreKeys];
      HWY_UNROLL(8)
      for (int n = 0; n < kScoreKeys; ++n) k[n] = load_words(rows[key + n] + d);
      HWY_UNROLL(4)
      for (int r = 0; r < kRowPart; ++r) {
        const Words16 of_row = hn::Load(WordVector(), q + r * kWordUnit);
        HWY_UNROLL(8)
        for (int n = 0; n < kScoreKeys; ++n) add_dot(of_row, k[n], sums[n * kRowPart + r]);
      }
    }
    walker = ahead;
    add_partials<kLanes, kLanes>(sums);
    Floats joined = hn::ConvertTo(f, sums[0]);
    if (factors != nullptr) joined = hn::Mul(joined, factors_of<kRowPart>(factors, key));
    if constexpr (kRows == kRowPart) {
      hn::Store(hn::Mul(joined, hn::Load(f, s_.q_unit)), f, scores + key * kRows);
    } else {
      const hn::Half<FloatTag> of_key;
      const auto unit = hn::Load(of_key, s_.q_unit + row);
      float* const at = scores + key * kRows + row;
      hn::Store(hn::Mul(hn::LowerHalf(of_key, joined), unit), of_key, at);
      hn::Store(hn::Mul(hn::UpperHalf(of_key, joined), unit), of_key, at + kRows);
    }
  }

  // Those of kLanes / kCount keys from `key` on, each in kCount lanes. Loads are aligned as the stores were, just
  // before: across two of these they would wait.
  template <int kCount>
  static HWY_INLINE Floats factors_of(const float* factors, std::int64_t key) {
    const FloatTag f;
    const IntTag n;
    HWY_ALIGN static constexpr auto kKeys = [] {
      std::array<std::int32_t, kLanes> keys{};
      for (int lane = 0; lane < kLanes; ++lane) keys[lane] = lane / kCount;
      return keys;
    }();
    const Ints keys = hn::Add(hn::Load(n, kKeys.data()), hn::Set(n, static_cast<std::int32_t>(key % kLanes)));
    return hn::TableLookupLanes(hn::Load(f, factors + key / kLanes * kLanes), hn::IndicesFromVec(f, keys));
  }

  // Two vectors of weights → those of even keys and those of odd ones.
  static HWY_INLINE void part_keys(Ints& first, Ints& second) {
    const IntTag n;
    const Ints a = first, b = second;
    if constexpr (kRows == 4) {
      first = hn::ConcatLowerLower(n, b, a);
      second = hn::ConcatUpperUpper(n, b, a);
    } else if constexpr (kRows < 4) {
      const hn::Repartition<std::conditional_t<kRows == 1, std::int32_t, std::int64_t>, IntTag> of_key;
      first = hn::BitCast(n, hn::ConcatEven(of_key, hn::BitCast(of_key, b), hn::BitCast(of_key, a)));
      second = hn::BitCast(n, hn::ConcatOdd(of_key, hn::BitCast(of_key, b), hn::BitCast(of_key, a)));
    }
  }

  HWY_NOINLINE void write_words(const float* HWY_RESTRICT weights) const {
    const FloatTag f;
    const Floats inverse = hn::Load(f, s_.weight_inverse);
    for (std::int64_t i = 0; i < kDecodeKeys * kRows; i += 2 * kLanes) {
      Ints even = hn::NearestInt(hn::Mul(hn::Load(f, weights + i), inverse));
      Ints odd = hn::NearestInt(hn::Mul(hn::Load(f, weights + i + kLanes), inverse));
      part_keys(even, odd);
      const Ints words = hn::Or(even, hn::ShiftLeft<16>(odd));
      hn::Store(hn::BitCast(WordTag(), words), WordTag(), s_.words + i / 2);
    }
  }

  // kRowPart rows × kUnits units.
  HWY_NOINLINE void add_some(const std::int8_t* const* rows, KeyRange pairs, std::int64_t position, int row,
                             float* HWY_RESTRICT out, LineWalker& walker) const {
    const FloatTag f;
    const WordVector w;
    constexpr int kVectors = 2 * kUnits;
    constexpr int kStepBytes = 2 * kUnits * static_cast<int>(kWordUnit) * kRowPart / kRows;  // of a pair
    LineWalker ahead = walker;
    Ints sums[kRowPart * kVectors];
    HWY_UNROLL(8)
    for (int i = 0; i < kRowPart * kVectors; ++i) sums[i] = hn::Zero(IntTag());
    // Parts of a block are multiples of 16 keys.
    for (std::int64_t first = pairs.begin; first < pairs.end; first += 2) {
      ahead.keep_pace<2 * kStepBytes>(first / 2);
      HWY_UNROLL(2)
      for (int i = 0; i < 2; ++i) {
        const std::int64_t pair = first + i;
        Words16 v[kVectors];
        HWY_UNROLL(2)
        for (int unit = 0; unit < kUnits; ++unit) {
          const std::int64_t at = position + unit * kWordUnit;
          const Words16 a = load_words(rows[2 * pair] + at), b = load_words(rows[2 * pair + 1] + at);
          v[2 * unit] = hn::InterleaveLower(w, a, b);
          v[2 * unit + 1] = hn::InterleaveUpper(w, a, b);
        }
        HWY_UNROLL(4)
        for (int r = 0; r < kRowPart; ++r) {
          const auto p = hn::BitCast(w, hn::Set(WordTag(), s_.words[pair * kRows + row + r]));
          HWY_UNROLL(4)
          for (int j = 0; j < kVectors; ++j) add_dot(p, v[j], sums[r * kVectors + j]);
        }
      }
    }
    walker = ahead;
    HWY_UNROLL(4)
    for (int r = 0; r < kRowPart; ++r) {
      const Floats unit = hn::Set(f, s_.weight_unit[row + r]);
      HWY_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) {
        float* const at = out + (row + r) * dim_v_ + position + j * kLanes;
        hn::Store(hn::MulAdd(hn::ConvertTo(f, sums[r * kVectors + j]), unit, hn::Load(f, at)), f, at);
      }
    }
  }

  const WordState& s_;
  std::int64_t dim_, dim_v_;
};

#else
template <int kRows>
class WordProducts;
#endif

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
