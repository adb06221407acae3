// cpu/decode_tile-inl.h: what a tile of products of few rows goes through until it holds weights. It is [key / E][lane]
// with lane = (key % E)·rows + row, so that softmax_tile sees ordinary lanes; the E lanes of a row share one maximum.
#if defined(ONEPASS_CPU_DECODE_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_TILE_INL_H_
#undef ONEPASS_CPU_DECODE_TILE_INL_H_
#else
#define ONEPASS_CPU_DECODE_TILE_INL_H_
#endif

#include "cpu/decode_avx2-inl.h"
#include "cpu/decode_state-inl.h"
#include "cpu/dropout-inl.h"
#include "cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
#if !HWY_HAVE_SCALABLE

template <int kRows>
class DecodeTile {
 public:
  static constexpr std::int64_t kPartials = kLanes / kRows;           // E
  static constexpr std::int64_t kTileKeys = kDecodeKeys / kPartials;  // vectors of a tile

  DecodeTile(const CachedProblem& problem, const ScoreTerms& terms, const CachedTask& task, DecodeState& state)
      : problem_(problem.attention),
        terms_(terms),
        task_(task),
        rows_(row_set(problem, task.batch, task.head_kv)),
        s_(state) {
    set_lanes();
  }

  const RowSet& rows() const { return rows_; }
  // Rows past the task's repeat its last one.
  std::int64_t row_of(std::int64_t r) const { return task_.first_row + std::min(r, task_.rows - 1); }

  bool sees_all(std::int64_t first, std::int64_t count) const {
    return first >= max_begin_ && first + count <= min_end_;
  }
  bool sees(std::int64_t r, std::int64_t key) const { return key >= s_.begin[r] && key < s_.end[r]; }

  // Products of keys [first, first + kDecodeKeys), of which [begin, end) exist, → logits (products, when there are no
  // terms), −inf where a lane does not see the key; s_.tile_maximum.
  void finish(std::int64_t first, KeyRange existing, float* scores) {
    if (terms_.any()) scale_scores(ScoreTile{scores, kLanes, first, kTileKeys}, terms_);
    if (terms_.alibi) add_distance(first, scores);
    if (terms_.bias) add_bias(first, existing, scores);
    if (!sees_all(first, kDecodeKeys)) mask(first, -kInfinity, scores);
    take_maximum(scores);
  }

  // tile[key][row] *= factors[key].
  static void multiply_keys(const float* factors, float* tile) {
    const FloatTag f;
    const Ints lane = lane_keys();
    for (std::int64_t k = 0; k < kTileKeys; ++k) {
      // Loads aligned as the stores were, just before: across two of these they would wait.
      const std::int64_t key = k * kPartials;
      const Ints keys = hn::Add(lane, hn::Set(IntTag(), static_cast<std::int32_t>(key % kLanes)));
      const Floats aligned = hn::Load(f, factors + key / kLanes * kLanes);
      const Floats factor = hn::TableLookupLanes(aligned, hn::IndicesFromVec(f, keys));
      hn::Store(hn::Mul(hn::Load(f, tile + k * kLanes), factor), f, tile + k * kLanes);
    }
  }

  // Where lanes do not see a key the tile becomes `hidden`.
  void mask(std::int64_t first, float hidden, float* tile) const {
    const FloatTag f;
    const IntTag n;
    const Ints begin = hn::Load(n, s_.begin), end = hn::Load(n, s_.end), lane = lane_keys();
    for (std::int64_t k = 0; k < kTileKeys; ++k) {
      const Ints key = hn::Add(lane, hn::Set(n, static_cast<std::int32_t>(first + k * kPartials)));
      const auto visible = hn::RebindMask(f, hn::AndNot(hn::Gt(begin, key), hn::Gt(end, key)));
      hn::Store(hn::IfThenElse(visible, hn::Load(f, tile + k * kLanes), hn::Set(f, hidden)), f, tile + k * kLanes);
    }
  }

  // Dropped weights become 0. A vector of counters holds kLanes draws of a row, four keys each.
  void drop(std::int64_t first, float* weights) const {
    const WordTag w;
    const std::uint32_t threshold = dropout_threshold(problem_.dropout_p);
    const PhiloxKey key(problem_);
    for (std::int64_t r = 0; r < kRows; ++r) {
      const std::int64_t row = row_of(r);
      const auto query = static_cast<std::uint32_t>(rows_.query_of(row));
      const auto plane = static_cast<std::uint32_t>(rows_.batch * problem_.num_heads + rows_.head_of(row));
      for (std::int64_t quad = 0; quad < kDecodeKeys / 4; quad += kLanes) {
        Words words[4] = {hn::Iota(w, static_cast<std::uint32_t>(first / 4 + quad)), hn::Set(w, query),
                          hn::Set(w, plane), hn::Set(w, static_cast<std::uint32_t>(problem_.dropout_offset))};
        philox_words(words[0], words[1], words[2], words[3], key.low, key.high);
        HWY_ALIGN std::uint32_t bits[4][kLanes];
        for (int i = 0; i < 4; ++i) hn::Store(words[i], w, bits[i]);
        for (std::int64_t i = 0; i < 4 * kLanes; ++i) {
          float& weight = weights[(quad * 4 + i) * kRows + r];
          if (bits[i % 4][i / 4] < threshold) weight = 0.0f;
        }
      }
    }
  }

 private:
  void set_lanes() {
    const std::int64_t length = rows_.sequence.seqlen_k;
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const std::int64_t row = row_of(lane % kRows), query = rows_.query_of(row);
      const KeyRange seen = visible_keys(problem_, rows_.sequence, query);
      const std::int64_t begin = std::clamp<std::int64_t>(seen.begin, task_.begin, length);
      const std::int64_t end = std::clamp<std::int64_t>(seen.end, begin, std::max(begin, task_.end));
      s_.begin[lane] = static_cast<std::int32_t>(begin);
      s_.end[lane] = static_cast<std::int32_t>(end);
      max_begin_ = std::max(max_begin_, begin);
      min_end_ = std::min(min_end_, end);
      s_.center[lane] = static_cast<std::int32_t>(query + rows_.sequence.diagonal);
      s_.slope[lane] =
          terms_.alibi ? problem_.alibi_slopes[rows_.batch * problem_.alibi_batch_stride + rows_.head_of(row)] : 0.0f;
    }
  }

  // For each lane the key of its group: lane / kRows.
  static HWY_INLINE Ints lane_keys() {
    HWY_ALIGN std::int32_t keys[kLanes];
    for (std::int64_t lane = 0; lane < kLanes; ++lane) keys[lane] = static_cast<std::int32_t>(lane / kRows);
    return hn::Load(IntTag(), keys);
  }

  void add_distance(std::int64_t first, float* scores) const {
    const FloatTag f;
    const IntTag n;
    const Floats slope = hn::Load(f, s_.slope);
    const Ints from = hn::Sub(hn::Load(n, s_.center), lane_keys());
    for (std::int64_t k = 0; k < kTileKeys; ++k) {
      const Ints key = hn::Set(n, static_cast<std::int32_t>(first + k * kPartials));
      const Floats behind = hn::ConvertTo(f, hn::Sub(from, key));
      const Floats distance = terms_.alibi_zero_for_future ? hn::Max(behind, hn::Zero(f)) : hn::Abs(behind);
      hn::Store(hn::NegMulAdd(slope, distance, hn::Load(f, scores + k * kLanes)), f, scores + k * kLanes);
    }
  }

  // A bias has its keys along memory, a tile its rows.
  void add_bias(std::int64_t first, KeyRange existing, float* scores) const {
    const BiasOperand& bias = problem_.bias;
    const std::int64_t count = existing.end - existing.begin;
    for (std::int64_t r = 0; r < kRows; ++r) {
      const std::int64_t row = row_of(r);
      const std::int64_t offset = rows_.batch * bias.batch_stride + rows_.head_of(row) * bias.head_stride +
                                  rows_.query_of(row) * bias.query_stride;
      with_float_type(bias.dtype, [&]<class B>(B) {
        if constexpr (!std::is_same_v<B, double>) {
          const auto* const of_row = static_cast<const std::byte*>(bias.data) + offset * sizeof(B);
          load_bias_row<B>(of_row, existing.begin, count, bias.key_stride, s_.row_terms);
        }
      });
      float* const at = scores + (existing.begin - first) * kRows + r;
      for (std::int64_t i = 0; i < count; ++i) at[i * kRows] += s_.row_terms[i];
    }
  }

  void take_maximum(const float* scores) {
    const FloatTag f;
    Floats largest = hn::Set(f, -kInfinity);
    for (std::int64_t k = 0; k < kTileKeys; ++k) largest = hn::Max(hn::Load(f, scores + k * kLanes), largest);
    hn::Store(largest, f, s_.tile_maximum);
    for (std::int64_t r = 0; r < kRows; ++r) {
      float row = -kInfinity;
      for (std::int64_t e = 0; e < kPartials; ++e) row = std::max(row, s_.tile_maximum[e * kRows + r]);
      for (std::int64_t e = 0; e < kPartials; ++e) s_.tile_maximum[e * kRows + r] = row;
    }
  }

  const Problem& problem_;
  const ScoreTerms& terms_;
  const CachedTask& task_;
  RowSet rows_;
  DecodeState& s_;
  std::int64_t max_begin_ = 0, min_end_ = INT64_MAX;
};

#endif  // !HWY_HAVE_SCALABLE
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
