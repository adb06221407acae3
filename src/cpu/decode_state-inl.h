// cpu/decode_state-inl.h: what a task of few query rows keeps, and how it reads K and V.
#if defined(ONEPASS_CPU_DECODE_STATE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_STATE_INL_H_
#undef ONEPASS_CPU_DECODE_STATE_INL_H_
#else
#define ONEPASS_CPU_DECODE_STATE_INL_H_
#endif

#include "cpu/arena.h"
#include "cpu/cached_plan.h"
#include "cpu/decode_bytes-inl.h"
#include "cpu/decode_pairs-inl.h"
#include "cpu/decode_words-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
#if !HWY_HAVE_SCALABLE

// Rows of a tile: the fewest that hold `count`, of 1, L/4, L/2 and L.
inline std::int64_t tile_rows(std::int64_t count) {
  if (count == 1) return 1;
  return count <= kLanes / 4 ? kLanes / 4 : count <= kLanes / 2 ? kLanes / 2 : kLanes;
}

// The order in which a row's channels lie in a tile.
enum class ChannelOrder : std::uint8_t {
  kNatural,
  kUnpack,    // as Unpack leaves them
  kIntegers,  // as ByteProducts or WordProducts does: rows are not converted, or one by one
  kPairs,     // as PairProducts does, likewise
};

// How one of K and V is read.
struct StoredSide {
  std::int64_t dim;        // channels
  std::int64_t positions;  // floats of a row in a tile: dim, rounded up to vectors
  ChannelOrder order;
  bool group_scales;  // applied while converting

  template <class T>
  static StoredSide of(const KVStorage& cache, std::int64_t dim) {
    const bool groups = cache.granularity == ScaleGranularity::kGroup;
    const bool natural = groups || !Unpack<T>::kFast || dim % chunk_elements<T>() != 0;
    return {dim, padded(dim), natural ? ChannelOrder::kNatural : ChannelOrder::kUnpack, groups};
  }
  bool unpacked() const { return order == ChannelOrder::kUnpack; }

  template <class T>
  std::int64_t row_bytes() const {
    return positions * static_cast<std::int64_t>(sizeof(T));
  }
  // Keys whose rows are fetched before they are read, as many as are read in one go. Many query rows take longer than
  // reading: then longer passes over the values gain more.
  template <class T, int kRows>
  std::int64_t keys_ahead() const {
    if (kRows >= 8) return kDecodeKeys;
    return std::clamp<std::int64_t>(fetch_policy().bytes / row_bytes<T>() / 16 * 16, 16, kDecodeKeys);
  }

  // The channel that lies at a position; positions past `dim` hold none.
  template <class T>
  std::int64_t channel(std::int64_t position) const {
    switch (order) {
      case ChannelOrder::kNatural: return position;
      case ChannelOrder::kIntegers:
        if constexpr (kHasWordDot) return position / kWordUnit * kWordUnit + word_channel(position % kWordUnit);
        return position / kByteChunk * kByteChunk + byte_channel(position % kByteChunk);
      case ChannelOrder::kPairs: return pair_channel<T>(position);
      case ChannelOrder::kUnpack: break;
    }
    const std::int64_t chunk = chunk_elements<T>();
    return position / chunk * chunk + Unpack<T>::channel(position % chunk);
  }
};

// Floats unless said.
struct DecodeState {
  float* q;       // [row][positions of K], or [positions of K / E][lane] (kRowByRow)
  float* scores;  // [kSpanKeys / E][lane]
  float* out;     // [row][positions of V], not yet divided by the sum
  float* out_before;
  float* maximum;       // [lane]
  float* sum;           // [lane]
  float* rescale;       // [lane]
  float* tile_maximum;  // [lane]
  float* k_converted;   // [key][kConvertedStride]
  float* v_converted;
  float* scales;        // [key], and one vector past the end
  float* staging;       // [positions]
  float* row_terms;     // [kDecodeKeys]
  std::int32_t* begin;  // [lane]: visible keys, as in Lanes
  std::int32_t* end;
  std::int32_t* center;
  float* slope;
  const void** k_rows;  // [key] of a block and of the next, which take turns
  const void** v_rows;
  std::int32_t* all_keys;  // 0, 1, …
  ByteState bytes;
  PairState pairs;
  WordState words;

  void take(Arena& arena, const CachedProblem& problem) {
    const KVStorage& cache = problem.cache;
    const std::int64_t k_positions = padded(cache.head_dim), v_positions = padded(cache.head_dim_v);
    q = arena.take<float>(k_positions * kLanes);
    scores = arena.take<float>(kSpanKeys * kLanes);
    out = arena.take<float>(v_positions * kLanes);
    out_before = arena.take<float>(v_positions * kLanes);
    for (float** lane : {&maximum, &sum, &rescale, &tile_maximum, &slope}) *lane = arena.take<float>(kLanes);
    for (std::int32_t** lane : {&begin, &end, &center}) *lane = arena.take<std::int32_t>(kLanes);
    k_converted = arena.take<float>(kConvertedKeys * kConvertedStride);
    v_converted = arena.take<float>(kConvertedValues * kConvertedStride);
    scales = arena.take<float>(kDecodeKeys + kLanes);
    staging = arena.take<float>(std::max(k_positions, v_positions));
    row_terms = arena.take<float>(kDecodeKeys);
    k_rows = arena.take<const void*>(2 * kDecodeKeys);
    v_rows = arena.take<const void*>(2 * kDecodeKeys);
    all_keys = arena.take<std::int32_t>(kDecodeKeys);
    if (kHasByteDot && cache.dtype == DType::kInt8) bytes.take(arena, cache.head_dim, cache.head_dim_v);
    if (kHasPairDot && problem.attention.dtype == DType::kBFloat16) pairs.take(arena, cache.head_dim);
    if (kHasWordDot && cache.dtype == DType::kInt8) words.take(arena, cache.head_dim);
  }
};

#endif  // !HWY_HAVE_SCALABLE
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
