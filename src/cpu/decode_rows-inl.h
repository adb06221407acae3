// cpu/decode_rows-inl.h: a task of few query rows: walks the key blocks, leaves the online softmax's state.
// With a threshold it is two tasks: one leaves the scores, so that the rows' largest are known over all parts, the
// other reads only the values whose weight counts.
#if defined(ONEPASS_CPU_DECODE_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_ROWS_INL_H_
#undef ONEPASS_CPU_DECODE_ROWS_INL_H_
#else
#define ONEPASS_CPU_DECODE_ROWS_INL_H_
#endif

#include <limits>

#include "cpu/decode_products-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
#if !HWY_HAVE_SCALABLE

// Keys of the blocks that a task's keys lie in.
inline std::int64_t decode_span(const CachedTask& task) {
  const std::int64_t first = task.begin / kDecodeKeys * kDecodeKeys;
  return (task.end - first + kDecodeKeys - 1) / kDecodeKeys * kDecodeKeys;
}

// `T` stored element, `kRows` rows of the tile.
template <class T, int kRows>
class DecodeTask : DecodeProducts<T, kRows> {
  using Tile = DecodeTile<kRows>;
  using Products = DecodeProducts<T, kRows>;
  using typename Products::Block;
  static constexpr std::int64_t kPartials = Tile::kPartials;
  static constexpr std::int64_t kTileSize = kDecodeKeys * kRows;

 public:
  DecodeTask(const CachedProblem& problem, const Problem& queries, const ScoreTerms& terms, const CachedTask& task,
             DecodeState& state)
      : Products(problem, queries, terms, task, state), task_(task) {
    std::fill_n(s_.maximum, kLanes, -kInfinity);
    std::fill_n(s_.sum, kLanes, 0.0f);
  }

  using Products::read_row;

  // Keys and values take turns a span at a time.
  void run() {
    if (task_.begin >= task_.end) return;
    HWY_ALIGN float largest[kLanes];
    for (std::int64_t first = task_.begin / kDecodeKeys * kDecodeKeys; first < task_.end;) {
      const KeyRange span{first, std::min((first / kSpanKeys + 1) * kSpanKeys, task_.end)};
      float* scores = s_.scores;
      std::fill_n(largest, kLanes, -kInfinity);
      for_each_block<Side::kKeys>(span, [&](const Block& block) {
        score(block, scores);
        for (std::int64_t lane = 0; lane < kLanes; ++lane)
          largest[lane] = std::max(largest[lane], s_.tile_maximum[lane]);
        scores += kTileSize;
      });
      std::copy_n(largest, kLanes, s_.tile_maximum);
      softmax(first, (scores - s_.scores) / kLanes, s_.scores);
      scores = s_.scores;
      for_each_block<Side::kValues>(span, [&](const Block& block) {
        if (problem_.attention.dropout_p > 0) tile_.drop(block.keys.first, scores);
        add_values(block, scores);
        scores += kTileSize;
      });
      first = (first / kSpanKeys + 1) * kSpanKeys;
    }
    join_sums();
  }

  // Scores of all blocks (decode_span keys × kRows), and the largest of each row.
  void run_scores(float* scores, float* maxima) {
    for_each_block<Side::kKeys>({task_.begin, task_.end}, [&](const Block& block) {
      score(block, scores);
      for (std::int64_t r = 0; r < kRows; ++r) s_.maximum[r] = std::max(s_.maximum[r], s_.tile_maximum[r]);
      scores += kTileSize;
    });
    std::copy_n(s_.maximum, task_.rows, maxima);
  }

  // The rest of run() from these scores, which it overwrites, and the rows' largest over all parts. `kept` is room for
  // decode_span keys.
  void run_kept_values(float* scores, const float* maxima, std::int32_t* kept) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      s_.maximum[lane] = maxima[std::min(lane % kRows, task_.rows - 1)];
    }
    add_kept_values(scores, kept, keep_large(scores, kept));
    join_sums();
  }

 private:
  using Products::add_block, Products::lines_ahead, Products::multiply_keys_by_queries, Products::takes_factors;
  using Products::k_, Products::v_, Products::problem_, Products::reader_, Products::s_, Products::terms_,
      Products::tile_;

  enum class Side : std::uint8_t { kKeys, kValues };

  // f(block) for every block of a span, its rows known, and those of the next block, the next span's too, to fetch them
  // ahead.
  template <Side kSide, class F>
  void for_each_block(KeyRange span, const F& f) {
    constexpr bool kOfKeys = kSide == Side::kKeys;
    const StoredSide& side = kOfKeys ? k_ : v_;
    const Operand& operand = kOfKeys ? problem_.cache.k : problem_.cache.v;
    const CacheScale& scale = kOfKeys ? problem_.cache.k_scale : problem_.cache.v_scale;
    const T** const ring = reinterpret_cast<const T**>(kOfKeys ? s_.k_rows : s_.v_rows);
    const auto locate = [&](std::int64_t first, std::int64_t at) {
      const typename CacheReader<T>::Block keys{first, std::max(first, task_.begin),
                                                std::min(first + kDecodeKeys, task_.end)};
      reader_.rows(operand, keys, kDecodeKeys, ring + at);
      if (!side.group_scales) reader_.fetch_scales(scale, keys);
      return keys;
    };
    std::int64_t first = span.begin / kDecodeKeys * kDecodeKeys;
    if (span.begin >= span.end) return;
    auto keys = locate(first, 0);
    for (std::int64_t at = 0; first < span.end; at = kDecodeKeys - at) {
      first += kDecodeKeys;
      const auto next = locate(first < task_.end ? first : keys.first, kDecodeKeys - at);
      f(Block{keys, ring + at, at});
      keys = next;
    }
  }

  void score(const Block& block, float* scores) {
    const CacheScale& scale = problem_.cache.k_scale;
    const bool scaled = scale && !k_.group_scales;
    if (scaled) reader_.scales(scale, block.keys, kDecodeKeys, s_.scales);
    multiply_keys_by_queries(block, s_.scales, scores);
    if (scaled && !takes_factors()) Tile::multiply_keys(s_.scales, scores);
    tile_.finish(block.keys.first, {block.keys.begin, block.keys.end}, scores);
  }

  // `count` vectors of scores → weights; earlier outputs are brought to the new maximum.
  void softmax(std::int64_t first, std::int64_t count, float* scores) {
    const FloatTag f;
    softmax_tile(ScoreTile{scores, kLanes, first, count}, terms_.unit(), s_.tile_maximum, s_.maximum, s_.sum,
                 s_.rescale);
    for (std::int64_t r = 0; r < kRows; ++r) {
      if (s_.rescale[r] == 1.0f) continue;
      const Floats factor = hn::Set(f, s_.rescale[r]);
      float* const row = s_.out + r * v_.positions;
      for (std::int64_t p = 0; p < v_.positions; p += kLanes)
        hn::Store(hn::Mul(hn::Load(f, row + p), factor), f, row + p);
    }
  }

  // The row's lanes hold parts of its sum.
  void join_sums() {
    for (std::int64_t r = 0; r < kRows; ++r) {
      for (std::int64_t e = 1; e < kPartials; ++e) s_.sum[r] += s_.sum[e * kRows + r];
    }
  }

  // Adds the values of a block.
  void add_values(const Block& block, float* weights) {
    const CacheScale& scale = problem_.cache.v_scale;
    const std::int64_t first = block.keys.begin - block.keys.first, count = block.keys.end - block.keys.begin;
    const bool hidden = !tile_.sees_all(block.keys.begin, count);
    const float* factors = nullptr;
    if (scale && !v_.group_scales) {
      reader_.scales(scale, block.keys, kDecodeKeys, s_.scales);
      if (takes_factors() && !hidden) {
        factors = s_.scales;
      } else {
        Tile::multiply_keys(s_.scales, weights);
        if (hidden) tile_.mask(block.keys.first, 0.0f, weights);  // 0·NaN
      }
    }
    add_block(
        block.rows, first, count, weights, factors, hidden, lines_ahead(v_, s_.v_rows, block.at + first),
        [&](std::int64_t i) { return block.key_at(i); },
        [&](std::int64_t i, std::int64_t r) { return tile_.sees(r, block.keys.first + i); });
  }

  // Scores → weights. Those of keys that count for some row move to the front, their keys to `kept`; returns how many.
  // A NaN counts.
  std::int64_t keep_large(float* scores, std::int32_t* kept) {
    const FloatTag f;
    const Floats threshold = hn::Set(f, static_cast<float>(problem_.prob_threshold));
    const std::int64_t start = task_.begin / kDecodeKeys * kDecodeKeys;
    std::int64_t count = 0;
    for (std::int64_t first = start; first < task_.end; first += kDecodeKeys) {
      float* const weights = scores + (first - start) * kRows;
      std::copy_n(s_.maximum, kLanes, s_.tile_maximum);
      softmax(first, Tile::kTileKeys, weights);
      for (std::int64_t k = 0; k < kDecodeKeys; k += kPartials) {
        const Floats w = hn::Load(f, weights + k * kRows);
        const auto small = hn::Le(w, threshold);
        std::uint64_t keys = first_bits_of_keys(hn::Not(small));
        if (keys == 0) continue;
        const std::uint64_t lanes = keys * ((1u << kRows) - 1);
        const auto of_kept = hn::LoadMaskBits(f, reinterpret_cast<const std::uint8_t*>(&lanes));
        hn::CompressStore(hn::IfThenZeroElse(small, w), of_kept, f, scores + count * kRows);
        for (; keys != 0; keys &= keys - 1) {
          kept[count++] = static_cast<std::int32_t>(first + k + __builtin_ctzll(keys) / kRows);
        }
      }
    }
    return count;
  }

  // The first lane of every key that has a lane in the mask, as bits.
  static HWY_INLINE std::uint64_t first_bits_of_keys(hn::Mask<FloatTag> mask) {
    std::uint64_t bits = 0;
    hn::StoreMaskBits(FloatTag(), mask, reinterpret_cast<std::uint8_t*>(&bits));
    std::uint64_t first = 1;
    for (int width = kRows; width < kLanes; width *= 2) first |= first << width;
    for (int shift = 1; shift < kRows; shift *= 2) bits |= bits >> shift;
    return bits & first;
  }

  // weights[key][row] *= V's scale of the key; 0 stays, whatever the scale.
  void scale_kept(const std::int32_t* kept, std::int64_t count, float* weights) {
    const CacheScale& scale = problem_.cache.v_scale;
    typename CacheReader<T>::Cursor cursor(reader_);
    for (std::int64_t i = 0; i < count; ++i) {
      const float factor = *cursor.scale(scale, kept[i]);
      float* const row = weights + i * kRows;
      for (std::int64_t r = 0; r < kRows; ++r) row[r] = row[r] == 0.0f ? 0.0f : row[r] * factor;
    }
  }

  // Values of kept keys, a block's worth at a time, while those of the next are fetched.
  void add_kept_values(float* weights, const std::int32_t* kept, std::int64_t count) {
    const T** const rows = reinterpret_cast<const T**>(s_.v_rows);
    if (problem_.cache.v_scale && !v_.group_scales) scale_kept(kept, count, weights);
    typename CacheReader<T>::Cursor cursor(reader_);
    const auto locate = [&](std::int64_t first, std::int64_t at) {
      for (std::int64_t i = 0; i < kDecodeKeys && first < count; ++i) {
        rows[at + i] = cursor.row(problem_.cache.v, kept[std::min(first + i, count - 1)]);
      }
    };
    locate(0, 0);
    for (std::int64_t first = 0, at = 0; first < count; first += kDecodeKeys, at = kDecodeKeys - at) {
      const std::int64_t part = std::min(kDecodeKeys, count - first);
      const bool last = first + part == count;
      locate(last ? first : first + kDecodeKeys, kDecodeKeys - at);
      float* const of_part = weights + first * kRows;
      std::fill(of_part + part * kRows, of_part + kDecodeKeys * kRows, 0.0f);
      add_block(
          rows + at, 0, part, of_part, /*factors=*/nullptr, /*hidden=*/kRows > 1, lines_ahead(v_, s_.v_rows, at),
          [&](std::int64_t i) { return kept[first + i]; },
          [&](std::int64_t i, std::int64_t r) { return of_part[i * kRows + r] != 0.0f; });
    }
  }

  const CachedTask& task_;
};

#endif  // !HWY_HAVE_SCALABLE
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
