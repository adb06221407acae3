// cpu/decode_bytes-inl.h: both products of few rows with an int8 cache in integers, where the processor multiplies
// bytes (AVX-512 VNNI: 64 products an instruction, twice in a clock, four times the rate of float FMAs, and nothing is
// converted). Exact to float32: queries and weights become 24-bit fixed point, three bytes each, so that
//   q·k = unit·Σ (256²·q2 + 256·q1 + q0)·k  with q2, q1, q0 in [−128, 127],
//   Σ p·v = unit·Σ (256²·p2 + 256·p1 + p0)·v  with p2, p1, p0 in [0, 255].
// Two bytes each are enough for bfloat16 queries and outputs.
// The instruction takes one unsigned factor: keys are stored as k + 128 while they are in scratch.
#if defined(ONEPASS_CPU_DECODE_BYTES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_BYTES_INL_H_
#undef ONEPASS_CPU_DECODE_BYTES_INL_H_
#else
#define ONEPASS_CPU_DECODE_BYTES_INL_H_
#endif

#include <cmath>

#include "cpu/arena.h"
#include "cpu/decode-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

// In the tier; processors with AVX-512 may still lack it.
inline constexpr bool kHasByteDot = HWY_TARGET == HWY_AVX3;
inline bool has_byte_dot() {
  if constexpr (!kHasByteDot) return false;
  static const bool present = __builtin_cpu_supports("avx512vnni");
  return present;
}

inline constexpr std::int64_t kByteChunk = 64;  // channels: a vector of bytes

// Position s of a chunk of 64 channels as the second product leaves them.
inline std::int64_t byte_channel(std::int64_t s) { return s % 16 / 4 * 16 + s / 16 * 4 + s % 4; }

struct ByteState {
  static constexpr std::int64_t kKeyStride = 512 + kByteChunk;  // odd in cache lines

  std::int8_t* q;         // [byte][4E channels][lane][4 channels]
  std::int32_t* start;    // [byte][lane]: what takes out the 128 of the keys
  float* q_unit;          // [lane]
  std::uint8_t* keys;     // [key][kKeyStride]
  std::int8_t* values;    // [4 keys][position][key]
  std::uint32_t* words;   // [byte][4 keys][row]: a byte of 4 weights
  float* weight_inverse;  // [lane]: 1 / unit
  float* weight_unit;     // [row]

  void take(Arena& arena, std::int64_t dim, std::int64_t dim_v) {
    q = arena.take<std::int8_t>(3 * dim * kLanes);
    start = arena.take<std::int32_t>(3 * kLanes);
    q_unit = arena.take<float>(kLanes);
    keys = arena.take<std::uint8_t>(kConvertedKeys * kKeyStride);
    values = arena.take<std::int8_t>(kDecodeKeys * dim_v);
    words = arena.take<std::uint32_t>(3 * kDecodeKeys / 4 * kLanes);
    weight_inverse = arena.take<float>(kLanes);
    weight_unit = arena.take<float>(kLanes);
  }
};

#if HWY_TARGET == HWY_AVX3

// sum += Σ of 4 products a lane. Inline assembly, so that the tier's other code may not use the extension.
HWY_INLINE void add_byte_dot(hn::Vec<ByteVector> unsigned_bytes, hn::Vec<ByteVector> signed_bytes, Ints& sum) {
  // In registers of their own: GCC writes the members of its vectors' structures to memory first.
  const __m512i first = unsigned_bytes.raw, second = signed_bytes.raw;
  __m512i total = sum.raw;
  asm("vpdpbusd %[b], %[a], %[sum]" : [sum] "+v"(total) : [a] "v"(first), [b] "v"(second));
  sum.raw = total;
}

// Σ 256^i·digit(i): digit(i) is the i-th sum.
template <int kDigits, class F>
HWY_INLINE Floats join_bytes(const F& digit) {
  const FloatTag f;
  Floats joined = hn::MulAdd(hn::ConvertTo(f, digit(1)), hn::Set(f, 256.0f), hn::ConvertTo(f, digit(0)));
  if constexpr (kDigits == 3) joined = hn::MulAdd(hn::ConvertTo(f, digit(2)), hn::Set(f, 65536.0f), joined);
  return joined;
}

// kDigits bytes of a query or weight, 2 or 3.
template <int kRows, int kDigits>
class ByteProducts {
  static constexpr int kPartials = kLanes / kRows;           // E
  static constexpr int kStep = 4 * kPartials;                // channels of the first product's broadcast
  static constexpr std::int64_t kGroups = kDecodeKeys / 4;   // of 4 keys
  static constexpr std::int64_t kGroupSpan = 4 * kPartials;  // keys that E groups lie across
  static constexpr int kRowPart = kRows < 4 ? kRows : 4;     // rows of a pass of the second product

 public:
  ByteProducts(const ByteState& state, std::int64_t dim, std::int64_t dim_v) : s_(state), dim_(dim), dim_v_(dim_v) {}

  // Row r of the queries. False when it has no fixed-point form: not finite, or out of all proportion.
  bool pack_query(std::int64_t r, const float* query) {
    const float largest = largest_of_query(query, dim_);
    if (largest == 0.0f) return false;
    const double inverse = kQueryOne / double{largest};
    std::int64_t sums[kDigits][kPartials] = {};
    for (std::int64_t d = 0; d < dim_; ++d) {
      const std::int64_t step = d / kStep, e = d % kStep / 4;
      std::int64_t rest = std::llrint(query[d] * inverse);
      for (int byte = 0; byte < kDigits; ++byte) {
        const std::int64_t digit = byte == kDigits - 1 ? rest : ((rest + 128) & 255) - 128;
        rest = (rest - digit) / 256;
        s_.q[((byte * dim_ / kStep + step) * kLanes + r * kPartials + e) * 4 + d % 4] = static_cast<std::int8_t>(digit);
        sums[byte][e] += digit;
      }
    }
    for (int byte = 0; byte < kDigits; ++byte) {
      for (int e = 0; e < kPartials; ++e) {
        s_.start[byte * kLanes + r * kPartials + e] = static_cast<std::int32_t>(-128 * sums[byte][e]);
      }
    }
    for (int e = 0; e < kPartials; ++e) s_.q_unit[e * kRows + r] = static_cast<float>(1.0 / inverse);
    return true;
  }

  // scores[key][row] for kConvertedKeys keys.
  HWY_NOINLINE void score(const std::int8_t* const* rows, LineFetcher ahead, float* HWY_RESTRICT scores) const {
    const ByteVector bytes;
    const auto offset = hn::Set(bytes, std::uint8_t{128});
    for (std::int64_t key = 0; key < kConvertedKeys; ++key) {
      const auto* const row = reinterpret_cast<const std::uint8_t*>(rows[key]);
      for (std::int64_t d = 0; d < dim_; d += kByteChunk) {
        hn::Store(hn::Xor(hn::LoadU(bytes, row + d), offset), bytes, s_.keys + key * ByteState::kKeyStride + d);
      }
    }
    for (std::int64_t key = 0; key < kConvertedKeys; key += kScoreKeys) {
      score_some(s_.keys + key * ByteState::kKeyStride, ahead, scores + key * kRows);
    }
  }

  // The weights of a block, scaled by V's scales, as bytes. False when some have no fixed-point form.
  bool pack_weights(const float* weights) {
    if (!fixed_point_units<kRows>(weights, kWeightOne, s_.weight_inverse, s_.weight_unit)) return false;
    write_words(weights);
    return true;
  }

  // out[row][position] += Σ_key weight·v[key] for a block's keys, after pack_weights.
  HWY_NOINLINE void add_values(const std::int8_t* const* rows, float* HWY_RESTRICT out, LineFetcher ahead) const {
    interleave(rows);
    for (std::int64_t position = 0; position < dim_v_; position += 2 * kLanes) {
      for (std::int64_t row = 0; row < kRows; row += kRowPart) add_some(position, row, out, ahead);
    }
  }

 private:
  static constexpr int kScoreKeys = 8;  // 24 accumulators
  static constexpr double kQueryOne = kDigits == 3 ? 127.0 * 65536.0 : 127.0 * 256.0;
  static constexpr float kWeightOne = kDigits == 3 ? 0xFFFFF0 : 0xFFFE;  // below 2²⁴ or 2¹⁶ after rounding

  static HWY_INLINE hn::Vec<ByteVector> broadcast_channels(const std::uint8_t* p) {
    const ByteVector bytes;
    if constexpr (kPartials == 1) {
      std::uint32_t word;
      std::memcpy(&word, p, sizeof(word));
      return hn::BitCast(bytes, hn::Set(WordTag(), word));
    } else if constexpr (kPartials == 2) {
      std::uint64_t pair;
      std::memcpy(&pair, p, sizeof(pair));
      return hn::BitCast(bytes, hn::Set(hn::Repartition<std::uint64_t, FloatTag>(), pair));
    } else {
      return hn::LoadDup128(bytes, p);
    }
  }

  HWY_INLINE void score_some(const std::uint8_t* HWY_RESTRICT keys, LineFetcher& fetcher,
                             float* HWY_RESTRICT scores) const {
    const FloatTag f;
    const ByteVector bytes;
    const auto* const q = reinterpret_cast<const std::uint8_t*>(s_.q);
    const std::int64_t byte_size = dim_ * kRows;
    LineFetcher ahead = fetcher;
    Ints sums[kDigits][kScoreKeys];
    HWY_UNROLL(3)
    for (int byte = 0; byte < kDigits; ++byte) {
      const Ints start = hn::Load(IntTag(), s_.start + byte * kLanes);
      HWY_UNROLL(8)
      for (int i = 0; i < kScoreKeys; ++i) sums[byte][i] = start;
    }
    for (std::int64_t d = 0; d < dim_; d += kStep) {
      hn::Vec<ByteVector> qv[kDigits];
      HWY_UNROLL(3)
      for (int byte = 0; byte < kDigits; ++byte) qv[byte] = hn::Load(bytes, q + byte * byte_size + d * kRows);
      ahead.keep_pace<kScoreKeys * kStep>(d / kStep);
      HWY_UNROLL(8)
      for (int i = 0; i < kScoreKeys; ++i) {
        const auto k = broadcast_channels(keys + i * ByteState::kKeyStride + d);
        HWY_UNROLL(3)
        for (int byte = 0; byte < kDigits; ++byte) add_byte_dot(k, qv[byte], sums[byte][i]);
      }
    }
    fetcher = ahead;
    Floats joined[kScoreKeys];
    HWY_UNROLL(8)
    for (int i = 0; i < kScoreKeys; ++i) joined[i] = join_bytes<kDigits>([&](int byte) { return sums[byte][i]; });
    add_partials<kScoreKeys, kPartials>(joined);
    const Floats unit = hn::Load(f, s_.q_unit);
    HWY_UNROLL(8)
    for (int i = 0; i < kScoreKeys / kPartials; ++i) hn::Store(hn::Mul(joined[i], unit), f, scores + i * kLanes);
  }

  // Four vectors, E keys each, meet in words of 4 keys: group e of them has the keys e, E + e, 2E + e, 3E + e.
  HWY_NOINLINE void write_words(const float* HWY_RESTRICT weights) const {
    const FloatTag f;
    const WordTag words;
    const Floats inverse = hn::Load(f, s_.weight_inverse);
    const auto low = hn::Set(words, 255u);
    for (std::int64_t first = 0; first < kDecodeKeys * kRows; first += 4 * kLanes) {
      hn::Vec<WordTag> x[4];
      HWY_UNROLL(4)
      for (int j = 0; j < 4; ++j) {
        x[j] = hn::BitCast(words, hn::NearestInt(hn::Mul(hn::Load(f, weights + first + j * kLanes), inverse)));
      }
      std::uint32_t* const to = s_.words + first / 4;
      HWY_UNROLL(3)
      for (int byte = 0; byte < kDigits; ++byte) {
        const auto of = [&](int j) {
          return hn::And(byte == 0 ? x[j] : byte == 1 ? hn::ShiftRight<8>(x[j]) : hn::ShiftRight<16>(x[j]), low);
        };
        const auto even = hn::Or(of(0), hn::ShiftLeft<16>(of(2))), odd = hn::Or(of(1), hn::ShiftLeft<16>(of(3)));
        hn::Store(hn::Or(even, hn::ShiftLeft<8>(odd)), words, to + byte * kGroups * kRows);
      }
    }
  }

  // Rows of 4 keys → words of 4 keys, channels in the order of byte_channel.
  HWY_NOINLINE void interleave(const std::int8_t* const* rows) const {
    const ByteVector bytes;
    const HalfWords pairs;
    for (std::int64_t group = 0; group < kGroups; ++group) {
      const std::int64_t first = group / kPartials * kGroupSpan + group % kPartials;
      const std::uint8_t* row[4];
      for (int j = 0; j < 4; ++j) row[j] = reinterpret_cast<const std::uint8_t*>(rows[first + j * kPartials]);
      auto* const to = reinterpret_cast<std::uint8_t*>(s_.values) + group * 4 * dim_v_;
      for (std::int64_t d = 0; d < dim_v_; d += kByteChunk) {
        const auto a = hn::LoadU(bytes, row[0] + d), b = hn::LoadU(bytes, row[1] + d);
        const auto c = hn::LoadU(bytes, row[2] + d), e = hn::LoadU(bytes, row[3] + d);
        const auto ab_low = hn::BitCast(pairs, hn::InterleaveLower(bytes, a, b));
        const auto ab_high = hn::BitCast(pairs, hn::InterleaveUpper(bytes, a, b));
        const auto ce_low = hn::BitCast(pairs, hn::InterleaveLower(bytes, c, e));
        const auto ce_high = hn::BitCast(pairs, hn::InterleaveUpper(bytes, c, e));
        std::uint8_t* const at = to + 4 * d;
        hn::Store(hn::BitCast(bytes, hn::InterleaveLower(pairs, ab_low, ce_low)), bytes, at);
        hn::Store(hn::BitCast(bytes, hn::InterleaveUpper(pairs, ab_low, ce_low)), bytes, at + 64);
        hn::Store(hn::BitCast(bytes, hn::InterleaveLower(pairs, ab_high, ce_high)), bytes, at + 128);
        hn::Store(hn::BitCast(bytes, hn::InterleaveUpper(pairs, ab_high, ce_high)), bytes, at + 192);
      }
    }
  }

  // kRowPart rows × 2 vectors: 24 accumulators.
  HWY_INLINE void add_some(std::int64_t position, std::int64_t row, float* HWY_RESTRICT out,
                           LineFetcher& fetcher) const {
    const FloatTag f;
    const ByteVector bytes;
    constexpr int kStepBytes = static_cast<int>(2 * kLanes * 4 * kRowPart / kRows);
    const auto* const values = reinterpret_cast<const std::uint8_t*>(s_.values) + position * 4;
    LineFetcher ahead = fetcher;
    Ints sums[kDigits][kRowPart][2];
    HWY_UNROLL(24)
    for (int i = 0; i < 2 * kDigits * kRowPart; ++i) (&sums[0][0][0])[i] = hn::Zero(IntTag());
    for (std::int64_t group = 0; group < kGroups; ++group) {
      const auto v0 = hn::Load(bytes, values + group * 4 * dim_v_);
      const auto v1 = hn::Load(bytes, values + group * 4 * dim_v_ + 64);
      ahead.keep_pace<kStepBytes>(group);
      HWY_UNROLL(4)
      for (int r = 0; r < kRowPart; ++r) {
        HWY_UNROLL(3)
        for (int byte = 0; byte < kDigits; ++byte) {
          const auto p = hn::BitCast(bytes, hn::Set(WordTag(), s_.words[(byte * kGroups + group) * kRows + row + r]));
          add_byte_dot(p, v0, sums[byte][r][0]);
          add_byte_dot(p, v1, sums[byte][r][1]);
        }
      }
    }
    fetcher = ahead;
    HWY_UNROLL(4)
    for (int r = 0; r < kRowPart; ++r) {
      const Floats unit = hn::Set(f, s_.weight_unit[row + r]);
      HWY_UNROLL(2)
      for (int j = 0; j < 2; ++j) {
        float* const at = out + (row + r) * dim_v_ + position + j * kLanes;
        const Floats sum = join_bytes<kDigits>([&](int byte) { return sums[byte][r][j]; });
        hn::Store(hn::MulAdd(sum, unit, hn::Load(f, at)), f, at);
      }
    }
  }

  const ByteState& s_;
  std::int64_t dim_, dim_v_;
};

#else
template <int kRows, int kDigits>
class ByteProducts;
#endif

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
