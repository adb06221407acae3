// cpu/backward_task.h: the piece of work that the schedule hands to the kernels, and the memory that it needs.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "cpu/arena.h"
#include "cpu/backward_layout.h"
#include "cpu/lanes.h"

namespace onepass::cpu {

// Queries [query_begin, query_end) of one head × keys [key_begin, key_end) of its key head, all within one sequence.
// Begins are multiples of kPanel and kBlock. Sums over tasks are held in float32 and rounded by the last of them, so
// that any partition into tasks gives the same bits as long as their order is kept.
struct BackwardTask {
  std::int64_t batch = 0, head = 0;
  Sequence sequence;
  std::int64_t query_begin = 0, query_end = 0, key_begin = 0, key_end = 0;
  bool first_queries = true, last_queries = true;  // of all that these keys meet: clear, write dk and dv
  bool first_keys = true, last_keys = true;        // of all that these queries meet: clear, write dq
  std::int64_t part = 0;                           // of the problem: the near and the far pair of piecewise attention
  bool first_part = true, last_part = true;        // of those that add to dv: with first/last_queries, clear, write it
  float* dk = nullptr;                             // (seqlen_k, sum_stride(head_dim)): the sums of the key head
  float* dv = nullptr;                             // (seqlen_k, sum_stride(head_dim_v))
  float* dq = nullptr;  // panels of (sum_stride(head_dim), kPanel) from query 0; null when first_keys and last_keys
};

inline constexpr std::int64_t sum_stride(std::int64_t dim) { return round_up(dim, 16); }

// Scratch of one worker.
struct BackwardScratch {
  static constexpr std::int64_t kMaxPanels = 4;

  // Panels that share a block of keys: 256 rows of head dim 64 keep about 350 KB hot.
  static constexpr std::int64_t panels(std::int64_t head_dim, std::int64_t head_dim_v) {
    return std::clamp<std::int64_t>(512 / (head_dim + head_dim_v), 1, kMaxPanels);
  }

  struct Panel {
    float *q_lanes, *dout_lanes, *q_rows, *dout_rows, *dq, *lse, *delta;
    Lanes lanes = {};
  } panel[kMaxPanels];
  float *k, *v;                                   // (kBlock, row_stride(dim))
  float *weights, *kept, *slopes, *bias_staging;  // tiles, see TileMemory
  float* staging;                                 // (16, dim) of a transposition
  float* scale;                                   // (kPanel), all softmax_scale

  BackwardScratch(const Problem& problem, Arena& arena) {
    const std::int64_t dim = sum_stride(problem.head_dim), dim_v = sum_stride(problem.head_dim_v);
    for (std::int64_t i = 0; i < panels(problem.head_dim, problem.head_dim_v); ++i) {
      panel[i] = {.q_lanes = arena.take<float>(std::max(dim, dim_v) * kPanel),
                  .dout_lanes = arena.take<float>(dim_v * kPanel),
                  .q_rows = arena.take<float>(strips_size(std::max(dim, dim_v))),
                  .dout_rows = arena.take<float>(strips_size(dim_v)),
                  .dq = arena.take<float>(dim * kPanel),
                  .lse = arena.take<float>(kPanel),
                  .delta = arena.take<float>(kPanel)};
      panel[i].lanes.take(arena, problem, kPanel);
    }
    k = arena.take<float>(kBlock * row_stride(dim));
    v = arena.take<float>(kBlock * row_stride(dim_v));
    weights = arena.take<float>(kBlock * kPanel);
    kept = problem.dropout_p > 0 ? arena.take<float>((4 + kBlock) * kPanel) + 4 * kPanel : nullptr;
    slopes = problem.softcap > 0 ? arena.take<float>(kBlock * kPanel) : nullptr;
    bias_staging = problem.bias ? arena.take<float>(16 * kBlock + 16 * 16) : nullptr;
    staging = arena.take<float>(16 * dim);
    scale = arena.take<float>(kPanel);
  }

  static std::size_t bytes(const Problem& problem) {
    Arena measure;
    BackwardScratch(problem, measure);
    return measure.used();
  }
};

}  // namespace onepass::cpu
