#include "api/kv_cache.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace onepass::api {
namespace {

constexpr std::int64_t kMaxCachedHeadDim = 512;
constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max();

// One operation on one cache.
struct Context {
  const char* operation;
  const KVCacheView& view;
  KVStorage& cache;
};

const std::int32_t* lower_indices(const Context& c, Named indices, std::int64_t size) {
  if (!indices.view.given()) return nullptr;
  check_tensor(c.operation, indices, 1);
  check_dtype(c.operation, indices, {DType::kInt32});
  check_device(c.operation, indices, c.view.k.device);
  check_shape(c.operation, indices, {size});
  return static_cast<const std::int32_t*>(indices.view.data);
}

void lower_storage(const Context& c) {
  const Named k{"cache.k", c.view.k}, v{"cache.v", c.view.v};
  for (const Named& tensor : {k, v}) check_tensor(c.operation, tensor, 4);
  check_dtype(c.operation, k,
              {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8, DType::kFloat8E4M3, DType::kFloat8E5M2,
               DType::kFloat64});
  check_dtype(c.operation, v, {k.view.dtype});
  check_device(c.operation, v, k.view.device);
  const auto& shape = k.view.shape;
  check_shape(c.operation, v, {shape[0], shape[1], shape[2], v.view.shape[3]});
  c.cache.dtype = k.view.dtype;
  c.cache.num_blocks = shape[0];
  c.cache.num_heads_kv = shape[1];
  c.cache.block_tokens = shape[2];
  c.cache.head_dim = shape[3];
  c.cache.head_dim_v = v.view.shape[3];
  for (const Named& tensor : {k, v}) {
    const std::int64_t dim = tensor.view.shape[3];
    if (dim >= 1 && dim <= kMaxCachedHeadDim) continue;
    refuse(c.operation, tensor.name, "head_dim " + std::to_string(dim), "1 to " + std::to_string(kMaxCachedHeadDim));
  }
  for (int i : {0, 1, 2}) {
    if (shape[i] > kMaxTokens) {
      refuse(c.operation, k.name, describe(k.view), "sizes of at most " + std::to_string(kMaxTokens));
    }
  }
  c.cache.k = operand_of(k.view);
  c.cache.v = operand_of(v.view);
}

void lower_pages(const Context& c) {
  const Named table{"cache.page_table", c.view.page_table};
  if (!table.view.given()) return;
  check_tensor(c.operation, table, 2);
  check_dtype(c.operation, table, {DType::kInt32});
  check_device(c.operation, table, c.view.k.device);
  check_shape(c.operation, table, {c.cache.batch, table.view.shape[1]});
  if (c.cache.block_tokens < 1) refuse(c.operation, "cache.k", describe(c.view.k), "pages of at least 1 token");
  if (std::int64_t tokens;
      __builtin_mul_overflow(table.view.shape[1], c.cache.block_tokens, &tokens) || tokens > kMaxTokens) {
    refuse(c.operation, table.name, describe(table.view),
           "max_pages · page_size of at most " + std::to_string(kMaxTokens));
  }
  c.cache.page_table = static_cast<const std::int32_t*>(table.view.data);
  c.cache.page_table_stride = table.view.strides[0];
  c.cache.max_pages = table.view.shape[1];
}

CacheScale lower_scale(const Context& c, Named scale, std::int64_t dim) {
  const KVStorage& cache = c.cache;
  const auto& strides = scale.view.strides;
  switch (cache.granularity) {
    case ScaleGranularity::kNone: return {};
    case ScaleGranularity::kTensor:
      check_tensor(c.operation, scale, 1);
      check_shape(c.operation, scale, {1});
      return {static_cast<float*>(scale.view.data), 0, 0, 0};
    case ScaleGranularity::kToken:
      check_tensor(c.operation, scale, 2, /*any_inner_stride=*/true);
      check_shape(c.operation, scale, {cache.num_blocks, cache.block_tokens});
      return {static_cast<float*>(scale.view.data), strides[0], 0, strides[1]};
    case ScaleGranularity::kHead:
      check_tensor(c.operation, scale, 3, /*any_inner_stride=*/true);
      check_shape(c.operation, scale, {cache.num_blocks, cache.num_heads_kv, cache.block_tokens});
      return {static_cast<float*>(scale.view.data), strides[0], strides[1], strides[2]};
    case ScaleGranularity::kGroup:
      check_tensor(c.operation, scale, 4);
      check_shape(c.operation, scale,
                  {cache.num_blocks, cache.num_heads_kv, cache.block_tokens, dim / cache.group_channels});
      return {static_cast<float*>(scale.view.data), strides[0], strides[1], strides[2]};
  }
  refuse(c.operation, "cache.scale_granularity", std::to_string(static_cast<int>(cache.granularity)),
         "one of ScaleGranularity");
}

void lower_scales(const Context& c) {
  KVStorage& cache = c.cache;
  const DType dtype = cache.dtype;
  const ScaleGranularity granularity = c.view.scale_granularity;
  const bool none = granularity == ScaleGranularity::kNone, tensor = granularity == ScaleGranularity::kTensor;
  const std::string received =
      "granularity " + std::to_string(static_cast<int>(granularity)) + " with " + name_of(dtype);
  if (dtype == DType::kInt8) {
    if (none) refuse(c.operation, "cache.scale_granularity", received, "scales: tensor, token, head or group");
  } else if (dtype == DType::kFloat8E4M3 || dtype == DType::kFloat8E5M2) {
    if (!none && !tensor) refuse(c.operation, "cache.scale_granularity", received, "none or tensor");
  } else if (!none) {
    refuse(c.operation, "cache.scale_granularity", received, "none: the storage is not quantized");
  }
  const Named k_scale{"cache.k_scale", c.view.k_scale}, v_scale{"cache.v_scale", c.view.v_scale};
  for (const Named& scale : {k_scale, v_scale}) {
    if (none && scale.view.given()) refuse(c.operation, scale.name, describe(scale.view), "none without granularity");
    if (none) continue;
    if (!scale.view.given()) refuse(c.operation, scale.name, "none", "a float32 tensor of scales");
    check_dtype(c.operation, scale, {DType::kFloat32});
    check_device(c.operation, scale, c.view.k.device);
  }
  cache.granularity = granularity;
  cache.group_channels = std::max(cache.head_dim, cache.head_dim_v);
  if (granularity == ScaleGranularity::kGroup) {
    const std::int64_t group = c.view.scale_group;
    if (group < 1 || cache.head_dim % group != 0 || cache.head_dim_v % group != 0) {
      refuse(c.operation, "cache.scale_group", std::to_string(group),
             "a divisor of head_dim " + std::to_string(cache.head_dim) + " and head_dim_v " +
                 std::to_string(cache.head_dim_v));
    }
    cache.group_channels = group;
  }
  cache.k_scale = lower_scale(c, k_scale, cache.head_dim);
  cache.v_scale = lower_scale(c, v_scale, cache.head_dim_v);
}

std::string of_sequence(std::int64_t b) { return " for sequence " + std::to_string(b); }

void check_length(const char* operation, const KVStorage& cache, const NewTokens& tokens, std::int64_t b) {
  const std::int64_t stored = cache.seqlens[b], capacity = cache.capacity();
  if (stored < 0 || stored > capacity) {
    refuse(operation, "cache.seqlens", std::to_string(stored) + of_sequence(b),
           "0 to the capacity of " + std::to_string(capacity));
  }
  const std::int64_t added = tokens.count(b);
  if (added < 0 || (tokens.counts != nullptr && added > tokens.each)) {
    refuse(operation, "seqlens", std::to_string(added) + of_sequence(b),
           "0 to the " + std::to_string(tokens.each) + " new tokens given");
  }
  if (added > capacity - stored) {
    refuse(operation, "cache", std::to_string(added) + " new tokens behind " + std::to_string(stored) + of_sequence(b),
           "room for them in the capacity of " + std::to_string(capacity));
  }
}

// Blocks of the tokens [first, length) and of those that are read, which begin at the first valid one.
void check_blocks(const char* operation, const KVStorage& cache, std::int64_t b, std::int64_t first,
                  std::int64_t length) {
  const std::int64_t start = std::min(cache.start(b), first);
  if (start == length) return;
  if (!cache.paged()) {
    const std::int64_t row = cache.slot(b, 0).block;
    if (row < 0 || row >= cache.num_blocks) {
      refuse(operation, "cache.batch_index", std::to_string(row) + of_sequence(b),
             "0 to " + std::to_string(cache.num_blocks - 1) + " (rows − 1)");
    }
    return;
  }
  for (std::int64_t page = start / cache.block_tokens; page * cache.block_tokens < length; ++page) {
    const std::int64_t id = cache.page_table[b * cache.page_table_stride + page];
    if (id >= 0 && id < cache.num_blocks) continue;
    refuse(operation, "cache.page_table", "page " + std::to_string(id) + " at " + std::to_string(page) + of_sequence(b),
           "0 to " + std::to_string(cache.num_blocks - 1) + " (num_pages − 1)");
  }
}

void check_written_once(const char* operation, const KVStorage& cache, const NewTokens& tokens) {
  std::vector<std::int64_t> written;
  for (std::int64_t b = 0; b < cache.batch; ++b) {
    const std::int64_t first = cache.seqlens[b], end = first + tokens.count(b);
    for (std::int64_t token = first; token < end; token += cache.block_tokens - token % cache.block_tokens) {
      written.push_back(cache.slot(b, token).block);
    }
  }
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  if (twice == written.end()) return;
  refuse(operation, cache.paged() ? "cache.page_table" : "cache.batch_index",
         (cache.paged() ? "page " : "row ") + std::to_string(*twice) + " written by two sequences",
         "storage of its own for each sequence that grows");
}

}  // namespace

KVStorage lower_cache(const char* operation, const KVCacheView& view) {
  KVStorage cache;
  const Context c{operation, view, cache};
  lower_storage(c);
  const Named seqlens{"cache.seqlens", view.seqlens};
  if (!seqlens.view.given()) refuse(operation, seqlens.name, "none", "int32 (batch)");
  check_tensor(operation, seqlens, 1);
  cache.batch = seqlens.view.shape[0];
  cache.seqlens = const_cast<std::int32_t*>(lower_indices(c, seqlens, cache.batch));
  lower_pages(c);
  cache.first_key = lower_indices(c, {"cache.first_key", view.first_key}, cache.batch);
  const Named index{"cache.batch_index", view.batch_index};
  cache.batch_index = lower_indices(c, index, cache.batch);
  if (cache.paged() && index.view.given()) refuse(operation, index.name, "a tensor", "none for a paged cache");
  if (!cache.paged() && !index.view.given() && cache.batch > cache.num_blocks) {
    refuse(operation, seqlens.name, describe(seqlens.view),
           "at most the " + std::to_string(cache.num_blocks) + " rows of cache.k");
  }
  lower_scales(c);
  return cache;
}

RotaryTable lower_rotary(const char* operation, const Rotary& rotary, Device device, DType dtype,
                         std::int64_t head_dim) {
  const Named cos{"rotary.cos", rotary.cos}, sin{"rotary.sin", rotary.sin};
  if (!cos.view.given() && !sin.view.given()) return {};
  for (const Named& table : {cos, sin}) {
    check_tensor(operation, table, 2);
    check_dtype(operation, table, {cos.view.dtype});
    check_device(operation, table, device);
    check_shape(operation, table, {cos.view.shape[0], cos.view.shape[1]});
  }
  check_dtype(operation, cos, {DType::kFloat32, dtype});
  const std::int64_t pairs = cos.view.shape[1];
  if (pairs < 1 || 2 * pairs > head_dim) {
    refuse(operation, cos.name, describe(cos.view),
           "1 to " + std::to_string(head_dim / 2) + " pairs for head_dim " + std::to_string(head_dim));
  }
  return {.cos = cos.view.data,
          .sin = sin.view.data,
          .dtype = cos.view.dtype,
          .cos_stride = cos.view.strides[0],
          .sin_stride = sin.view.strides[0],
          .max_positions = cos.view.shape[0],
          .pairs = pairs,
          .interleaved = rotary.interleaved};
}

AppendProblem lower_append(const char* operation, const KVCacheView& view, const KVStorage& cache,
                           const NewTensors& tensors, const Rotary& rotary, bool advance) {
  const bool packed = tensors.cu_seqlens.view.given();
  const Named &k = tensors.k, &v = tensors.v;
  for (const Named& tensor : {k, v}) check_tensor(operation, tensor, packed ? 3 : 4);
  check_dtype(operation, k, {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64});
  check_dtype(operation, v, {k.view.dtype});
  for (const auto& [tensor, dim] : {std::pair{k, cache.head_dim}, std::pair{v, cache.head_dim_v}}) {
    check_device(operation, tensor, view.k.device);
    if (packed) {
      check_shape(operation, tensor, {k.view.shape[0], cache.num_heads_kv, dim});
    } else {
      check_shape(operation, tensor, {cache.batch, cache.num_heads_kv, k.view.shape[2], dim});
    }
  }
  AppendProblem problem{.operation = operation,
                        .device = view.k.device,
                        .dtype = k.view.dtype,
                        .cache = cache,
                        .tokens = {},
                        .k_new = operand_of(k.view),
                        .v_new = operand_of(v.view),
                        .rotary = lower_rotary(operation, rotary, view.k.device, k.view.dtype, cache.head_dim),
                        .advance = advance};
  const AttentionOptions none;
  const Call call{operation, k, k, v, none, nullptr};
  if (packed) {
    check_int32_vector(call, tensors.cu_seqlens, cache.batch + 1);
    problem.total_new = k.view.shape[0];
    problem.max_new = longest_sequence(call, tensors.cu_seqlens, "max_seqlen", 0, problem.total_new);
    problem.tokens.cu_seqlens = static_cast<const std::int32_t*>(tensors.cu_seqlens.view.data);
  } else {
    problem.tokens.each = problem.max_new = k.view.shape[2];
    problem.total_new = cache.batch * problem.max_new;
  }
  if (tensors.counts.view.given()) {
    if (packed) refuse(operation, tensors.counts.name, "a tensor", "none for packed tokens");
    check_int32_vector(call, tensors.counts, cache.batch);
    problem.tokens.counts = static_cast<const std::int32_t*>(tensors.counts.view.data);
  }
  const Named stored[] = {{"cache.k", view.k}, {"cache.v", view.v}};
  const Named scales[] = {{"cache.k_scale", view.k_scale}, {"cache.v_scale", view.v_scale}};
  for (const Named& output : stored) check_output(operation, output, {k, v, scales[0], scales[1]});
  check_output(operation, stored[0], {stored[1]});
  if (cache.granularity != ScaleGranularity::kNone && cache.granularity != ScaleGranularity::kTensor) {
    for (const Named& output : scales) check_output(operation, output, {k, v});
    check_output(operation, scales[0], {scales[1]});
  }
  return problem;
}

std::int64_t check_sequences(const char* operation, const KVStorage& cache, const NewTokens& tokens,
                             const RotaryTable& rotary) {
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < cache.batch; ++b) {
    check_length(operation, cache, tokens, b);
    const std::int64_t length = cache.seqlens[b] + tokens.count(b);
    check_blocks(operation, cache, b, cache.seqlens[b], length);
    if (rotary && length - cache.start(b) > rotary.max_positions) {
      refuse(operation, "rotary.cos",
             std::to_string(rotary.max_positions) + " positions for " + std::to_string(length) + " tokens" +
                 of_sequence(b),
             "a row for every position");
    }
    longest = std::max(longest, length);
  }
  check_written_once(operation, cache, tokens);
  return longest;
}

}  // namespace onepass::api
