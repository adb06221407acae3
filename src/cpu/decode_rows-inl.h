// cpu/decode_rows-inl.h: a task of few query rows: packs them, walks the key blocks, leaves the online softmax's state.
// With a threshold it is two tasks: one leaves the scores, so that the rows' largest are known over all parts, the
// other reads only the values whose weight counts.
#if defined(ONEPASS_CPU_DECODE_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_ROWS_INL_H_
#undef ONEPASS_CPU_DECODE_ROWS_INL_H_
#else
#define ONEPASS_CPU_DECODE_ROWS_INL_H_
#endif

#include <limits>

#include "cpu/decode_tile-inl.h"
#include "cpu/values-inl.h"

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
class DecodeTask {
  using Tile = DecodeTile<kRows>;
  static constexpr std::int64_t kPartials = Tile::kPartials;
  static constexpr std::int64_t kTileSize = kDecodeKeys * kRows;
  static constexpr bool kBytes = kHasByteDot && std::is_same_v<T, std::int8_t> && kRows > 1;

 public:
  DecodeTask(const CachedProblem& problem, const Problem& queries, const ScoreTerms& terms, const CachedTask& task,
             DecodeState& state)
      : problem_(problem),
        queries_(queries),
        terms_(terms),
        task_(task),
        s_(state),
        tile_(problem, terms, task, state),
        reader_(problem.cache, task.batch, task.head_kv),
        k_(StoredSide::of<T>(problem.cache, problem.cache.head_dim)),
        v_(StoredSide::of<T>(problem.cache, problem.cache.head_dim_v)) {
    for (std::int64_t i = 0; i < kDecodeKeys; ++i) s_.all_keys[i] = static_cast<std::int32_t>(i);
    std::fill_n(s_.out, kRows * v_.positions, 0.0f);
    std::fill_n(s_.maximum, kLanes, -kInfinity);
    std::fill_n(s_.sum, kLanes, 0.0f);
  }

  void run() {
    pack_queries();
    for_each_block(/*with_k=*/true, /*with_v=*/true, [&](const Block& block) {
      score(block, s_.scores);
      softmax(block.keys.first, s_.scores);
      if (problem_.attention.dropout_p > 0) tile_.drop(block.keys.first, s_.scores);
      add_values(block, s_.scores);
    });
    join_sums();
  }

  // Scores of all blocks (decode_span keys × kRows), and the largest of each row.
  void run_scores(float* scores, float* maxima) {
    pack_queries();
    for_each_block(true, false, [&](const Block& block) {
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

  // Row r of the result in channel order, times `factor`.
  void read_row(std::int64_t r, float factor, float* dst) const {
    const float* row = s_.out + r * v_.positions;
    if (v_.unpacked()) factor *= Unpack<T>::kFactor;
    for (std::int64_t p = 0; p < v_.positions; ++p) {
      if (const std::int64_t d = v_.channel<T>(p); d < v_.dim) dst[d] = row[p] * factor;
    }
  }

 private:
  struct Block {
    typename CacheReader<T>::Block keys;
    const T* const* k;
    const T* const* k_next;
    const T* const* v;
    const T* const* v_next;
    // A key that does not exist stands for its nearest, as its row does.
    std::int64_t key_at(std::int64_t i) const { return std::clamp(keys.first + i, keys.begin, keys.end - 1); }
  };

  void load_query(std::int64_t r) {
    const RowSet& rows = tile_.rows();
    const std::int64_t row = tile_.row_of(r);
    with_float_type(queries_.dtype, [&]<class Q>(Q) {
      if constexpr (!std::is_same_v<Q, double>) {
        convert_row(queries_.q.row<Q>(rows.batch, rows.head_of(row), rows.token_of(row)), k_.dim, s_.staging);
      }
    });
    for (std::int64_t d = 0; d < k_.dim; ++d) s_.staging[d] *= terms_.query_factor;
  }

  void pack_queries() {
    if constexpr (kBytes) {
      if (use_bytes()) return;
    }
    const float factor = k_.natural ? 1.0f : Unpack<T>::kFactor;
    for (std::int64_t r = 0; r < kRows; ++r) {
      load_query(r);
      for (std::int64_t p = 0; p < k_.positions; ++p) {
        const std::int64_t d = k_.channel<T>(p);
        s_.q[p / kPartials * kLanes + r * kPartials + p % kPartials] = d < k_.dim ? s_.staging[d] * factor : 0.0f;
      }
    }
  }

  // Integer products, when nothing in the problem or the queries is against them. Those of V take whole blocks.
  bool use_bytes() {
    const bool whole = k_.dim % kByteChunk == 0 && v_.dim % kByteChunk == 0;
    if (!has_byte_dot() || !whole || k_.group_scales) return false;
    ByteProducts<kRows> products = byte_products();
    for (std::int64_t r = 0; r < kRows; ++r) {
      load_query(r);
      if (!products.pack_query(r, s_.staging)) return false;
    }
    k_.bytes = true;
    v_.bytes = problem_.prob_threshold == 0;
    return true;
  }
  ByteProducts<kRows> byte_products() const { return {s_.bytes, k_.dim, v_.dim}; }

  // f(block) for every block of keys, its rows known, those of the next block too (to fetch them ahead).
  template <class F>
  void for_each_block(bool with_k, bool with_v, const F& f) {
    const T** const k = reinterpret_cast<const T**>(s_.k_rows);
    const T** const v = reinterpret_cast<const T**>(s_.v_rows);
    const auto locate = [&](std::int64_t first, std::int64_t at) {
      const typename CacheReader<T>::Block keys{first, std::max(first, task_.begin),
                                                std::min(first + kDecodeKeys, task_.end)};
      if (with_k) reader_.rows(problem_.cache.k, keys, kDecodeKeys, k + at);
      if (with_v) reader_.rows(problem_.cache.v, keys, kDecodeKeys, v + at);
      if (with_k && !k_.group_scales) reader_.fetch_scales(problem_.cache.k_scale, keys);
      if (with_v && !v_.group_scales) reader_.fetch_scales(problem_.cache.v_scale, keys);
      return keys;
    };
    if (task_.begin >= task_.end) return;
    auto keys = locate(task_.begin / kDecodeKeys * kDecodeKeys, 0);
    for (;;) {
      const bool last = keys.first + kDecodeKeys >= task_.end;
      const auto next = locate(last ? keys.first : keys.first + kDecodeKeys, kDecodeKeys);
      f(Block{keys, k, k + kDecodeKeys, v, v + kDecodeKeys});
      if (last) return;
      keys = next;
      if (with_k) std::copy_n(k + kDecodeKeys, kDecodeKeys, k);
      if (with_v) std::copy_n(v + kDecodeKeys, kDecodeKeys, v);
    }
  }

  LineFetcher lines_of(const StoredSide& side, const T* const* rows) const {
    return {reinterpret_cast<const void* const*>(rows), side.positions * static_cast<std::int64_t>(sizeof(T))};
  }

  // Rows [first, first + count) as floats in the side's order, one behind the other; key_at(i) is the key of row i.
  template <class F>
  void convert(const StoredSide& side, const CacheScale& scale, const T* const* rows, std::int64_t first,
               std::int64_t count, float* dst, const F& key_at) {
    if constexpr (Unpack<T>::kFast) {
      if (side.unpacked() && convert_block<T>(rows, s_.all_keys + first, count, side.dim, dst)) return;
    }
    for (std::int64_t n = 0; n < count; ++n) {
      const T* const row = rows[first + n];
      float* const to = dst + n * kConvertedStride;
      if (side.natural) {
        const float* groups = side.group_scales ? reader_.group_scales(scale, key_at(first + n)) : nullptr;
        dequantize_row(row, side.dim, groups, problem_.cache.group_channels, to);
        std::fill(to + side.dim, to + side.positions, 0.0f);
      } else {
        for (std::int64_t p = 0; p < side.positions; ++p) {
          to[p] = to_float(row[side.channel<T>(p)]) * (1.0f / Unpack<T>::kFactor);
        }
      }
    }
  }

  // Products of a block, scaled by nothing yet.
  void multiply_keys_by_queries(const Block& block, float* scores) {
    if constexpr (kBytes) {
      if (k_.bytes) {
        for (std::int64_t first = 0; first < kDecodeKeys; first += kConvertedKeys) {
          byte_products().score(block.k + first, lines_of(k_, block.k_next + first), scores + first * kRows);
        }
        return;
      }
    }
    if constexpr (kRows == 1 && Unpack<T>::kFast) {
      if (!k_.natural && score_one_row<T>(block.k, block.k_next, kDecodeKeys, s_.q, k_.dim, scores)) return;
    }
    for (std::int64_t first = 0; first < kDecodeKeys; first += kConvertedKeys) {
      convert(k_, problem_.cache.k_scale, block.k, first, kConvertedKeys, s_.k_converted,
              [&](std::int64_t i) { return block.key_at(i); });
      if constexpr (kRows == 1) {
        const float* rows[kConvertedKeys];
        for (std::int64_t n = 0; n < kConvertedKeys; ++n) rows[n] = s_.k_converted + n * kConvertedStride;
        score_one_row<float>(rows, rows, kConvertedKeys, s_.q, k_.positions, scores + first);
      } else {
        const LineFetcher ahead = lines_of(k_, block.k_next + first);
        score_rows<T, kRows>(s_.k_converted, s_.q, k_.positions, ahead, scores + first * kRows);
      }
    }
  }

  void score(const Block& block, float* scores) {
    const CacheScale& scale = problem_.cache.k_scale;
    multiply_keys_by_queries(block, scores);
    if (scale && !k_.group_scales) {
      reader_.scales(scale, block.keys, kDecodeKeys, s_.scales);
      Tile::multiply_keys(s_.scales, scores);
    }
    tile_.finish(block.keys.first, {block.keys.begin, block.keys.end}, scores);
  }

  // Scores → weights; earlier outputs are brought to the new maximum.
  void softmax(std::int64_t first, float* scores) {
    const FloatTag f;
    softmax_tile(ScoreTile{scores, kLanes, first, Tile::kTileKeys}, terms_.unit(), s_.tile_maximum, s_.maximum, s_.sum,
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
    if (scale && !v_.group_scales) {
      reader_.scales(scale, block.keys, kDecodeKeys, s_.scales);
      Tile::multiply_keys(s_.scales, weights);
      if (hidden) tile_.mask(block.keys.first, 0.0f, weights);  // 0·NaN
    }
    const LineFetcher ahead = lines_of(v_, block.v_next);
    if constexpr (kBytes) {
      if (v_.bytes && byte_products().pack_weights(weights)) {
        return byte_products().add_values(block.v, s_.out, ahead);
      }
    }
    add_value_rows(
        block.v, first, count, weights, hidden, ahead, [&](std::int64_t i) { return block.key_at(i); },
        [&](std::int64_t i, std::int64_t r) { return tile_.sees(r, block.keys.first + i); });
  }

  // Adds rows [first, first + count) of values, whose keys are key_at(i). hidden: some weights are 0 because the row
  // does not see the key.
  template <class KeyAt, class Sees>
  void add_value_rows(const T* const* rows, std::int64_t first, std::int64_t count, const float* weights, bool hidden,
                      LineFetcher ahead, const KeyAt& key_at, const Sees& sees) {
    const std::int32_t* const list = s_.all_keys + first;
    if constexpr (kReadsStorage<T, kRows>) {
      if (v_.unpacked()) {
        const bool retractable = hidden || NanWatch<T>::kNeeded;
        if (retractable) std::copy_n(s_.out, kRows * v_.positions, s_.out_before);
        LineFetcher meanwhile = ahead;
        const bool good =
            add_values_of<T, T, kRows>(rows, list, count, weights, v_.dim, s_.out, v_.positions, meanwhile);
        // A hidden value that is not finite shows in the sums.
        if (good && (!hidden || all_finite(Broadcast{s_.out, v_.positions}, kRows, v_.positions))) return;
        std::copy_n(s_.out_before, kRows * v_.positions, s_.out);
      }
    }
    for (std::int64_t n = 0; n < count; n += kConvertedValues) {
      const std::int64_t begin = first + n, part = std::min(kConvertedValues, count - n);
      convert(v_, problem_.cache.v_scale, rows, begin, part, s_.v_converted, key_at);
      if (hidden) take_out_not_finite(begin, part, weights, sees);
      const float* converted[kDecodeKeys];
      for (std::int64_t i = 0; i < part; ++i) converted[begin + i] = s_.v_converted + i * kConvertedStride;
      add_values_of<T, float, kRows>(converted, s_.all_keys + begin, part, weights, v_.positions, s_.out, v_.positions,
                                     ahead);
    }
  }

  // A hidden weight is 0, but 0·NaN is NaN: values that are not finite are replaced by 0 and given to the rows that see
  // them.
  template <class Sees>
  void take_out_not_finite(std::int64_t first, std::int64_t count, const float* weights, const Sees& sees) {
    if (all_finite(Broadcast{s_.v_converted, kConvertedStride}, count, v_.positions)) return;
    for (std::int64_t i = first; i < first + count; ++i) {
      float* const row = s_.v_converted + (i - first) * kConvertedStride;
      for (std::int64_t p = 0; p < v_.positions; ++p) {
        if (std::isfinite(row[p])) continue;
        for (std::int64_t r = 0; r < kRows; ++r) {
          if (sees(i, r)) s_.out[r * v_.positions + p] += weights[i * kRows + r] * row[p];
        }
        row[p] = 0.0f;
      }
    }
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
      softmax(first, weights);
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
    for (std::int64_t i = 0; i < count; ++i) {
      const float factor = *reader_.group_scales(problem_.cache.v_scale, kept[i]);
      float* const row = weights + i * kRows;
      for (std::int64_t r = 0; r < kRows; ++r) row[r] = row[r] == 0.0f ? 0.0f : row[r] * factor;
    }
  }

  // Values of kept keys, a block's worth at a time, while those of the next are fetched.
  void add_kept_values(float* weights, const std::int32_t* kept, std::int64_t count) {
    const T** const rows = reinterpret_cast<const T**>(s_.v_rows);
    if (problem_.cache.v_scale && !v_.group_scales) scale_kept(kept, count, weights);
    const auto locate = [&](std::int64_t first, std::int64_t at) {
      for (std::int64_t i = 0; i < kDecodeKeys && first < count; ++i) {
        rows[at + i] = reader_.row(problem_.cache.v, kept[std::min(first + i, count - 1)]);
      }
    };
    locate(0, 0);
    for (std::int64_t first = 0; first < count; first += kDecodeKeys) {
      const std::int64_t part = std::min(kDecodeKeys, count - first);
      const bool last = first + part == count;
      locate(last ? first : first + kDecodeKeys, kDecodeKeys);
      const float* const of_part = weights + first * kRows;
      add_value_rows(
          rows, 0, part, of_part, /*hidden=*/kRows > 1, lines_of(v_, rows + kDecodeKeys),
          [&](std::int64_t i) { return kept[first + i]; },
          [&](std::int64_t i, std::int64_t r) { return of_part[i * kRows + r] != 0.0f; });
      if (!last) std::copy_n(rows + kDecodeKeys, kDecodeKeys, rows);
    }
  }

  const CachedProblem& problem_;
  const Problem& queries_;  // where the rows of q are: their dtype may differ from the problem's
  const ScoreTerms& terms_;
  const CachedTask& task_;
  DecodeState& s_;
  Tile tile_;
  CacheReader<T> reader_;
  StoredSide k_, v_;
};

#endif  // !HWY_HAVE_SCALABLE
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
