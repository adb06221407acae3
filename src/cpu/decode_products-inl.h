// cpu/decode_products-inl.h: both products of a task of few query rows, whichever way its storage multiplies best.
#if defined(ONEPASS_CPU_DECODE_PRODUCTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_PRODUCTS_INL_H_
#undef ONEPASS_CPU_DECODE_PRODUCTS_INL_H_
#else
#define ONEPASS_CPU_DECODE_PRODUCTS_INL_H_
#endif

#include "cpu/decode_tile-inl.h"
#include "cpu/values-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
#if !HWY_HAVE_SCALABLE

// `T` stored element, `kRows` rows of the tile.
template <class T, int kRows>
class DecodeProducts {
  using Tile = DecodeTile<kRows>;
  static constexpr std::int64_t kPartials = Tile::kPartials;
  static constexpr bool kReadsKeys = kRowByRow<kRows> || kTiled<kRows>;  // one by one, as they are stored
  // Eight rows' two tiles would unpack float8 twice, which takes longer than a copy.
  static constexpr bool kConvertsFirst = kTiled<kRows> && kRows > kQuad&& kFloat8<T>;
  static constexpr bool kBytes = kHasByteDot && std::is_same_v<T, std::int8_t> && kRows > 1;
  // One row of int8 is bound by memory, which floats read a little faster (docs/kv-cache.md).
  static constexpr bool kPairs = kHasPairDot && kPairStorage<T> && (!std::is_same_v<T, std::int8_t> || kRows > 1);
  static constexpr bool kWords = kHasWordDot && std::is_same_v<T, std::int8_t>;

 public:
  DecodeProducts(const CachedProblem& problem, const Problem& queries, const ScoreTerms& terms, const CachedTask& task,
                 DecodeState& state)
      : problem_(problem),
        queries_(queries),
        terms_(terms),
        s_(state),
        tile_(problem, terms, task, state),
        reader_(problem.cache, task.batch, task.head_kv),
        k_(StoredSide::of<T>(problem.cache, problem.cache.head_dim)),
        v_(StoredSide::of<T>(problem.cache, problem.cache.head_dim_v)) {
    for (std::int64_t i = 0; i < kDecodeKeys; ++i) s_.all_keys[i] = static_cast<std::int32_t>(i);
    std::fill_n(s_.out, kRows * v_.positions, 0.0f);
    pack_queries();
  }

  // Row r of the result in channel order, times `factor`.
  void read_row(std::int64_t r, float factor, float* dst) const {
    const float* row = s_.out + r * v_.positions;
    if (v_.unpacked()) factor *= Unpack<T>::kFactor;
    for (std::int64_t p = 0; p < v_.positions; ++p) {
      if (const std::int64_t d = v_.channel<T>(p); d < v_.dim) dst[d] = row[p] * factor;
    }
  }

 protected:
  struct Block {
    typename CacheReader<T>::Block keys;
    const T* const* rows;  // of keys or of values
    std::int64_t at;       // of these in their ring
    // A key that does not exist stands for its nearest, as its row does.
    std::int64_t key_at(std::int64_t i) const { return std::clamp(keys.first + i, keys.begin, keys.end - 1); }
  };

  // Whether the products take scales of keys in passing, for as good as nothing: a pass of their own over scores or
  // weights takes three clocks a vector.
  bool takes_factors() const {
    return std::is_same_v<T, std::int8_t> &&
           (k_.order == ChannelOrder::kPairs || (kWords && k_.order == ChannelOrder::kIntegers));
  }

  // Products of a block; times factors[key], when they take them.
  void multiply_keys_by_queries(const Block& block, const float* factors, float* scores) {
    if constexpr (kBytes) {
      if (k_.order == ChannelOrder::kIntegers) {
        return with_byte_products([&](const auto& products) {
          for (std::int64_t first = 0; first < kDecodeKeys; first += kConvertedKeys) {
            products.score(block.rows + first, lines_ahead(k_, s_.k_rows, block.at + first), scores + first * kRows);
          }
        });
      }
    }
    if constexpr (kPairs) {
      if (k_.order == ChannelOrder::kPairs) {
        for (std::int64_t first = 0; first < kDecodeKeys; first += kConvertedKeys) {
          pair_products().score(block.rows + first, factors + first, lines_ahead(k_, s_.k_rows, block.at + first),
                                scores + first * kRows);
        }
        return;
      }
    }
    if constexpr (kWords) {
      if (k_.order == ChannelOrder::kIntegers) {
        return word_products().score(block.rows, factors, lines_ahead(k_, s_.k_rows, block.at), scores);
      }
    }
    if constexpr (kReadsKeys && Unpack<T>::kFast && !kConvertsFirst) {
      if (k_.unpacked() && score_stored(block.rows, kDecodeKeys, k_.dim, lines_ahead(k_, s_.k_rows, block.at), scores))
        return;
    }
    for (std::int64_t first = 0; first < kDecodeKeys; first += kConvertedKeys) {
      convert(k_, problem_.cache.k_scale, block.rows, first, kConvertedKeys, s_.k_converted,
              [&](std::int64_t i) { return block.key_at(i); });
      const LineFetcher ahead = lines_ahead(k_, s_.k_rows, block.at + first);
      if constexpr (kReadsKeys) {
        const float* rows[kConvertedKeys];
        for (std::int64_t n = 0; n < kConvertedKeys; ++n) rows[n] = s_.k_converted + n * kConvertedStride;
        score_stored(rows, kConvertedKeys, k_.positions, ahead, scores + first * kRows);
      } else {
        score_rows<T, kRows>(s_.k_converted, s_.q, k_.positions, ahead, scores + first * kRows);
      }
    }
  }

  // Adds a block of values, of which [first, first + count) count: all kDecodeKeys may be read, the others' weights
  // are 0. Their keys are key_at(i). hidden: some weights are 0 because the row does not see the key. factors: what
  // weights are yet to be multiplied by, or none.
  template <class KeyAt, class Sees>
  void add_block(const T* const* rows, std::int64_t first, std::int64_t count, const float* weights,
                 const float* factors, bool hidden, LineFetcher ahead, const KeyAt& key_at, const Sees& sees) {
    if constexpr (kBytes) {
      if (v_.order == ChannelOrder::kIntegers && with_byte_products([&](auto products) {
            if (!products.pack_weights(weights)) return false;
            products.add_values(rows, s_.out, ahead);
            return true;
          })) {
        return;
      }
    }
    if constexpr (kPairs) {
      if (v_.order == ChannelOrder::kPairs) {
        // A value that is not finite and has a weight of 0 shows in the sums. No integer is that.
        const bool retractable = !std::is_same_v<T, std::int8_t> && (hidden || count < kDecodeKeys);
        if (retractable) std::copy_n(s_.out, kRows * v_.positions, s_.out_before);
        pair_products().add_values(rows, weights, factors, v_.keys_ahead<T, kRows>(), s_.out, ahead);
        if (!retractable || all_finite(Broadcast{s_.out, v_.positions}, kRows, v_.positions)) return;
        std::copy_n(s_.out_before, kRows * v_.positions, s_.out);
      }
    }
    if constexpr (kWords) {
      if (v_.order == ChannelOrder::kIntegers) {
        WordProducts<kRows> products = word_products();
        if (products.pack_weights(weights, factors))
          return products.add_values(rows, v_.keys_ahead<T, kRows>(), s_.out, ahead);
      }
    }
    add_value_rows(rows, first, count, weights, hidden, ahead, key_at, sees);
  }

  LineFetcher lines_ahead(const StoredSide& side, const void* const* ring, std::int64_t row) const {
    const auto index = static_cast<std::uint64_t>(row + side.keys_ahead<T, kRows>());
    return {ring, index, side.row_bytes<T>(), fetch_policy().first_level};
  }

  const CachedProblem& problem_;
  const Problem& queries_;  // where the rows of q are: their dtype may differ from the problem's
  const ScoreTerms& terms_;
  DecodeState& s_;
  Tile tile_;
  CacheReader<T> reader_;
  StoredSide k_, v_;

 private:
  // Scores of keys stored or converted as K.
  template <class K>
  bool score_stored(const K* const* rows, std::int64_t keys, std::int64_t dim, LineFetcher ahead, float* scores) const {
    if constexpr (kRows == 1) {
      return score_one_row<K>(rows, keys, s_.q, dim, ahead, scores);
    } else if constexpr (kTiled<kRows>) {
      return score_tiles<T, K, kRows>(rows, keys, s_.q, dim, ahead, scores);
    } else {
      return score_row_by_row<T, K, kRows>(rows, keys, s_.q, dim, ahead, scores);
    }
  }

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
    if constexpr (kPairs) {
      if (use_pairs()) return;
    }
    if constexpr (kBytes) {
      if (use_bytes()) return;
    }
    if constexpr (kWords) {
      if (use_words()) return;
    }
    const float factor = k_.unpacked() ? Unpack<T>::kFactor : 1.0f;
    for (std::int64_t r = 0; r < kRows; ++r) {
      load_query(r);
      for (std::int64_t p = 0; p < k_.positions; ++p) {
        const std::int64_t d = k_.channel<T>(p);
        const std::int64_t place = kTiled<kRows>      ? (p / kLanes * kRows + r) * kLanes + p % kLanes
                                   : kRowByRow<kRows> ? r * k_.positions + p
                                                      : p / kPartials * kLanes + r * kPartials + p % kPartials;
        s_.q[place] = d < k_.dim ? s_.staging[d] * factor : 0.0f;
      }
    }
  }

  // Integer products, when nothing in the problem or the queries is against them. Those of V take whole blocks.
  bool use_bytes() {
    const bool whole = k_.dim % kByteChunk == 0 && v_.dim % kByteChunk == 0;
    if (!has_byte_dot() || !whole || k_.group_scales) return false;
    return with_byte_products([&](auto products) {
      for (std::int64_t r = 0; r < kRows; ++r) {
        load_query(r);
        if (!products.pack_query(r, s_.staging)) return false;
      }
      k_.order = v_.order = ChannelOrder::kIntegers;
      return true;
    });
  }
  // Two bytes of a query or weight are more than bfloat16 holds.
  template <class F>
  auto with_byte_products(const F& f) const {
    if (queries_.dtype == DType::kBFloat16) return f(ByteProducts<kRows, 2>(s_.bytes, k_.dim, v_.dim));
    return f(ByteProducts<kRows, 3>(s_.bytes, k_.dim, v_.dim));
  }

  // Products of pairs, when queries are bfloat16: so the output is.
  bool use_pairs() {
    if (queries_.dtype != DType::kBFloat16 || !has_pair_dot() || k_.group_scales) return false;
    if (!PairProducts<T, kRows>::takes(k_.dim, v_.dim)) return false;
    PairProducts<T, kRows> products = pair_products();
    for (std::int64_t r = 0; r < kRows; ++r) {
      load_query(r);
      if (!products.pack_query(r, s_.staging)) return false;
    }
    k_.order = v_.order = ChannelOrder::kPairs;
    return true;
  }
  PairProducts<T, kRows> pair_products() const { return {s_.pairs, k_.dim, v_.dim}; }

  // Products in 16-bit integers, likewise.
  bool use_words() {
    if (queries_.dtype != DType::kBFloat16 || k_.group_scales) return false;
    if (!WordProducts<kRows>::takes(k_.dim, v_.dim)) return false;
    WordProducts<kRows> products = word_products();
    for (std::int64_t r = 0; r < kRows; ++r) {
      load_query(r);
      if (!products.pack_query(r, s_.staging)) return false;
    }
    k_.order = v_.order = ChannelOrder::kIntegers;
    return true;
  }
  WordProducts<kRows> word_products() const { return {s_.words, k_.dim, v_.dim}; }

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
      if (side.order == ChannelOrder::kNatural) {
        const float* groups = side.group_scales ? reader_.group_scales(scale, key_at(first + n)) : nullptr;
        dequantize_row(row, side.dim, groups, problem_.cache.group_channels, to);
        std::fill(to + side.dim, to + side.positions, 0.0f);
      } else {
        const float factor = side.unpacked() ? 1.0f / Unpack<T>::kFactor : 1.0f;
        for (std::int64_t p = 0; p < side.positions; ++p) to[p] = to_float(row[side.channel<T>(p)]) * factor;
      }
    }
  }

  // add_block for rows that are multiplied as floats.
  template <class KeyAt, class Sees>
  void add_value_rows(const T* const* rows, std::int64_t first, std::int64_t count, const float* weights, bool hidden,
                      LineFetcher ahead, const KeyAt& key_at, const Sees& sees) {
    const std::int32_t* const list = s_.all_keys + first;
    if constexpr (kReadsStorage<T, kRows> || (kTiled<kRows> && Unpack<T>::kFast && !kConvertsFirst)) {
      if (v_.unpacked()) {
        const bool retractable = hidden || NanWatch<T>::kNeeded;
        if (retractable) std::copy_n(s_.out, kRows * v_.positions, s_.out_before);
        std::conditional_t<kTiled<kRows>, LineWalker, LineFetcher> meanwhile(ahead);
        bool good = true;
        const std::int64_t at_once = v_.keys_ahead<T, kRows>();
        for (std::int64_t n = 0; n < count; n += at_once) {
          const std::int64_t part = std::min(count - n, at_once);
          if constexpr (kTiled<kRows>) {
            good &= add_value_tiles<T, T, kRows>(rows + first + n, part, weights + (first + n) * kRows, v_.dim, s_.out,
                                                 v_.positions, meanwhile);
          } else {
            good &= add_values_of<T, T, kRows>(rows, list + n, part, weights, v_.dim, s_.out, v_.positions, meanwhile);
          }
        }
        // A hidden value that is not finite shows in the sums.
        if (good && (!hidden || all_finite(Broadcast{s_.out, v_.positions}, kRows, v_.positions))) return;
        std::copy_n(s_.out_before, kRows * v_.positions, s_.out);
      }
    }
    std::conditional_t<kTiled<kRows>, LineWalker, LineFetcher&> in_order(ahead);
    for (std::int64_t n = 0; n < count; n += kConvertedValues) {
      const std::int64_t begin = first + n, part = std::min(kConvertedValues, count - n);
      convert(v_, problem_.cache.v_scale, rows, begin, part, s_.v_converted, key_at);
      if (hidden) take_out_not_finite(begin, part, weights, sees);
      if constexpr (kTiled<kRows>) {
        const float* converted[kConvertedValues];
        for (std::int64_t i = 0; i < part; ++i) converted[i] = s_.v_converted + i * kConvertedStride;
        add_value_tiles<T, float, kRows>(converted, part, weights + begin * kRows, v_.positions, s_.out, v_.positions,
                                         in_order);
      } else {
        const float* converted[kDecodeKeys];
        for (std::int64_t i = 0; i < part; ++i) converted[begin + i] = s_.v_converted + i * kConvertedStride;
        add_values_of<T, float, kRows>(converted, s_.all_keys + begin, part, weights, v_.positions, s_.out,
                                       v_.positions, in_order);
      }
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
};

#endif  // !HWY_HAVE_SCALABLE
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
