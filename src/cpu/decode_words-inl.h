// cpu/decode_words-inl.h: both products of few bfloat16 query rows with an int8 cache in 16-bit integers, where vectors
// have 256 bits (AVX2: vpmaddwd, 16 products an instruction, as many of them in a clock as of FMAs with 8). Stored
// bytes are widened by shifts, even and odd channels apart: 3 instructions for 32 of them instead of 12 to floats.
// Queries, and the weights of a block, become 16-bit fixed point, more than bfloat16 holds; sums are exact.
#if defined(ONEPASS_CPU_DECODE_WORDS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_WORDS_INL_H_
#undef ONEPASS_CPU_DECODE_WORDS_INL_H_
#else
#define ONEPASS_CPU_DECODE_WORDS_INL_H_
#endif

#include "cpu/arena.h"
#include "cpu/decode-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

inline constexpr bool kHasWordDot = HWY_TARGET == HWY_AVX2;

inline constexpr std::int64_t kWordChunk = 32;  // channels: a vector of bytes

// Position s of a chunk as the second product leaves it: even channels before odd ones, each half in the order in which
// interleaving two keys takes them apart.
inline std::int64_t word_channel(std::int64_t s) {
  const std::int64_t half = s / 16, vector = s % 16 / 8, lane = s % 8;
  return 2 * (lane / 4 * 8 + vector * 4 + lane % 4) + half;
}

struct WordState {
  std::int16_t* q;         // [chunk][row][even channels, odd channels]
  float* q_unit;           // [lane]
  std::uint32_t* words;    // [pair of keys][row]: their weights
  float* weight_inverse;   // [lane]: 1 / unit
  float* weight_unit;      // [row]

  void take(Arena& arena, std::int64_t dim) {
    q = arena.take<std::int16_t>(dim * kLanes);
    q_unit = arena.take<float>(kLanes);
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
  static constexpr int kHalves = kRowPart == 4 ? 1 : 2;   // of a chunk, in a pass of the second one: 4 or 8 sums

  using WordVector = hn::Repartition<std::int16_t, FloatTag>;
  using Words16 = hn::Vec<WordVector>;

 public:
  WordProducts(const WordState& state, std::int64_t dim, std::int64_t dim_v) : s_(state), dim_(dim), dim_v_(dim_v) {}

  static bool takes(std::int64_t dim, std::int64_t dim_v) { return dim % kWordChunk == 0 && dim_v % kWordChunk == 0; }

  // Row r of the queries. False when it has no fixed-point form.
  bool pack_query(std::int64_t r, const float* query) {
    const FloatTag f;
    const float largest = largest_of_query(query, dim_);
    if (largest == 0.0f) return false;
    const Floats inverse = hn::Set(f, kOne / largest);
    for (std::int64_t d = 0; d < dim_; d += kLanes) {
      HWY_ALIGN std::int32_t fixed[kLanes];
      hn::Store(hn::NearestInt(hn::Mul(hn::LoadU(f, query + d), inverse)), IntTag(), fixed);
      std::int16_t* const to = s_.q + (d / kWordChunk * kRows + r) * kWordChunk + d % kWordChunk / 2;
      for (std::int64_t i = 0; i < kLanes; ++i) to[i % 2 * 16 + i / 2] = static_cast<std::int16_t>(fixed[i]);
    }
    for (std::int64_t lane = r; lane < kLanes; lane += kRows) s_.q_unit[lane] = largest / kOne;
    return true;
  }

  // scores[key][row] for `keys` keys, a multiple of kScoreKeys.
  HWY_NOINLINE void score(const std::int8_t* const* rows, std::int64_t keys, LineFetcher ahead,
                          float* HWY_RESTRICT scores) const {
    for (std::int64_t key = 0; key < keys; key += kScoreKeys) {
      for (int row = 0; row < kRows; row += kRowPart) score_some(rows + key, row, ahead, scores + key * kRows);
    }
  }

  // The weights of a block, scaled by V's scales, in fixed point. False when some have no such form.
  bool pack_weights(const float* weights) {
    if (!fixed_point_units<kRows>(weights, kOne, s_.weight_inverse, s_.weight_unit)) return false;
    write_words(weights);
    return true;
  }

  // out[row][position] += Σ_key weight·v[key] for a block's keys, after pack_weights; `at_once` of them before the next
  // are read.
  void add_values(const std::int8_t* const* rows, std::int64_t at_once, float* HWY_RESTRICT out,
                  LineFetcher ahead) const {
    for (std::int64_t key = 0; key < kDecodeKeys; key += at_once) {
      const KeyRange pairs{key / 2, std::min(key + at_once, kDecodeKeys) / 2};
      for (std::int64_t position = 0; position < dim_v_; position += kWordChunk) {
        for (int row = 0; row < kRows; row += kRowPart) add_some<0>(rows, pairs, position, row, out, ahead);
        if constexpr (kHalves == 2) continue;
        for (int row = 0; row < kRows; row += kRowPart) add_some<1>(rows, pairs, position, row, out, ahead);
      }
    }
  }

 private:
  // The largest query and weight: sums of 512 products with up to 128 fit 32 bits.
  static constexpr float kOne = 32767.0f;

  // Words of the even or of the odd bytes.
  template <int kHalf>
  static HWY_INLINE Words16 widen(Words16 bytes) {
    if constexpr (kHalf == 0) bytes = hn::ShiftLeft<8>(bytes);
    return hn::ShiftRight<8>(bytes);
  }
  static HWY_INLINE Words16 load_bytes(const std::int8_t* p) {
    return hn::LoadU(WordVector(), reinterpret_cast<const std::int16_t*>(p));
  }
  static HWY_INLINE void add_dot(Words16 a, Words16 b, Ints& sum) {
    Ints unused = sum;
    sum = hn::ReorderWidenMulAccumulate(IntTag(), a, b, sum, unused);
  }

  HWY_INLINE void score_some(const std::int8_t* const* rows, int row, LineFetcher& fetcher,
                             float* HWY_RESTRICT scores) const {
    const FloatTag f;
    LineFetcher ahead = fetcher;
    Ints sums[kScoreKeys * kRowPart];
    HWY_UNROLL(8)
    for (int i = 0; i < kScoreKeys * kRowPart; ++i) sums[i] = hn::Zero(IntTag());
    for (std::int64_t d = 0; d < dim_; d += kWordChunk) {
      const std::int16_t* const q = s_.q + d * kRows + row * kWordChunk;
      ahead.keep_pace<static_cast<int>(kScoreKeys * kWordChunk) * kRowPart / kRows>(d / kWordChunk);
      HWY_UNROLL(8)
      for (int n = 0; n < kScoreKeys; ++n) {
        const Words16 bytes = load_bytes(rows[n] + d), even = widen<0>(bytes), odd = widen<1>(bytes);
        HWY_UNROLL(4)
        for (int r = 0; r < kRowPart; ++r) {
          Ints& sum = sums[n * kRowPart + r];
          add_dot(even, hn::Load(WordVector(), q + r * kWordChunk), sum);
          add_dot(odd, hn::Load(WordVector(), q + r * kWordChunk + kWordChunk / 2), sum);
        }
      }
    }
    fetcher = ahead;
    add_partials<kLanes, kLanes>(sums);
    const Floats joined = hn::ConvertTo(f, sums[0]);
    if constexpr (kRows == kRowPart) {
      hn::Store(hn::Mul(joined, hn::Load(f, s_.q_unit)), f, scores);
    } else {
      const hn::Half<FloatTag> of_key;
      const auto unit = hn::Load(of_key, s_.q_unit + row);
      hn::Store(hn::Mul(hn::LowerHalf(of_key, joined), unit), of_key, scores + row);
      hn::Store(hn::Mul(hn::UpperHalf(of_key, joined), unit), of_key, scores + kRows + row);
    }
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

  // kRowPart rows × kHalves halves of a chunk, from half kFirst on.
  template <int kFirst>
  HWY_NOINLINE void add_some(const std::int8_t* const* rows, KeyRange pairs, std::int64_t position, int row,
                             float* HWY_RESTRICT out, LineFetcher& fetcher) const {
    const FloatTag f;
    constexpr int kVectors = 2 * kHalves;
    constexpr int kStepBytes = 2 * kHalves * 16 * kRowPart / kRows;
    LineFetcher ahead = fetcher;
    Ints sums[kRowPart * kVectors];
    HWY_UNROLL(8)
    for (int i = 0; i < kRowPart * kVectors; ++i) sums[i] = hn::Zero(IntTag());
    for (std::int64_t pair = pairs.begin; pair < pairs.end; ++pair) {
      const Words16 a = load_bytes(rows[2 * pair] + position), b = load_bytes(rows[2 * pair + 1] + position);
      Words16 v[kVectors];
      interleave<kFirst>(a, b, v);
      if constexpr (kHalves == 2) interleave<1>(a, b, v + 2);
      ahead.keep_pace<kStepBytes>(pair);
      HWY_UNROLL(4)
      for (int r = 0; r < kRowPart; ++r) {
        const auto p = hn::BitCast(WordVector(), hn::Set(WordTag(), s_.words[pair * kRows + row + r]));
        HWY_UNROLL(4)
        for (int j = 0; j < kVectors; ++j) add_dot(p, v[j], sums[r * kVectors + j]);
      }
    }
    fetcher = ahead;
    HWY_UNROLL(4)
    for (int r = 0; r < kRowPart; ++r) {
      const Floats unit = hn::Set(f, s_.weight_unit[row + r]);
      HWY_UNROLL(4)
      for (int j = 0; j < kVectors; ++j) {
        float* const at = out + (row + r) * dim_v_ + position + kFirst * 16 + j * kLanes;
        hn::Store(hn::MulAdd(hn::ConvertTo(f, sums[r * kVectors + j]), unit, hn::Load(f, at)), f, at);
      }
    }
  }

  template <int kHalf>
  static HWY_INLINE void interleave(Words16 a, Words16 b, Words16* v) {
    const Words16 first = widen<kHalf>(a), second = widen<kHalf>(b);
    v[0] = hn::InterleaveLower(WordVector(), first, second);
    v[1] = hn::InterleaveUpper(WordVector(), first, second);
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
