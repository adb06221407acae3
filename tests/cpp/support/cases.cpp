#include "support/cases.h"

#include <cstdint>
#include <cstdlib>
#include <ostream>
#include <sstream>

#include "core/backend.h"

namespace onepass::test {

const std::vector<Case>& feature_cases() {
  static const std::vector<Case> cases{
      {.name = "plain"},
      {.name = "causal", .causal = true},
      {.name = "causal_more_queries", .seqlen_q = 90, .seqlen_k = 70, .causal = true},
      {.name = "causal_top_left", .causal = true, .top_left = true},
      {.name = "causal_top_left_more_queries", .seqlen_q = 90, .seqlen_k = 70, .causal = true, .top_left = true},
      {.name = "window", .left = 17, .right = 5},
      {.name = "window_zero", .left = 0, .right = 0},
      {.name = "window_left_only", .left = 9},
      {.name = "window_right_only", .right = 3},
      {.name = "window_causal_long", .seqlen_q = 300, .seqlen_k = 300, .head_dim = 32, .causal = true, .left = 40},
      {.name = "window_top_left", .top_left = true, .left = 8, .right = 8},
      {.name = "key_bounds", .key_begin = {3, 0}, .key_end = {90, 66}},
      {.name = "key_bounds_causal", .causal = true, .key_begin = {75, 40}, .key_end = {89, 41}},
      {.name = "key_bounds_empty_sequence", .key_begin = {20, 0}, .key_end = {20, 90}},
      {.name = "key_bounds_out_of_range", .key_begin = {-5, 91}, .key_end = {1000, 90}},
      {.name = "scale", .scale = 0.5},
      {.name = "scale_zero", .scale = 0.0},
      {.name = "scale_negative", .scale = -0.25},
      {.name = "softcap", .softcap = 5.0, .magnitude = 2.0},
      {.name = "softcap_saturated", .softcap = 0.05, .magnitude = 3.0},
      {.name = "softcap_causal", .causal = true, .softcap = 20.0, .magnitude = 2.0},
      {.name = "alibi", .alibi = AlibiKind::kPerHead},
      {.name = "alibi_causal", .causal = true, .alibi = AlibiKind::kPerHead},
      {.name = "alibi_batch", .causal = true, .alibi = AlibiKind::kPerBatch},
      {.name = "alibi_zero_for_future", .alibi = AlibiKind::kZeroForFuture},
      {.name = "alibi_top_left", .top_left = true, .alibi = AlibiKind::kPerHead},
      {.name = "alibi_odd_heads", .num_heads = 6, .num_heads_kv = 3, .alibi = AlibiKind::kPerHead},
      {.name = "bias_full", .bias = "bhqk"},
      {.name = "bias_shared_by_batch", .bias = "hqk"},
      {.name = "bias_shared_by_heads", .bias = "bqk"},
      {.name = "bias_of_keys", .bias = "bk"},
      {.name = "bias_of_queries", .bias = "hq"},
      {.name = "bias_scalar", .bias = "1"},
      {.name = "bias_shared_by_all", .seqlen_q = 300, .seqlen_k = 520, .head_dim = 16, .causal = true, .bias = "qk"},
      {.name = "bias_float32", .bias = "hqk", .float32_extras = true},
      {.name = "bias_causal_softcap", .causal = true, .softcap = 10.0, .bias = "qk"},
      {.name = "sinks", .sinks = true},
      {.name = "sinks_float32_causal_window", .causal = true, .left = 20, .sinks = true, .float32_extras = true},
      {.name = "sinks_bias_alibi", .alibi = AlibiKind::kPerHead, .bias = "bhqk", .sinks = true},
      {.name = "dropout", .dropout = 0.3},
      {.name = "dropout_causal_bias", .causal = true, .bias = "hqk", .dropout = 0.1},
      {.name = "gqa_many", .num_heads = 8, .num_heads_kv = 1},
      {.name = "gqa_odd", .num_heads = 9, .num_heads_kv = 3, .causal = true},
      {.name = "mha", .num_heads = 3, .num_heads_kv = 3},
      {.name = "head_dim_v_smaller", .head_dim = 96, .head_dim_v = 40},
      {.name = "head_dim_v_larger", .head_dim = 24, .head_dim_v = 128, .causal = true},
      {.name = "large_logits", .magnitude = 6.0},
      {.name = "swapped", .causal = true, .layouts = Layouts::kSwapped},
      {.name = "padded", .head_dim = 33, .causal = true, .layouts = Layouts::kPadded},
      {.name = "mixed_layouts", .left = 30, .bias = "bhqk", .sinks = true, .layouts = Layouts::kMixed},
      {.name = "everything",
       .seqlen_q = 67,
       .seqlen_k = 81,
       .head_dim = 40,
       .head_dim_v = 56,
       .causal = true,
       .left = 50,
       .key_begin = {4, 0},
       .key_end = {81, 70},
       .scale = 0.2,
       .softcap = 15.0,
       .alibi = AlibiKind::kPerBatch,
       .bias = "hqk",
       .sinks = true,
       .dropout = 0.2,
       .layouts = Layouts::kMixed},
      {.name = "few_rows", .num_heads = 3, .num_heads_kv = 3, .seqlen_q = 1, .seqlen_k = 700},
      {.name = "few_rows_causal", .seqlen_q = 4, .seqlen_k = 150, .causal = true},
      {.name = "few_rows_top_left", .seqlen_q = 2, .seqlen_k = 150, .causal = true, .top_left = true},
      {.name = "few_rows_key_bounds",
       .seqlen_q = 3,
       .seqlen_k = 150,
       .causal = true,
       .key_begin = {3, 140},
       .key_end = {149, 66}},
      {.name = "few_rows_bias", .num_heads = 2, .seqlen_q = 1, .seqlen_k = 150, .bias = "bhqk"},
      {.name = "few_rows_bias_of_keys", .seqlen_q = 4, .seqlen_k = 150, .bias = "bk", .float32_extras = true},
      {.name = "few_rows_bias_of_queries", .num_heads = 8, .seqlen_q = 2, .seqlen_k = 150, .bias = "hq"},
      {.name = "few_rows_dropout", .num_heads = 2, .seqlen_q = 1, .seqlen_k = 700, .dropout = 0.3},
      {.name = "few_rows_dropout_group_4", .num_heads = 8, .seqlen_q = 2, .seqlen_k = 150, .dropout = 0.1},
      {.name = "few_rows_everything",
       .num_heads = 6,
       .num_heads_kv = 3,
       .seqlen_q = 3,
       .seqlen_k = 150,
       .head_dim = 40,
       .head_dim_v = 24,
       .causal = true,
       .left = 100,
       .key_begin = {70, 0},
       .key_end = {147, 150},
       .softcap = 10.0,
       .alibi = AlibiKind::kPerBatch,
       .bias = "hqk",
       .sinks = true,
       .dropout = 0.2,
       .layouts = Layouts::kMixed},
      {.name = "few_rows_ragged", .lengths_q = {1, 2, 0, 4}, .lengths_k = {700, 3, 40, 150}, .causal = true},
      {.name = "few_rows_ragged_options",
       .num_heads = 4,
       .lengths_q = {1, 2, 1, 2},
       .lengths_k = {700, 1, 0, 150},
       .tail = 5,
       .causal = true,
       .left = 300,
       .key_begin = {600, 0, 0, 7},
       .key_end = {699, 1, 0, 149},
       .alibi = AlibiKind::kPerHead,
       .sinks = true,
       .dropout = 0.1},
      {.name = "ragged", .lengths_q = {40, 1, 33, 70}, .lengths_k = {40, 64, 33, 5}},
      {.name = "ragged_causal", .lengths_q = {40, 1, 33, 70}, .lengths_k = {40, 64, 50, 5}, .causal = true},
      {.name = "ragged_empty_sequences",
       .lengths_q = {0, 20, 0, 17, 9, 0},
       .lengths_k = {0, 20, 13, 0, 31, 0},
       .causal = true},
      {.name = "ragged_tail", .lengths_q = {11, 30}, .lengths_k = {30, 11}, .tail = 7},
      {.name = "ragged_single_tokens", .lengths_q = {1, 0, 1, 1}, .lengths_k = {1, 1, 0, 1}},
      {.name = "ragged_window_alibi_sinks",
       .lengths_q = {45, 80},
       .lengths_k = {60, 80},
       .causal = true,
       .left = 30,
       .alibi = AlibiKind::kPerHead,
       .sinks = true,
       .layouts = Layouts::kSwapped},
      {.name = "ragged_key_bounds_dropout_softcap",
       .lengths_q = {45, 80, 3},
       .lengths_k = {60, 80, 3},
       .key_begin = {10, 0, 3},
       .key_end = {60, 33, 3},
       .softcap = 8.0,
       .dropout = 0.25,
       .layouts = Layouts::kMixed},
      {.name = "ragged_head_dim_128",
       .head_dim = 128,
       .lengths_q = {140, 1, 33, 200},
       .lengths_k = {140, 64, 150, 130},
       .causal = true},
      {.name = "window_head_dim_128", .seqlen_q = 200, .seqlen_k = 260, .head_dim = 128, .left = 70, .right = 20},
      {.name = "many_tiles_causal",  // more of them than multiprocessors
       .batch = 3,
       .num_heads = 30,
       .num_heads_kv = 10,
       .seqlen_q = 150,
       .seqlen_k = 300,
       .head_dim = 64,
       .causal = true},
      {.name = "many_tiles_window",
       .num_heads = 40,
       .num_heads_kv = 40,
       .seqlen_q = 333,
       .seqlen_k = 270,
       .head_dim = 96,
       .left = 60,
       .right = 130,
       .key_begin = {0, 65},
       .key_end = {270, 200}},
      {.name = "many_tiles_ragged",
       .num_heads = 40,
       .num_heads_kv = 20,
       .head_dim = 40,
       .head_dim_v = 72,
       .lengths_q = {140, 0, 33, 200, 129},
       .lengths_k = {140, 64, 150, 130, 0},
       .tail = 9,
       .causal = true},
      {.name = "many_tiles_head_dim_256", .num_heads = 70, .num_heads_kv = 1, .seqlen_k = 150, .head_dim = 200},
      {.name = "ragged_top_left", .lengths_q = {30, 50}, .lengths_k = {50, 30}, .causal = true, .top_left = true},
  };
  return cases;
}

const std::vector<Case>& shape_cases() {
  static const std::vector<Case> cases = [] {
    std::vector<Case> list;
    const auto add = [&](std::int64_t sq, std::int64_t sk, std::int64_t dim, bool causal) {
      std::ostringstream name;
      name << "q" << sq << "_k" << sk << "_d" << dim << (causal ? "_causal" : "");
      list.push_back({.name = name.str(),
                      .batch = 1,
                      .num_heads = 2,
                      .num_heads_kv = 1,
                      .seqlen_q = sq,
                      .seqlen_k = sk,
                      .head_dim = dim,
                      .causal = causal});
    };
    for (std::int64_t size : {1,  2,  3,  7,  8,  9,  15, 16,  17,  31,  32,  33,  47,  48,  49,
                              63, 64, 65, 66, 79, 80, 96, 127, 128, 129, 191, 193, 255, 256, 257}) {
      add(size, size, 16, true);
      add(size, 65, 16, false);
      add(31, size, 24, false);
    }
    for (std::int64_t dim :
         {1, 2, 3, 7, 8, 15, 17, 24, 31, 48, 63, 65, 72, 80, 96, 112, 127, 128, 129, 160, 192, 200, 255, 256}) {
      add(37, 53, dim, dim % 2 == 1);
    }
    add(1, 600, 64, true);
    add(5, 600, 128, true);
    add(600, 3, 32, false);
    add(520, 520, 8, true);
    return list;
  }();
  return cases;
}

const std::vector<Case>& piecewise_cases() {
  static const std::vector<Case> cases{
      {.name = "piecewise", .dist_threshold = 30},
      {.name = "piecewise_causal", .causal = true, .dist_threshold = 30},
      {.name = "piecewise_more_queries", .seqlen_q = 90, .seqlen_k = 70, .dist_threshold = 5},
      {.name = "piecewise_causal_more_queries", .seqlen_q = 90, .seqlen_k = 70, .causal = true, .dist_threshold = 25},
      {.name = "piecewise_top_left", .causal = true, .top_left = true, .dist_threshold = 20},
      {.name = "piecewise_all_far", .dist_threshold = -1000},
      {.name = "piecewise_all_near", .dist_threshold = 1000},
      {.name = "piecewise_lowest_threshold", .dist_threshold = INT64_MIN},
      {.name = "piecewise_highest_threshold", .dist_threshold = INT64_MAX},
      {.name = "piecewise_future_threshold", .dist_threshold = -17},
      {.name = "piecewise_threshold_1", .dist_threshold = 1},
      {.name = "piecewise_threshold_2", .dist_threshold = 2},
      {.name = "piecewise_window", .left = 40, .right = 5, .dist_threshold = 20},
      {.name = "piecewise_window_all_near", .causal = true, .left = 15, .dist_threshold = 16},
      {.name = "piecewise_window_future", .right = 30, .dist_threshold = -10},
      {.name = "piecewise_key_bounds", .key_begin = {3, 40}, .key_end = {90, 66}, .dist_threshold = 12},
      {.name = "piecewise_key_bounds_empty", .key_begin = {20, 0}, .key_end = {20, 90}, .dist_threshold = 12},
      {.name = "piecewise_scale_zero", .scale = 0.0, .dist_threshold = 10},
      {.name = "piecewise_scale_negative", .scale = -0.25, .dist_threshold = 10},
      {.name = "piecewise_softcap", .causal = true, .softcap = 5.0, .magnitude = 2.0, .dist_threshold = 33},
      {.name = "piecewise_alibi", .alibi = AlibiKind::kPerHead, .dist_threshold = 33},
      {.name = "piecewise_bias", .bias = "bhqk", .dist_threshold = 33},
      {.name = "piecewise_bias_of_keys", .bias = "bk", .dist_threshold = 33},
      {.name = "piecewise_bias_of_queries", .causal = true, .bias = "hq", .dist_threshold = 33},
      {.name = "piecewise_sinks", .sinks = true, .dist_threshold = 33},
      {.name = "piecewise_dropout", .causal = true, .dropout = 0.3, .dist_threshold = 33},
      {.name = "piecewise_gqa_many", .num_heads = 8, .num_heads_kv = 1, .causal = true, .dist_threshold = 30},
      {.name = "piecewise_gqa_odd", .num_heads = 9, .num_heads_kv = 3, .dist_threshold = 30},
      {.name = "piecewise_mha", .num_heads = 3, .num_heads_kv = 3, .causal = true, .dist_threshold = 30},
      {.name = "piecewise_head_dim_v_smaller", .head_dim = 96, .head_dim_v = 40, .dist_threshold = 30},
      {.name = "piecewise_head_dim_v_larger", .head_dim = 24, .head_dim_v = 128, .causal = true, .dist_threshold = 30},
      {.name = "piecewise_large_logits", .magnitude = 6.0, .dist_threshold = 30},
      {.name = "piecewise_swapped", .causal = true, .dist_threshold = 30, .layouts = Layouts::kSwapped},
      {.name = "piecewise_padded", .head_dim = 33, .dist_threshold = 30, .layouts = Layouts::kPadded},
      {.name = "piecewise_everything",
       .seqlen_q = 67,
       .seqlen_k = 81,
       .head_dim = 40,
       .head_dim_v = 56,
       .causal = true,
       .left = 50,
       .key_begin = {4, 0},
       .key_end = {81, 70},
       .scale = 0.2,
       .softcap = 15.0,
       .alibi = AlibiKind::kPerBatch,
       .bias = "hqk",
       .sinks = true,
       .dropout = 0.2,
       .dist_threshold = 21,
       .layouts = Layouts::kMixed},
  };
  return cases;
}

const std::vector<Case>& piecewise_shape_cases() {
  static const std::vector<Case> cases = [] {
    std::vector<Case> list;
    const auto add = [&](std::int64_t sq, std::int64_t sk, std::int64_t dim, std::int64_t threshold, bool causal) {
      std::ostringstream name;
      name << "piecewise_q" << sq << "_k" << sk << "_d" << dim << (threshold < 0 ? "_t_minus" : "_t")
           << std::abs(threshold) << (causal ? "_causal" : "");
      list.push_back({.name = name.str(),
                      .batch = 1,
                      .num_heads = 2,
                      .num_heads_kv = 1,
                      .seqlen_q = sq,
                      .seqlen_k = sk,
                      .head_dim = dim,
                      .causal = causal,
                      .dist_threshold = threshold});
    };
    for (std::int64_t size : {3, 16, 31, 64, 65, 97, 129, 192}) {
      for (std::int64_t threshold : {std::int64_t{0}, size / 3, size - 1, size}) add(size, size, 16, threshold, true);
    }
    for (std::int64_t threshold : {-64, 15, 16, 63, 64, 65, 95, 96, 97, 128, 150}) add(200, 260, 16, threshold, false);
    for (std::int64_t dim : {1, 7, 31, 48, 80, 127, 128, 192, 256}) add(37, 53, dim, 20, dim % 2 == 1);
    add(1, 1, 16, 0, true);
    add(1, 1, 16, 1, false);
    add(1, 300, 64, 100, true);
    add(5, 300, 128, 100, true);
    add(300, 3, 32, 1, false);
    return list;
  }();
  return cases;
}

Device Target::device() const {
  for (const Backend* b : backends()) {
    if (backend == b->name) return {b->device, 0};
  }
  return {};
}

namespace {

const Backend& backend_of(const Target& target) {
  for (const Backend* b : backends()) {
    if (target.backend == b->name) return *b;
  }
  std::abort();
}

}  // namespace

std::string name_of_target(const Target& target) { return target.backend + "_" + name_of(target.dtype); }
void PrintTo(const Target& target, std::ostream* stream) { *stream << name_of_target(target); }

std::vector<Target> targets() {
  std::vector<Target> list;
  for (const Backend* b : backends()) {
    if (b->available()) continue;
    for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      if (b == &kHopperBackend && dtype == DType::kFloat32) continue;  // the portable kernels' work
      list.push_back({b->name, dtype});
    }
  }
  return list;
}

bool has_forward(const Target& target, const Case& definition) {
  const Backend& backend = backend_of(target);
  return definition.dist_threshold ? backend.piecewise != nullptr : backend.forward != nullptr;
}
bool has_backward(const Target& target, const Case& definition) {
  const Backend& backend = backend_of(target);
  return definition.dist_threshold ? backend.piecewise_backward != nullptr : backend.backward != nullptr;
}
bool has_total_attention(const Target& target) { return backend_of(target).total_attention != nullptr; }
bool has_merge(const Target& target) { return backend_of(target).merge != nullptr; }
bool has_cached(const Target& target) {
  return backend_of(target).cached != nullptr && backend_of(target).append != nullptr;
}

}  // namespace onepass::test
