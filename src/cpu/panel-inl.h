// cpu/panel-inl.h: a panel is up to kMaxVectors vectors of query rows along lanes; a key block is what panels share.
#if defined(ONEPASS_CPU_PANEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ONEPASS_CPU_PANEL_INL_H_
#undef ONEPASS_CPU_PANEL_INL_H_
#else
#define ONEPASS_CPU_PANEL_INL_H_
#endif

#include <limits>

#include "cpu/lanes.h"
#include "cpu/tile-inl.h"
#include "cpu/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {

// Keys of a block: a multiple of every tile's rows. 96·64 weights are 24 KB, which stay in L1 through the second
// product. Blocks begin at multiples of it in the sequence, so that a row's order of sums depends on nothing else.
inline constexpr std::int64_t kBlockKeys = 96;

// Rows of the widest panel.
HWY_INLINE std::int64_t panel_width() { return kMaxVectors * lane_count(); }

// Sizes that scratch is laid out for.
struct PanelShape {
  std::int64_t width;   // lanes of a panel, at most
  std::int64_t panels;  // of a block, at most
  std::int64_t keys;    // of a block, at most
  std::int64_t dim, dim_v;
};

// Query rows with what their online softmax carries from key block to key block.
struct Panel {
  Lanes lanes;
  std::int64_t width = 0;
  float* q = nullptr;        // [dim][width]
  float* out = nullptr;      // [dim_v][width], not yet divided by `sum`
  float* maximum = nullptr;  // [width]
  float* sum = nullptr;      // [width]

  void take(Arena& arena, const Problem& problem, const PanelShape& shape) {
    take_queries(arena, problem, shape);
    out = arena.take<float>(padded(shape.dim_v) * shape.width);
    maximum = arena.take<float>(shape.width);
    sum = arena.take<float>(shape.width);
  }

  // Lanes and queries alone: the softmax state is another panel's.
  void take_queries(Arena& arena, const Problem& problem, const PanelShape& shape) {
    lanes.take(arena, problem, shape.width);
    q = arena.take<float>(padded(shape.dim) * shape.width);
  }

  // Takes rows [first, first + count) and packs their queries; staging: lane_count()² floats.
  template <class T>
  void load(const Problem& problem, const RowSet& rows, std::int64_t first, std::int64_t count, float query_factor,
            float* staging) {
    width = padded(count);
    lanes.set(problem, rows, first, count, width);
    const auto row_of = [&](std::int64_t lane) {
      return problem.q.row<T>(rows.batch, rows.head_of(first + lane), rows.token_of(first + lane));
    };
    pack_panel<T>(row_of, count, problem.head_dim, q, width, staging);
    if (query_factor != 1.0f) {
      for (std::int64_t i = 0; i < problem.head_dim * width; ++i) q[i] *= query_factor;
    }
  }

  void clear(std::int64_t dim_v) {
    std::fill_n(out, padded(dim_v) * width, 0.0f);
    std::fill_n(maximum, width, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, width, 0.0f);
  }
};

// Keys [first, first + count) of the sequence and their rows as floats.
struct KeyBlock {
  std::int64_t first = 0, count = 0;
  Broadcast k = {}, v = {};
  float* k_floats = nullptr;  // null: read in place
  float* v_floats = nullptr;

  // No power-of-two row stride: rows would share L1 sets.
  static std::int64_t row_stride(std::int64_t dim) { return padded(dim) + 16; }

  void take_keys(Arena& arena, const Problem& problem, const PanelShape& shape) {
    if (copies(problem, problem.k, shape)) k_floats = arena.take<float>(shape.keys * row_stride(shape.dim));
  }
  void take_values(Arena& arena, const Problem& problem, const PanelShape& shape) {
    if (copies(problem, problem.v, shape)) v_floats = arena.take<float>(shape.keys * row_stride(shape.dim_v));
  }

  template <class T>
  void fetch_values(const Problem& problem, const RowSet& rows, std::int64_t first_key, std::int64_t keys) {
    v = as_floats<T>(problem.v, rows, first_key, keys, problem.head_dim_v, v_floats);
  }

  template <class T>
  void fetch_keys(const Problem& problem, const RowSet& rows, std::int64_t first_key, std::int64_t keys) {
    first = first_key;
    count = keys;
    k = as_floats<T>(problem.k, rows, first_key, keys, problem.head_dim, k_floats);
  }

 private:
  // Floats are read in place, unless the rows of a block would share the same L1 sets (4 KB apart, as in a
  // (batch, seqlen, heads, dim) tensor) and enough panels share the copy.
  static bool copies(const Problem& problem, const Operand& operand, const PanelShape& shape) {
    return problem.dtype != DType::kFloat32 || (shape.panels >= 4 && operand.token_stride % 1024 == 0);
  }

  template <class T>
  static Broadcast as_floats(const Operand& operand, const RowSet& rows, std::int64_t first_key, std::int64_t keys,
                             std::int64_t dim, float* converted) {
    const T* const source = operand.row<T>(rows.batch, rows.head_kv, rows.sequence.key_start + first_key);
    if constexpr (std::is_same_v<T, float>) {
      if (converted == nullptr) return {source, operand.token_stride};
    }
    convert_rows(source, operand.token_stride, keys, dim, converted, row_stride(dim));
    return {converted, row_stride(dim)};
  }
};

// The keys of a block that some lane of a panel sees; begins at a multiple of 4 (dropout draws four keys at once).
struct KeySpan {
  std::int64_t first, count;
};
inline KeySpan seen_span(const Lanes& lanes, std::int64_t first_key, std::int64_t keys) {
  const std::int64_t begin = std::max(first_key, lanes.min_begin / 4 * 4);
  return {begin, std::max<std::int64_t>(0, std::min(first_key + keys, lanes.max_end) - begin)};
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
