// cpu/backward_kernels.cpp: one task of the backward pass: panels of queries packed once, then every visible block of
// keys converted once and met by all of them.
#include "cpu/backward_kernels.h"

#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward_kernels.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "cpu/backward_block-inl.h"
#include "cpu/backward_pack-inl.h"
#include "cpu/isa.h"
#include "cpu/transpose-inl.h"

HWY_BEFORE_NAMESPACE();
namespace onepass::cpu::HWY_NAMESPACE {
namespace {

template <class T>
class Rectangle {
 public:
  Rectangle(const BackwardProblem& problem, const BackwardTask& task, void* scratch)
      : problem_(problem), f_(problem.forward), task_(task), arena_(scratch), scratch_(f_, arena_), terms_(f_) {
    std::fill_n(scratch_.scale, kPanel, f_.softmax_scale);
  }

  void run() {
    if (task_.first_queries) clear_key_sums();
    const std::int64_t step = BackwardScratch::panels(f_.head_dim, f_.head_dim_v) * kPanel;
    for (std::int64_t query = task_.query_begin; query < task_.query_end; query += step) {
      meet_keys(query, std::min(query + step, task_.query_end));
    }
    if (task_.last_queries) write_key_sums();
  }

 private:
  std::int64_t head_kv() const { return task_.head / f_.group_size(); }
  T* query_row(const Operand& operand, std::int64_t i) const {
    return operand.row<T>(task_.batch, task_.head, task_.sequence.query_start + i);
  }
  T* key_row(const Operand& operand, std::int64_t j) const {
    return operand.row<T>(task_.batch, head_kv(), task_.sequence.key_start + j);
  }

  void clear_key_sums() {
    const std::int64_t dk = sum_stride(f_.head_dim), dv = sum_stride(f_.head_dim_v);
    std::fill(task_.dk + task_.key_begin * dk, task_.dk + task_.key_end * dk, 0.0f);
    if (task_.first_part) std::fill(task_.dv + task_.key_begin * dv, task_.dv + task_.key_end * dv, 0.0f);
  }

  void write_key_sums() {
    const std::int64_t dk_stride = sum_stride(f_.head_dim), dv_stride = sum_stride(f_.head_dim_v);
    const float survival = static_cast<float>(1.0 / (1.0 - f_.dropout_p));
    for (std::int64_t j = task_.key_begin; j < task_.key_end; ++j) {
      write_row(task_.dk + j * dk_stride, dk_stride, f_.softmax_scale, f_.head_dim, key_row(problem_.dk, j));
      if (!task_.last_part) continue;
      write_row(task_.dv + j * dv_stride, dv_stride, survival, f_.head_dim_v, key_row(problem_.dv, j));
    }
  }

  static void write_row(float* sums, std::int64_t size, float factor, std::int64_t dim, T* row) {
    const Floats factors = hn::Set(FloatTag(), factor);
    for (std::int64_t d = 0; d < size; d += lane_count())
      store_floats(hn::Mul(load_floats(sums + d), factors), sums + d);
    store_row(sums, dim, row);
  }

  float lse(std::int64_t i) const { return f_.lse.at<float>(task_.batch, task_.head, task_.sequence.query_start + i); }

  void load_queries(const Operand& operand, const QueryPanel& panel, std::int64_t dim, float* rows) const {
    load_strips(
        query_row(operand, panel.first), operand.token_stride, panel.count, dim,
        [&](std::int64_t i) { return lse(panel.first + i) == -kInfinity; }, rows);
  }

  QueryPanel start_panel(std::int64_t query, std::int64_t count, const BackwardScratch::Panel& memory) {
    QueryPanel panel{.first = query,
                     .count = count,
                     .width = padded(count),
                     .lanes = memory.lanes,
                     .q_lanes = memory.q_lanes,
                     .dout_lanes = memory.dout_lanes,
                     .q_rows = memory.q_rows,
                     .dout_rows = memory.dout_rows,
                     .dq = memory.dq,
                     .lse = memory.lse,
                     .delta = memory.delta};
    if (task_.dq != nullptr) panel.dq = task_.dq + query * sum_stride(f_.head_dim);
    if (task_.first_keys) std::fill_n(panel.dq, sum_stride(f_.head_dim) * kPanel, 0.0f);
    return panel;
  }

  void pack(QueryPanel& panel) {
    const std::int64_t query = panel.first, count = panel.count;
    for (std::int64_t i = 0; i < panel.width; ++i) {
      panel.lse[i] = i < count ? lse(query + i) : -kInfinity;
      if (panel.lse[i] == -kInfinity) panel.lse[i] = kInfinity;
    }
    panel.lanes.set(f_, {task_.batch, head_kv(), task_.head, 1, task_.sequence}, query, count, panel.width);

    load_queries(problem_.dout, panel, f_.head_dim_v, panel.dout_rows);
    strips_to_lanes(panel.dout_rows, panel.width, f_.head_dim_v, 1.0f, panel.dout_lanes);
    float* const out_rows = panel.q_rows;  // until q comes
    float* const out_lanes = panel.q_lanes;
    load_queries(f_.out, panel, f_.head_dim_v, out_rows);
    strips_to_lanes(out_rows, panel.width, f_.head_dim_v, 1.0f, out_lanes);
    lane_products(out_lanes, panel.dout_lanes, panel.width, f_.head_dim_v, panel.delta);

    load_queries(f_.q, panel, f_.head_dim, panel.q_rows);
    const float factor = terms_.any() ? terms_.query_factor : 1.0f;
    strips_to_lanes(panel.q_rows, panel.width, f_.head_dim, factor, panel.q_lanes);
    panel.finite =
        strips_finite(panel.q_rows, count, f_.head_dim) && strips_finite(panel.dout_rows, count, f_.head_dim_v);
  }

  KeyBlock load_block(std::int64_t begin, std::int64_t end) {
    const std::int64_t k_stride = row_stride(f_.head_dim), v_stride = row_stride(f_.head_dim_v);
    KeyBlock block{.first = begin,
                   .count = end - begin,
                   .k = {scratch_.k, k_stride},
                   .v = {scratch_.v, v_stride},
                   .dk = task_.dk + begin * sum_stride(f_.head_dim),
                   .dv = task_.dv + begin * sum_stride(f_.head_dim_v),
                   .dk_stride = sum_stride(f_.head_dim),
                   .dv_stride = sum_stride(f_.head_dim_v)};
    load_rows(key_row(f_.k, begin), f_.k.token_stride, block.count, f_.head_dim, scratch_.k, k_stride);
    load_rows(key_row(f_.v, begin), f_.v.token_stride, block.count, f_.head_dim_v, scratch_.v, v_stride);
    block.finite = all_finite(scratch_.k, k_stride, block.count, padded(f_.head_dim));
    return block;
  }

  // Keys of the task that queries [begin, end) see.
  KeyRange keys_of(std::int64_t begin, std::int64_t end) const {
    const KeyRange first = visible_keys(f_, task_.sequence, begin), last = visible_keys(f_, task_.sequence, end - 1);
    return {std::max(first.begin, task_.key_begin), std::min(last.end, task_.key_end)};
  }

  // Queries [begin, end), at most as many as the scratch has panels for, and all keys of the task.
  void meet_keys(std::int64_t begin, std::int64_t end) {
    QueryPanel panels[BackwardScratch::kMaxPanels];
    std::int64_t count = 0;
    const KeyRange keys = keys_of(begin, end);
    for (std::int64_t query = begin; query < end; query += kPanel, ++count) {
      panels[count] = start_panel(query, std::min(kPanel, end - query), scratch_.panel[count]);
      if (keys.begin < keys.end) pack(panels[count]);
    }
    const BiasGradient dbias(problem_.dbias, task_.batch, task_.head);
    const TileMemory memory{scratch_.weights, scratch_.kept, scratch_.slopes, scratch_.bias_staging};
    for (std::int64_t block_begin = keys.begin; block_begin < keys.end;) {
      const std::int64_t block_end = std::min(keys.end, block_begin / kBlock * kBlock + kBlock);
      const KeyBlock block = load_block(block_begin, block_end);
      for (std::int64_t p = 0; p < count; ++p) {
        const QueryPanel& panel = panels[p];
        const KeyRange seen = keys_of(panel.first, panel.first + panel.count);
        const KeyBlock part = block.part(seen.begin, seen.end);
        if (part.count <= 0) continue;
        backward_block(f_, terms_, band_of(f_, task_.sequence, panel, part), panel, part, dbias, memory);
      }
      block_begin = block_end;
    }
    for (std::int64_t p = 0; p < count && task_.last_keys; ++p) {
      unpack_panel<T>(
          panels[p].dq, kPanel, scratch_.scale, panels[p].count, f_.head_dim,
          [&](std::int64_t i) { return query_row(problem_.dq, panels[p].first + i); }, scratch_.staging);
    }
  }

  const BackwardProblem& problem_;
  const Problem& f_;
  const BackwardTask& task_;
  Arena arena_;
  BackwardScratch scratch_;
  ScoreTerms terms_;
};

template <class T>
void rectangle(const BackwardProblem& problem, const BackwardTask& task, void* scratch) {
  Rectangle<T>(problem, task, scratch).run();
}

template <class T>
float dot(const T* a, const T* b, std::int64_t count) {
  Floats sums = hn::Zero(FloatTag());
  std::int64_t d = 0;
  for (; d + lane_count() <= count; d += lane_count()) sums = hn::MulAdd(load_floats(a + d), load_floats(b + d), sums);
  float sum = hn::GetLane(hn::SumOfLanes(FloatTag(), sums));
  for (; d < count; ++d) sum += to_float(a[d]) * to_float(b[d]);
  return sum;
}

template <class T>
void sink_gradient(const BackwardProblem& problem, std::int64_t head) {
  const Problem& f = problem.forward;
  double sink = 0.0, sum = 0.0;
  with_float_type(f.sinks_dtype, [&]<class S>(S) { sink = to_float(static_cast<const S*>(f.sinks)[head]); });
  for (std::int64_t batch = 0; batch < f.batch; ++batch) {
    const Sequence sequence = sequence_of(f, batch);
    for (std::int64_t i = sequence.query_start; i < sequence.query_start + sequence.seqlen_q; ++i) {
      const float lse = f.lse.at<float>(batch, head, i);
      if (lse == -kInfinity) continue;
      const float delta = dot(problem.dout.row<T>(batch, head, i), f.out.row<T>(batch, head, i), f.head_dim_v);
      sum -= std::exp(sink - lse) * delta;
    }
  }
  static_cast<float*>(problem.dsinks)[head] = static_cast<float>(sum);
}

}  // namespace

BackwardKernels backward_kernels(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return {rectangle<Half>, sink_gradient<Half>};
    case DType::kBFloat16: return {rectangle<BFloat16>, sink_gradient<BFloat16>};
    default: return {rectangle<float>, sink_gradient<float>};
  }
}

}  // namespace onepass::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace onepass::cpu {

HWY_EXPORT(backward_kernels);

BackwardKernels backward_kernels(DType dtype) { return dispatch(HWY_DISPATCH_TABLE(backward_kernels))(dtype); }

}  // namespace onepass::cpu
#endif
