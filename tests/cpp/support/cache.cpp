#include "support/cache.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <ostream>
#include <random>

namespace onepass::test {
namespace {

constexpr std::int64_t kPositions = 512;
constexpr std::int32_t kNoPage = -7;  // behind the pages in use: must not be read

Values normal(std::int64_t count, double deviation, DType dtype, std::mt19937_64& generator) {
  std::normal_distribution<double> distribution(0.0, deviation);
  Values values(count);
  for (double& x : values) x = rounded(distribution(generator), dtype);
  return values;
}

Tensor indices(const std::vector<std::int64_t>& values, const Shape& shape, Device device) {
  return Tensor(DType::kInt32, shape, Values(values.begin(), values.end()), Layout::kContiguous, device);
}

double at(const Tensor& tensor, std::initializer_list<std::int64_t> index) {
  std::int64_t offset = 0;
  int i = 0;
  for (std::int64_t x : index) offset += x * tensor.view().strides[i++];
  return tensor.at(offset);
}

}  // namespace

void PrintTo(const CacheCase& definition, std::ostream* stream) { *stream << definition.name; }

CacheInstance::CacheInstance(const CacheCase& definition, const Target& target_, std::uint64_t seed)
    : c(definition), target(target_) {
  if (c.head_dim_v == 0) c.head_dim_v = c.head_dim;
  c.queries.resize(c.lengths.size(), c.queries.back());
  std::mt19937_64 generator(seed);
  const Device device = target.device();
  const std::int64_t tokens = std::accumulate(c.lengths.begin(), c.lengths.end(), std::int64_t{0});
  const std::int64_t total_q = std::accumulate(c.queries.begin(), c.queries.end(), std::int64_t{0});
  keys = normal(tokens * c.num_heads_kv * c.head_dim, c.magnitude, target.dtype, generator);
  values = normal(tokens * c.num_heads_kv * c.head_dim_v, 1.0, target.dtype, generator);
  queries = normal(total_q * c.num_heads * c.head_dim, c.magnitude, target.dtype, generator);

  const Layout layout = c.token_major ? Layout::kSwapped : Layout::kContiguous;
  k = Tensor(storage(), {blocks(), c.num_heads_kv, block_tokens(), c.head_dim}, layout, device);
  v = Tensor(storage(), {blocks(), c.num_heads_kv, block_tokens(), c.head_dim_v}, layout, device);
  for (const auto& [scale, dim] : {std::pair{&k_scale, c.head_dim}, std::pair{&v_scale, c.head_dim_v}}) {
    Shape shape;
    switch (c.granularity) {
      case ScaleGranularity::kNone: continue;
      case ScaleGranularity::kTensor: shape = {1}; break;
      case ScaleGranularity::kToken: shape = {blocks(), block_tokens()}; break;
      case ScaleGranularity::kHead: shape = {blocks(), c.num_heads_kv, block_tokens()}; break;
      case ScaleGranularity::kGroup: shape = {blocks(), c.num_heads_kv, block_tokens(), dim / c.scale_group}; break;
    }
    *scale = Tensor(DType::kFloat32, shape, Layout::kContiguous, device);
    if (c.granularity == ScaleGranularity::kTensor) {
      scale->store({rounded((scale == &k_scale ? c.magnitude : 1.0) * 4.0 / 127.0, DType::kFloat32)});
    }
  }
  seqlens = indices(std::vector<std::int64_t>(batch(), 0), {batch()}, device);
  if (c.page_size != 0) {  // pages in random order
    const std::int64_t max_pages = (c.capacity + c.page_size - 1) / c.page_size;
    std::vector<std::int64_t> order(blocks()), table(batch() * max_pages, kNoPage);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
    std::size_t next = 0;
    for (std::int64_t b = 0; b < batch(); ++b) {
      for (std::int64_t page = 0; page * c.page_size < c.lengths[b]; ++page)
        table[b * max_pages + page] = order[next++];
    }
    page_table = indices(table, {batch(), max_pages}, device);
  }
  if (c.batch_index) {
    std::vector<std::int64_t> rows(batch());
    for (std::int64_t b = 0; b < batch(); ++b) rows[b] = blocks() - 1 - b;
    batch_index = indices(rows, {batch()}, device);
  }
  if (!c.first_key.empty()) {
    first_key = indices({c.first_key.begin(), c.first_key.end()}, {batch()}, device);
  }
  if (c.sinks)
    sinks = Tensor(target.dtype, {c.num_heads}, normal(c.num_heads, 1.0, target.dtype, generator), Layout::kContiguous,
                   device);
  if (c.alibi != AlibiKind::kNone) {
    const std::int64_t rows = c.alibi == AlibiKind::kPerBatch ? batch() : 1;
    Values slope;
    for (std::int64_t b = 0; b < rows; ++b) {
      for (std::int64_t h = 0; h < c.num_heads; ++h) {
        slope.push_back(rounded(alibi_slope(h, c.num_heads) / double(b + 1), DType::kFloat32));
      }
    }
    const Shape shape = c.alibi == AlibiKind::kPerBatch ? Shape{batch(), c.num_heads} : Shape{c.num_heads};
    slopes = Tensor(DType::kFloat32, shape, slope, Layout::kContiguous, device);
  }
  if (c.rotary_pairs != 0) {
    Values cosines, sines;
    for (std::int64_t p = 0; p < kPositions; ++p) {
      for (std::int64_t i = 0; i < c.rotary_pairs; ++i) {
        const double angle = double(p) * std::pow(1e4, -double(i) / double(c.rotary_pairs));
        cosines.push_back(rounded(std::cos(angle), DType::kFloat32));
        sines.push_back(rounded(std::sin(angle), DType::kFloat32));
      }
    }
    cos = Tensor(DType::kFloat32, {kPositions, c.rotary_pairs}, cosines, Layout::kContiguous, device);
    sin = Tensor(DType::kFloat32, {kPositions, c.rotary_pairs}, sines, Layout::kContiguous, device);
  }

  std::vector<std::int64_t> before = c.lengths;
  if (c.append) {
    for (std::int64_t b = 0; b < batch(); ++b) before[b] -= c.queries[b];
  }
  append(std::vector<std::int64_t>(batch(), 0), before, /*as_packed=*/true);

  const std::vector<std::int64_t> starts = query_starts();
  Values q_values(queries.size());  // dense: (batch, head, token, dim)
  for (std::int64_t b = 0; b < batch(); ++b) {
    for (std::int64_t i = 0; i < c.queries[b]; ++i) {
      for (std::int64_t h = 0; h < c.num_heads; ++h) {
        const std::int64_t source = (starts[b] + i) * c.num_heads + h;
        const std::int64_t target_row = packed() ? source : (b * c.num_heads + h) * c.queries[0] + i;
        std::copy_n(&queries[source * c.head_dim], c.head_dim, &q_values[target_row * c.head_dim]);
      }
    }
  }
  const auto shape = [&](std::int64_t heads, std::int64_t dim) {
    return packed() ? Shape{total_q, heads, dim} : Shape{batch(), heads, c.queries[0], dim};
  };
  q = Tensor(target.dtype, shape(c.num_heads, c.head_dim), q_values, Layout::kPadded, device);
  out = Tensor(target.dtype, shape(c.num_heads, c.head_dim_v), Layout::kPadded, device);
  lse = Tensor(DType::kFloat32, packed() ? Shape{c.num_heads, total_q} : Shape{batch(), c.num_heads, c.queries[0]},
               Layout::kPadded, device);
  if (packed()) cu_seqlens = indices(starts, {batch() + 1}, device);
  if (!c.append) return;
  Values new_keys(total_q * c.num_heads_kv * c.head_dim), new_values(total_q * c.num_heads_kv * c.head_dim_v);
  for (std::int64_t b = 0; b < batch(); ++b) {
    for (std::int64_t i = 0; i < c.queries[b]; ++i) {
      for (std::int64_t g = 0; g < c.num_heads_kv; ++g) {
        const std::int64_t source = offset_of(b) + g * c.lengths[b] + before[b] + i;
        const std::int64_t row =
            packed() ? (starts[b] + i) * c.num_heads_kv + g : (b * c.num_heads_kv + g) * c.queries[0] + i;
        std::copy_n(&keys[source * c.head_dim], c.head_dim, &new_keys[row * c.head_dim]);
        std::copy_n(&values[source * c.head_dim_v], c.head_dim_v, &new_values[row * c.head_dim_v]);
      }
    }
  }
  k_new = Tensor(target.dtype, shape(c.num_heads_kv, c.head_dim), new_keys, Layout::kPadded, device);
  v_new = Tensor(target.dtype, shape(c.num_heads_kv, c.head_dim_v), new_values, Layout::kPadded, device);
}

std::int64_t CacheInstance::blocks() const {
  if (c.page_size == 0) return batch() + (c.batch_index ? 1 : 0);
  std::int64_t pages = 3;
  for (std::int64_t length : c.lengths) pages += (length + c.page_size - 1) / c.page_size;
  return pages;
}

std::vector<std::int64_t> CacheInstance::query_starts() const {
  std::vector<std::int64_t> starts(c.queries.size() + 1, 0);
  std::partial_sum(c.queries.begin(), c.queries.end(), starts.begin() + 1);
  return starts;
}

bool CacheInstance::packed() const {
  return c.packed || std::adjacent_find(c.queries.begin(), c.queries.end(), std::not_equal_to<>()) != c.queries.end();
}

KVCacheView CacheInstance::view() const {
  return {.k = k,
          .v = v,
          .page_table = page_table,
          .seqlens = seqlens,
          .k_scale = k_scale,
          .v_scale = v_scale,
          .scale_granularity = c.granularity,
          .scale_group = c.scale_group,
          .first_key = first_key,
          .batch_index = batch_index};
}

CachedOptions CacheInstance::options() const {
  CachedOptions options{.causal = c.causal,
                        .window = {c.left, c.right},
                        .softcap = c.softcap,
                        .alibi = {slopes},
                        .sinks = sinks,
                        .cu_seqlens_q = cu_seqlens,
                        .k_new = k_new,
                        .v_new = v_new,
                        .advance = c.advance,
                        .rotary = {cos, sin, c.interleaved},
                        .num_splits = c.num_splits,
                        .prob_threshold = c.prob_threshold};
  options.softmax_scale = rounded(1.0 / std::sqrt(double(c.head_dim)), DType::kFloat32);
  return options;
}

void CacheInstance::append(const std::vector<std::int64_t>& from, const std::vector<std::int64_t>& to, bool as_packed) {
  std::vector<std::int64_t> counts(batch()), starts(batch() + 1, 0);
  for (std::int64_t b = 0; b < batch(); ++b) counts[b] = to[b] - from[b];
  std::partial_sum(counts.begin(), counts.end(), starts.begin() + 1);
  const std::int64_t longest = *std::max_element(counts.begin(), counts.end()), total = starts.back();
  const Device device = target.device();
  const auto make = [&](const Values& all, std::int64_t dim) {
    const Shape shape = as_packed ? Shape{total, c.num_heads_kv, dim} : Shape{batch(), c.num_heads_kv, longest, dim};
    Values rows(std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>()), NAN);
    for (std::int64_t b = 0; b < batch(); ++b) {
      for (std::int64_t g = 0; g < c.num_heads_kv; ++g) {
        for (std::int64_t i = 0; i < counts[b]; ++i) {
          const std::int64_t row =
              as_packed ? (starts[b] + i) * c.num_heads_kv + g : (b * c.num_heads_kv + g) * longest + i;
          std::copy_n(&all[(offset_of(b) + g * c.lengths[b] + from[b] + i) * dim], dim, &rows[row * dim]);
        }
      }
    }
    return Tensor(target.dtype, shape, rows, Layout::kPadded, device);
  };
  AppendOptions options{.rotary = {cos, sin, c.interleaved}};
  const Tensor bounds = indices(starts, {batch() + 1}, device), each = indices(counts, {batch()}, device);
  (as_packed ? options.cu_seqlens : options.seqlens) = as_packed ? bounds : each;
  append_kv(view(), make(keys, c.head_dim), make(values, c.head_dim_v), options, target.context());
}

void CacheInstance::attend(const ExecutionContext& context) {
  cached_attention(q, view(), {out, lse}, options(), context);
  synchronize(target.device());  // what was appended may be read element by element
}

std::int64_t CacheInstance::offset_of(std::int64_t b) const {
  return std::accumulate(c.lengths.begin(), c.lengths.begin() + b, std::int64_t{0}) * c.num_heads_kv;
}

Values CacheInstance::stored_row(const Tensor& tensor, const Tensor& scale, std::int64_t dim, std::int64_t b,
                                 std::int64_t g, std::int64_t t) const {
  std::int64_t block = c.batch_index ? blocks() - 1 - b : b;
  if (c.page_size != 0) {
    block = static_cast<std::int64_t>(at(page_table, {b, t / c.page_size}));
    t %= c.page_size;
  }
  Values row(dim);
  for (std::int64_t d = 0; d < dim; ++d) {
    double factor = 1.0;
    switch (c.granularity) {
      case ScaleGranularity::kNone: break;
      case ScaleGranularity::kTensor: factor = at(scale, {0}); break;
      case ScaleGranularity::kToken: factor = at(scale, {block, t}); break;
      case ScaleGranularity::kHead: factor = at(scale, {block, g, t}); break;
      case ScaleGranularity::kGroup: factor = at(scale, {block, g, t, d / c.scale_group}); break;
    }
    row[d] = at(tensor, {block, g, t, d}) * factor;
  }
  return row;
}

Values CacheInstance::stored_key(std::int64_t b, std::int64_t g, std::int64_t t) const {
  return stored_row(k, k_scale, c.head_dim, b, g, t);
}
Values CacheInstance::stored_value(std::int64_t b, std::int64_t g, std::int64_t t) const {
  return stored_row(v, v_scale, c.head_dim_v, b, g, t);
}

Values CacheInstance::rotated(Values row, std::int64_t position) const {
  if (c.rotary_pairs == 0) return row;
  position = std::max<std::int64_t>(position, 0);
  for (std::int64_t i = 0; i < c.rotary_pairs; ++i) {
    const double cosine = at(cos, {position, i}), sine = at(sin, {position, i});
    double& x = row[c.interleaved ? 2 * i : i];
    double& y = row[c.interleaved ? 2 * i + 1 : c.rotary_pairs + i];
    const double old = x;
    x = x * cosine - y * sine;
    y = old * sine + y * cosine;
  }
  return row;
}

Values CacheInstance::expected_key(std::int64_t b, std::int64_t g, std::int64_t t) const {
  const double* row = &keys[(offset_of(b) + g * c.lengths[b] + t) * c.head_dim];
  const std::int64_t first = c.first_key.empty() ? 0 : std::max(c.first_key[b], 0);
  return rotated(Values(row, row + c.head_dim), t - first);
}

Instance CacheInstance::sequence(std::int64_t b) const {
  const std::int64_t length = c.lengths[b], count = c.queries[b];
  Case dense{.name = c.name,
             .batch = 1,
             .num_heads = c.num_heads,
             .num_heads_kv = c.num_heads_kv,
             .seqlen_q = count,
             .seqlen_k = length,
             .head_dim = c.head_dim,
             .head_dim_v = c.head_dim_v,
             .causal = c.causal,
             .left = c.left,
             .right = c.right,
             .softcap = c.softcap,
             .sinks = c.sinks};
  if (c.alibi != AlibiKind::kNone) dense.alibi = AlibiKind::kPerHead;
  if (!c.first_key.empty()) dense.key_begin = {c.first_key[b]};
  Instance instance(dense, target.dtype);
  const std::int64_t start = query_starts()[b];
  const std::int64_t first = c.first_key.empty() ? 0 : std::clamp<std::int64_t>(c.first_key[b], 0, length);
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t h = 0; h < c.num_heads; ++h) {
      const double* row = &queries[((start + i) * c.num_heads + h) * c.head_dim];
      const Values turned = rotated(Values(row, row + c.head_dim), i + length - count - first);
      std::copy(turned.begin(), turned.end(), &instance.q[(h * count + i) * c.head_dim]);
    }
  }
  for (std::int64_t g = 0; g < c.num_heads_kv; ++g) {
    for (std::int64_t t = 0; t < length; ++t) {
      const Values key = stored_key(b, g, t), value = stored_value(b, g, t);
      std::copy(key.begin(), key.end(), &instance.k[(g * length + t) * c.head_dim]);
      std::copy(value.begin(), value.end(), &instance.v[(g * length + t) * c.head_dim_v]);
    }
  }
  if (c.sinks) instance.sinks = sinks.load();
  if (c.alibi != AlibiKind::kNone) {
    const Values all = slopes.load();
    const std::int64_t row = c.alibi == AlibiKind::kPerBatch ? b : 0;
    instance.slopes.assign(all.begin() + row * c.num_heads, all.begin() + (row + 1) * c.num_heads);
  }
  return instance;
}

Values CacheInstance::loaded_out() const {
  const Values all = out.load();
  if (packed()) return all;
  Values ordered;
  for (std::int64_t b = 0; b < batch(); ++b) {
    for (std::int64_t i = 0; i < c.queries[0]; ++i) {
      for (std::int64_t h = 0; h < c.num_heads; ++h) {
        const auto row = all.begin() + ((b * c.num_heads + h) * c.queries[0] + i) * c.head_dim_v;
        ordered.insert(ordered.end(), row, row + c.head_dim_v);
      }
    }
  }
  return ordered;
}

Values CacheInstance::loaded_lse() const {
  const Values all = lse.load();
  const std::int64_t total_q = query_starts().back();
  Values ordered;
  for (std::int64_t b = 0; b < batch(); ++b) {
    for (std::int64_t i = 0; i < c.queries[b]; ++i) {
      for (std::int64_t h = 0; h < c.num_heads; ++h) {
        ordered.push_back(packed() ? all[h * total_q + query_starts()[b] + i]
                                   : all[(b * c.num_heads + h) * c.queries[0] + i]);
      }
    }
  }
  return ordered;
}

}  // namespace onepass::test
