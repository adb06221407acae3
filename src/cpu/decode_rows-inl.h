// cpu/decode_rows-inl.h: a task of few query rows: packs them, walks the key blocks, leaves the online softmax's state.
// A tile of scores is [key / E][lane] with lane = (key % E)·rows + row, so that softmax_tile sees ordinary lanes; the E
// lanes of a row share one maximum.
#if defined(ONEPASS_CPU_DECODE_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_DECODE_ROWS_INL_H_
#undef ONEPASS_CPU_DECODE_ROWS_INL_H_
#else
#define ONEPASS_CPU_DECODE_ROWS_INL_H_
#endif

#include <limits>

#include "cpu/arena.h"
#include "cpu/cache_reader.h"
#include "cpu/cached_plan.h"
#include "cpu/decode-inl.h"
#include "cpu/decode_bytes-inl.h"
#include "cpu/dropout-inl.h"
#include "cpu/softmax-inl.h"
#include "cpu/values-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
#if !HWY_HAVE_SCALABLE

// Rows of a tile: the fewest that hold `count`, of 1, L/4, L/2 and L.
inline std::int64_t tile_rows(std::int64_t count) {
  if (count == 1) return 1;
  return count <= kLanes / 4 ? kLanes / 4 : count <= kLanes / 2 ? kLanes / 2 : kLanes;
}

// How one of K and V is read.
struct StoredSide {
  std::int64_t dim;        // channels
  std::int64_t positions;  // floats of a row in a tile: dim, rounded up to vectors
  bool natural;            // converted in channel order; else in the order of Unpack
  bool group_scales;       // applied while converting
  bool bytes = false;      // in the order of ByteProducts

  template <class T>
  static StoredSide of(const KVStorage& cache, std::int64_t dim) {
    const bool groups = cache.granularity == ScaleGranularity::kGroup;
    const bool natural = groups || !Unpack<T>::kFast || dim % chunk_elements<T>() != 0;
    return {dim, padded(dim), natural, groups};
  }
  // Whether rows are converted in the order of Unpack.
  bool unpacked() const { return !natural && !bytes; }
};

// What a task keeps. Floats unless said.
struct DecodeState {
  float* q;             // [positions of K / E][lane]
  float* scores;        // [kDecodeKeys / E][lane], for all blocks of the task when weights are dropped
  float* out;           // [row][positions of V], not yet divided by the sum
  float* maximum;       // [lane]
  float* sum;           // [lane]
  float* rescale;       // [lane]
  float* tile_maximum;  // [lane]
  float* k_converted;   // [key][kConvertedStride]
  float* v_converted;
  float* k_scales;  // [key], and one vector past the end
  float* v_scales;
  float* staging;       // [positions]
  float* row_terms;     // [kDecodeKeys]
  std::int32_t* begin;  // [lane]: visible keys, as in Lanes
  std::int32_t* end;
  std::int32_t* center;
  float* slope;
  const void** k_rows;  // [key] of this block, then of the next
  const void** v_rows;
  std::int32_t* keys;      // [key]: those whose values count
  std::int32_t* all_keys;  // 0, 1, …
  ByteState bytes;

  // max_keys: of any task, when weights are dropped; else 0.
  void take(Arena& arena, const CachedProblem& problem, std::int64_t max_keys) {
    const KVStorage& cache = problem.cache;
    const std::int64_t k_positions = padded(cache.head_dim), v_positions = padded(cache.head_dim_v);
    const std::int64_t blocks = std::max<std::int64_t>(1, max_keys / kDecodeKeys + 2);
    q = arena.take<float>(k_positions * kLanes);
    scores = arena.take<float>(blocks * kDecodeKeys * kLanes);
    out = arena.take<float>(v_positions * kLanes);
    for (float** lane : {&maximum, &sum, &rescale, &tile_maximum, &slope}) *lane = arena.take<float>(kLanes);
    for (std::int32_t** lane : {&begin, &end, &center}) *lane = arena.take<std::int32_t>(kLanes);
    k_converted = arena.take<float>(kConvertedKeys * kConvertedStride);
    v_converted = arena.take<float>(kConvertedValues * kConvertedStride);
    k_scales = arena.take<float>(kDecodeKeys + kLanes);
    v_scales = arena.take<float>(kDecodeKeys + kLanes);
    staging = arena.take<float>(std::max(k_positions, v_positions));
    row_terms = arena.take<float>(kDecodeKeys);
    k_rows = arena.take<const void*>(2 * kDecodeKeys);
    v_rows = arena.take<const void*>(2 * kDecodeKeys);
    keys = arena.take<std::int32_t>(kDecodeKeys);
    all_keys = arena.take<std::int32_t>(kDecodeKeys);
    if (kHasByteDot && cache.dtype == DType::kInt8) bytes.take(arena, cache.head_dim, cache.head_dim_v);
  }
};

// `T` stored element, `kRows` rows of the tile.
template <class T, int kRows>
class DecodeTask {
  static constexpr std::int64_t kPartials = kLanes / kRows;           // E
  static constexpr std::int64_t kTileKeys = kDecodeKeys / kPartials;  // vectors of a tile
  static constexpr std::int64_t kTileSize = kDecodeKeys * kRows;
  static constexpr std::int64_t kLineElements = 64 / sizeof(T);
  static constexpr bool kBytes = kHasByteDot && std::is_same_v<T, std::int8_t> && kRows > 1;

 public:
  DecodeTask(const CachedProblem& problem, const Problem& queries, const ScoreTerms& terms, const CachedTask& task,
             DecodeState& state)
      : problem_(problem),
        queries_(queries),
        terms_(terms),
        task_(task),
        s_(state),
        rows_(row_set(problem, task.batch, task.head_kv)),
        reader_(problem.cache, task.batch, task.head_kv),
        k_(StoredSide::of<T>(problem.cache, problem.cache.head_dim)),
        v_(StoredSide::of<T>(problem.cache, problem.cache.head_dim_v)) {}

  void run() {
    pack_queries();
    if constexpr (kBytes) use_bytes();
    set_lanes();
    for (std::int64_t i = 0; i < kDecodeKeys; ++i) s_.all_keys[i] = static_cast<std::int32_t>(i);
    std::fill_n(s_.out, kRows * v_.positions, 0.0f);
    std::fill_n(s_.maximum, kLanes, -kInfinity);
    std::fill_n(s_.sum, kLanes, 0.0f);
    if (problem_.prob_threshold > 0) {
      run_dropping();
    } else {
      for_each_block(/*with_k=*/true, /*with_v=*/true, [&](const Block& block) {
        score(block, s_.scores);
        softmax(block, s_.scores);
        if (problem_.attention.dropout_p > 0) drop(block.keys.first, s_.scores);
        list_all(block);
        add_values(block, s_.scores);
      });
    }
    for (std::int64_t r = 0; r < kRows; ++r) {  // the row's lanes hold parts of its sum
      for (std::int64_t e = 1; e < kPartials; ++e) s_.sum[r] += s_.sum[e * kRows + r];
    }
  }

  // Row r of the result in channel order, times `factor`.
  void read_row(std::int64_t r, float factor, float* dst) const {
    const float* row = s_.out + r * v_.positions;
    if (v_.unpacked()) factor *= Unpack<T>::kFactor;
    for (std::int64_t p = 0; p < v_.positions; ++p) {
      if (const std::int64_t d = channel(v_, p); d < v_.dim) dst[d] = row[p] * factor;
    }
  }

 private:
  struct Block {
    typename CacheReader<T>::Block keys;
    const T* const* k;
    const T* const* k_next;
    const T* const* v;
    const T* const* v_next;
    std::int64_t count() const { return keys.end - keys.begin; }
  };

  static std::int64_t channel(const StoredSide& side, std::int64_t position) {
    if (side.natural) return position;
    if (side.bytes) return position / kByteChunk * kByteChunk + byte_channel(position % kByteChunk);
    const std::int64_t chunk = chunk_elements<T>();
    return position / chunk * chunk + Unpack<T>::channel(position % chunk);
  }

  // Rows past the task's repeat its last one.
  std::int64_t row_of(std::int64_t r) const { return task_.first_row + std::min(r, task_.rows - 1); }

  void pack_queries() {
    const float factor = k_.natural ? 1.0f : Unpack<T>::kFactor;
    for (std::int64_t r = 0; r < kRows; ++r) {
      load_query(r);
      for (std::int64_t p = 0; p < k_.positions; ++p) {
        const std::int64_t d = channel(k_, p);
        s_.q[p / kPartials * kLanes + r * kPartials + p % kPartials] = d < k_.dim ? s_.staging[d] * factor : 0.0f;
      }
    }
  }

  void load_query(std::int64_t r) {
    const std::int64_t row = row_of(r);
    with_float_type(queries_.dtype, [&]<class Q>(Q) {
      if constexpr (!std::is_same_v<Q, double>) {
        convert_row(queries_.q.row<Q>(rows_.batch, rows_.head_of(row), rows_.token_of(row)), k_.dim, s_.staging);
      }
    });
    for (std::int64_t d = 0; d < k_.dim; ++d) s_.staging[d] *= terms_.query_factor;
  }

  // Integer products, when nothing in the problem or the queries is against them.
  void use_bytes() {
    const bool whole = k_.dim % kByteChunk == 0 && v_.dim % kByteChunk == 0;
    if (!has_byte_dot() || !whole || k_.group_scales || problem_.prob_threshold > 0) return;
    ByteProducts<kRows> products = byte_products();
    for (std::int64_t r = 0; r < kRows; ++r) {
      load_query(r);
      if (!products.pack_query(r, s_.staging)) return;
    }
    k_.bytes = v_.bytes = true;
  }
  ByteProducts<kRows> byte_products() const { return {s_.bytes, k_.dim, v_.dim}; }

  void set_lanes() {
    min_end_ = INT64_MAX;
    max_begin_ = 0;
    const std::int64_t length = rows_.sequence.seqlen_k;
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const std::int64_t row = row_of(lane % kRows), query = rows_.query_of(row);
      const KeyRange seen = visible_keys(problem_.attention, rows_.sequence, query);
      const std::int64_t begin = std::clamp<std::int64_t>(seen.begin, task_.begin, length);
      const std::int64_t end = std::clamp<std::int64_t>(seen.end, begin, std::max(begin, task_.end));
      s_.begin[lane] = static_cast<std::int32_t>(begin);
      s_.end[lane] = static_cast<std::int32_t>(end);
      max_begin_ = std::max(max_begin_, begin);
      min_end_ = std::min(min_end_, end);
      s_.center[lane] = static_cast<std::int32_t>(query + rows_.sequence.diagonal);
      s_.slope[lane] = terms_.alibi
                           ? problem_.attention
                                 .alibi_slopes[rows_.batch * problem_.attention.alibi_batch_stride + rows_.head_of(row)]
                           : 0.0f;
    }
  }

  bool sees_all(std::int64_t first, std::int64_t count) const {
    return first >= max_begin_ && first + count <= min_end_;
  }

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

  // The listed rows of a block as floats in the side's order, one behind the other.
  void convert(const StoredSide& side, const CacheScale& scale, const Block& block, const T* const* rows,
               const std::int32_t* list, std::int64_t count, float* dst) {
    if constexpr (Unpack<T>::kFast) {
      if (side.unpacked() && !has_nan<T>(rows, list, count, side.dim)) {
        return convert_block<T>(rows, list, count, side.dim, dst);
      }
    }
    for (std::int64_t n = 0; n < count; ++n) {
      const std::int64_t i = list[n];
      float* const to = dst + n * kConvertedStride;
      if (side.natural) {
        // A key that does not exist stands for its nearest, as its row does.
        const std::int64_t key = std::clamp(block.keys.first + i, block.keys.begin, block.keys.end - 1);
        const float* groups = side.group_scales ? reader_.group_scales(scale, key) : nullptr;
        dequantize_row(rows[i], side.dim, groups, problem_.cache.group_channels, to);
        std::fill(to + side.dim, to + side.positions, 0.0f);
      } else {
        for (std::int64_t p = 0; p < side.positions; ++p) {
          to[p] = to_float(rows[i][channel(side, p)]) * (1.0f / Unpack<T>::kFactor);
        }
      }
    }
  }

  LineFetcher lines_of(const StoredSide& side, const T* const* rows) const {
    return {reinterpret_cast<const void* const*>(rows), side.positions * static_cast<std::int64_t>(sizeof(T))};
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
      if (!k_.natural && !has_nan<T>(block.k, s_.all_keys, kDecodeKeys, k_.dim)) {
        return score_one_row<T>(block.k, block.k_next, kDecodeKeys, s_.q, k_.dim, scores);
      }
    }
    for (std::int64_t first = 0; first < kDecodeKeys; first += kConvertedKeys) {
      convert(k_, problem_.cache.k_scale, block, block.k, s_.all_keys + first, kConvertedKeys, s_.k_converted);
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

  // Logits of a block (products, when there are no terms), −inf where a lane does not see the key; s_.tile_maximum.
  void score(const Block& block, float* scores) {
    const CacheScale& scale = problem_.cache.k_scale;
    multiply_keys_by_queries(block, scores);
    if (scale && !k_.group_scales) {
      reader_.scales(scale, block.keys, kDecodeKeys, s_.k_scales);
      multiply_keys(s_.k_scales, scores);
    }
    if (terms_.any()) scale_scores(ScoreTile{scores, kLanes, block.keys.first, kTileKeys}, terms_);
    if (terms_.alibi) add_distance(block.keys.first, scores);
    if (terms_.bias) add_bias(block, scores);
    mask_and_maximum(block.keys.first, scores);
  }

  // For each lane the key of its group: lane / kRows.
  static HWY_INLINE Ints lane_keys() {
    HWY_ALIGN std::int32_t keys[kLanes];
    for (std::int64_t lane = 0; lane < kLanes; ++lane) keys[lane] = static_cast<std::int32_t>(lane / kRows);
    return hn::Load(IntTag(), keys);
  }

  // tile[key][row] *= factors[key].
  static void multiply_keys(const float* factors, float* tile) {
    const FloatTag f;
    const auto spread = hn::IndicesFromVec(f, lane_keys());
    for (std::int64_t k = 0; k < kTileKeys; ++k) {
      const Floats factor = hn::TableLookupLanes(hn::LoadU(f, factors + k * kPartials), spread);
      hn::Store(hn::Mul(hn::Load(f, tile + k * kLanes), factor), f, tile + k * kLanes);
    }
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

  // tile[key][r] += the bias of row r. A row of a tile has no key of its own: its keys lie along memory.
  void add_bias(const Block& block, float* tile) {
    const Problem& problem = problem_.attention;
    const BiasOperand& bias = problem.bias;
    const std::int64_t skipped = block.keys.begin - block.keys.first;
    for (std::int64_t r = 0; r < kRows; ++r) {
      const std::int64_t row = row_of(r);
      const std::int64_t offset = rows_.batch * bias.batch_stride + rows_.head_of(row) * bias.head_stride +
                                  rows_.query_of(row) * bias.query_stride;
      with_float_type(bias.dtype, [&]<class B>(B) {
        if constexpr (!std::is_same_v<B, double>) {
          const auto* const of_row = static_cast<const std::byte*>(bias.data) + offset * sizeof(B);
          load_bias_row<B>(of_row, block.keys.begin, block.count(), bias.key_stride, s_.row_terms);
        }
      });
      float* const at = tile + skipped * kRows + r;
      for (std::int64_t i = 0; i < block.count(); ++i) at[i * kRows] += s_.row_terms[i];
    }
  }

  // Dropped weights become 0. A vector of counters holds kLanes draws of a row, four keys each.
  void drop(std::int64_t first, float* weights) {
    const WordTag w;
    const Problem& p = problem_.attention;
    const std::uint32_t threshold = dropout_threshold(p.dropout_p);
    const PhiloxKey key(p);
    for (std::int64_t r = 0; r < kRows; ++r) {
      const std::int64_t row = row_of(r);
      const auto query = static_cast<std::uint32_t>(rows_.query_of(row));
      const auto plane = static_cast<std::uint32_t>(rows_.batch * p.num_heads + rows_.head_of(row));
      for (std::int64_t quad = 0; quad < kDecodeKeys / 4; quad += kLanes) {
        Words words[4] = {hn::Iota(w, static_cast<std::uint32_t>(first / 4 + quad)), hn::Set(w, query),
                          hn::Set(w, plane), hn::Set(w, static_cast<std::uint32_t>(p.dropout_offset))};
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

  void mask_and_maximum(std::int64_t first, float* scores) {
    const FloatTag f;
    if (!sees_all(first, kDecodeKeys)) mask(first, -kInfinity, scores);
    Floats largest = hn::Set(f, -kInfinity);
    for (std::int64_t k = 0; k < kTileKeys; ++k) largest = hn::Max(hn::Load(f, scores + k * kLanes), largest);
    hn::Store(largest, f, s_.tile_maximum);
    for (std::int64_t r = 0; r < kRows; ++r) {
      float row = -kInfinity;
      for (std::int64_t e = 0; e < kPartials; ++e) row = std::max(row, s_.tile_maximum[e * kRows + r]);
      for (std::int64_t e = 0; e < kPartials; ++e) s_.tile_maximum[e * kRows + r] = row;
    }
  }

  // Scores → weights; earlier outputs are brought to the new maximum.
  void softmax(const Block& block, float* scores) {
    const FloatTag f;
    softmax_tile(ScoreTile{scores, kLanes, block.keys.first, kTileKeys}, terms_.unit(), s_.tile_maximum, s_.maximum,
                 s_.sum, s_.rescale);
    for (std::int64_t r = 0; r < kRows; ++r) {
      if (s_.rescale[r] == 1.0f) continue;
      const Floats factor = hn::Set(f, s_.rescale[r]);
      float* const row = s_.out + r * v_.positions;
      for (std::int64_t p = 0; p < v_.positions; p += kLanes)
        hn::Store(hn::Mul(hn::Load(f, row + p), factor), f, row + p);
    }
  }

  void list_all(const Block& block) {
    count_ = block.count();
    for (std::int64_t i = 0; i < count_; ++i) {
      s_.keys[i] = static_cast<std::int32_t>(block.keys.begin - block.keys.first + i);
    }
  }

  // Adds the values of the listed keys.
  void add_values(const Block& block, float* weights) {
    const CacheScale& scale = problem_.cache.v_scale;
    const bool hidden = !sees_all(block.keys.begin, block.count());
    if (scale && !v_.group_scales) {
      reader_.scales(scale, block.keys, kDecodeKeys, s_.v_scales);
      multiply_keys(s_.v_scales, weights);
      if (hidden) mask(block.keys.first, 0.0f, weights);  // 0·NaN
    }
    LineFetcher ahead = lines_of(v_, block.v_next);
    if constexpr (kBytes) {
      if (v_.bytes && byte_products().pack_weights(weights)) {
        return byte_products().add_values(block.v, s_.out, ahead);
      }
    }
    bool converted = true;
    if constexpr (kReadsStorage<T, kRows>) {
      converted = !v_.unpacked() || hidden || has_nan<T>(block.v, s_.keys, count_, v_.dim);
      if (!converted) {
        add_values_of<T, T, kRows>(block.v, s_.keys, count_, weights, v_.dim, s_.out, v_.positions, ahead);
      }
    }
    for (std::int64_t first = 0; converted && first < count_; first += kConvertedValues) {
      const std::int32_t* const list = s_.keys + first;
      const std::int64_t count = std::min(kConvertedValues, count_ - first);
      convert(v_, scale, block, block.v, list, count, s_.v_converted);
      if (hidden) take_out_not_finite(block, list, count, weights);
      const float* rows[kDecodeKeys];
      for (std::int64_t n = 0; n < count; ++n) rows[list[n]] = s_.v_converted + n * kConvertedStride;
      add_values_of<T, float, kRows>(rows, list, count, weights, v_.positions, s_.out, v_.positions, ahead);
    }
  }

  // A hidden weight is 0, but 0·NaN is NaN: values that are not finite are replaced by 0 and given to the rows that see
  // them.
  void take_out_not_finite(const Block& block, const std::int32_t* list, std::int64_t count, const float* weights) {
    for (std::int64_t n = 0; n < count; ++n) {
      const std::int64_t i = list[n], key = block.keys.first + i;
      float* const row = s_.v_converted + n * kConvertedStride;
      if (all_finite(Broadcast{row, 0}, 1, v_.positions)) continue;
      for (std::int64_t p = 0; p < v_.positions; ++p) {
        if (std::isfinite(row[p])) continue;
        for (std::int64_t r = 0; r < kRows; ++r) {
          if (key < s_.begin[r] || key >= s_.end[r]) continue;
          s_.out[r * v_.positions + p] += weights[i * kRows + r] * row[p];
        }
        row[p] = 0.0f;
      }
    }
  }

  // First all scores, so that the rows' largest are known; then only the values whose weight is above the threshold.
  void run_dropping() {
    std::int64_t tile = 0;
    for_each_block(true, false, [&](const Block& block) {
      score(block, s_.scores + tile);
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        s_.maximum[lane] = std::max(s_.maximum[lane], s_.tile_maximum[lane]);
      }
      tile += kTileSize;
    });
    std::copy_n(s_.maximum, kLanes, s_.tile_maximum);
    tile = 0;
    for_each_block(false, true, [&](const Block& block) {
      softmax(block, s_.scores + tile);
      keep_large(block, s_.scores + tile);
      for (std::int64_t n = 0; n < count_; ++n) fetch_value(block.v[s_.keys[n]]);
      Block alone = block;  // the next block's rows may not be needed
      alone.v_next = block.v;
      if (count_ > 0) add_values(alone, s_.scores + tile);
      tile += kTileSize;
    });
  }

  void fetch_value(const T* row) const {
    for (std::int64_t d = 0; d < v_.dim; d += kLineElements) fetch_ahead(row + d);
  }

  void keep_large(const Block& block, float* weights) {
    const FloatTag f;
    const Floats threshold = hn::Set(f, static_cast<float>(problem_.prob_threshold));
    count_ = 0;
    for (std::int64_t k = 0; k < kTileKeys; ++k) {
      const Floats w = hn::Load(f, weights + k * kLanes);
      const auto small = hn::Le(w, threshold);  // NaN is kept
      if (hn::AllTrue(f, small)) continue;
      hn::Store(hn::IfThenZeroElse(small, w), f, weights + k * kLanes);
      for (std::int64_t e = 0; e < kPartials; ++e) {
        const std::int64_t i = k * kPartials + e, key = block.keys.first + i;
        const float* row = weights + i * kRows;
        if (key < block.keys.begin || key >= block.keys.end) continue;
        if (std::any_of(row, row + kRows, [](float x) { return x != 0.0f; })) {
          s_.keys[count_++] = static_cast<std::int32_t>(i);
        }
      }
    }
  }

  const CachedProblem& problem_;
  const Problem& queries_;  // where the rows of q are: their dtype may differ from the problem's
  const ScoreTerms& terms_;
  const CachedTask& task_;
  DecodeState& s_;
  RowSet rows_;
  CacheReader<T> reader_;
  StoredSide k_, v_;
  std::int64_t max_begin_ = 0, min_end_ = 0;
  std::int64_t count_ = 0;  // of s_.keys
};

#endif  // !HWY_HAVE_SCALABLE
}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
