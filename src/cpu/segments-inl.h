// cpu/segments-inl.h: the products of a tile that a panel sees in part, without the vectors of lanes that see nothing.
#if defined(ONEPASS_CPU_SEGMENTS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_SEGMENTS_INL_H_
#undef ONEPASS_CPU_SEGMENTS_INL_H_
#else
#define ONEPASS_CPU_SEGMENTS_INL_H_
#endif

#include "cpu/panel-inl.h"
#include "cpu/score-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

// Keys of a tile that the vectors [first_vector, last_vector) of a panel see; no other vector sees any of them.
struct Segment {
  std::int64_t first_key, keys;
  int first_vector, last_vector;
};

// Cuts a tile that the panel sees in part, so that the products leave out vectors above a causal edge or past a window.
// Lanes are in the order of their positions: both ends of what they see grow with the lane.
struct Segments {
  static constexpr std::int64_t kMinKeys = 12;  // fewer keys do not fill a register tile
  static constexpr int kMost = static_cast<int>(kBlockKeys / kMinKeys) + 1;
  Segment items[kMost];
  int count = 0;

  Segments(const Lanes& lanes, std::int64_t width, std::int64_t first_key, std::int64_t keys) {
    const int vectors = static_cast<int>(width / lane_count());
    if (lanes.sees_all(first_key, keys)) {
      items[count++] = {first_key, keys, 0, vectors};
      return;
    }
    const auto begin_of = [&](int v) { return std::int64_t{lanes.begin[v * lane_count()]}; };
    const auto end_of = [&](int v) { return std::int64_t{lanes.end[(v + 1) * lane_count() - 1]}; };
    const std::int64_t end_key = first_key + keys;
    for (std::int64_t key = first_key; key < end_key;) {
      int first = 0;
      while (first < vectors - 1 && end_of(first) <= key) ++first;
      int next = first + 1;
      while (next < vectors && begin_of(next) <= key) ++next;
      // Up to where the first vector leaves or another one enters.
      std::int64_t cut = next < vectors ? std::min(end_of(first), begin_of(next)) : end_of(first);
      cut = std::max(cut, key + kMinKeys);
      if (cut + kMinKeys > end_key) cut = end_key;
      while (next < vectors && begin_of(next) < cut) ++next;
      items[count++] = {key, cut - key, first, next};
      key = cut;
    }
  }
};

// Sᵀ = K·Qᵀ with its column maxima. Scores outside of the segments, all hidden, are left as they are.
inline void multiply_segments(Broadcast k, const float* q, const ScoreTile& tile, const Segments& segments,
                              std::int64_t dim, float* maximum) {
  for (int i = 0; i < segments.count; ++i) {
    const Segment& s = segments.items[i];
    const std::int64_t row = s.first_key - tile.first_key, column = s.first_vector * lane_count();
    with_vectors(s.last_vector - s.first_vector, [&](auto count) {
      multiply_scores<decltype(count)::value>(Broadcast{k.data + row * k.stride, k.stride}, q + column, tile.width,
                                              s.keys, dim, tile.scores + row * tile.width + column, maximum + column);
    });
  }
}

// out = out·rescale + Vᵀ·Pᵀ, segment by segment. `rescale` is used up: 1 for the vectors that have had theirs.
inline void multiply_segments(Broadcast v, const ScoreTile& weights, const Segments& segments, std::int64_t dim,
                              float* out, float* rescale) {
  for (int i = 0; i < segments.count; ++i) {
    const Segment& s = segments.items[i];
    const std::int64_t row = s.first_key - weights.first_key, column = s.first_vector * lane_count();
    const std::int64_t vectors = s.last_vector - s.first_vector;
    with_vectors(vectors, [&](auto count) {
      multiply_values<decltype(count)::value>(Broadcast{v.data + row * v.stride, v.stride},
                                              weights.scores + row * weights.width + column, weights.width, s.keys, dim,
                                              out + column, rescale + column);
    });
    std::fill_n(rescale + column, vectors * lane_count(), 1.0f);
  }
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
