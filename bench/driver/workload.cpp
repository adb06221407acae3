#include "workload.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <type_traits>

#include "core/half.h"
#include "device.h"

namespace onepass::bench {
namespace {

// One tile of random numbers, repeated: drawing many takes longer than measuring.
Tensor normal(DType dtype, const std::vector<std::int64_t>& shape, unsigned seed) {
  constexpr std::int64_t kTile = 1 << 20;
  Tensor tensor = Tensor::empty(dtype, shape);
  const std::int64_t count = tensor.view.numel(), tile = std::min(count, kTile);
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  with_float_type(dtype, [&]<class T>(T) {
    T* const values = static_cast<T*>(tensor.view.data);
    for (std::int64_t i = 0; i < tile; ++i) {
      const float x = distribution(generator);
      if constexpr (std::is_same_v<T, double>) {
        values[i] = x;
      } else {
        values[i] = from_float<T>(x);
      }
    }
    for (std::int64_t i = tile; i < count; i += tile) std::copy_n(values, std::min(tile, count - i), values + i);
  });
  return tensor;
}

Tensor indices(const std::vector<std::int32_t>& values, const std::vector<std::int64_t>& shape) {
  Tensor tensor = Tensor::empty(DType::kInt32, shape);
  std::copy(values.begin(), values.end(), static_cast<std::int32_t*>(tensor.view.data));
  return tensor;
}

std::int64_t pages_of(const Case& c) { return (c.seqlen_k + c.page_size - 1) / c.page_size; }

std::vector<std::int64_t> scale_shape(const Case& c, std::int64_t blocks, std::int64_t tokens) {
  switch (c.scale) {
    case ScaleGranularity::kTensor: return {1};
    case ScaleGranularity::kToken: return {blocks, tokens};
    case ScaleGranularity::kHead: return {blocks, c.num_heads_kv, tokens};
    case ScaleGranularity::kGroup: return {blocks, c.num_heads_kv, tokens, c.head_dim / c.scale_group};
    case ScaleGranularity::kNone: break;
  }
  return {};
}

// A cache of full sequences, pages in random order.
Keys filled_cache(const Case& c) {
  const std::int64_t blocks = c.page_size == 0 ? c.batch : c.batch * pages_of(c);
  const std::int64_t tokens = c.page_size == 0 ? c.seqlen_k : c.page_size;
  Keys keys;
  keys.k = Tensor::empty(c.dtype, {blocks, c.num_heads_kv, tokens, c.head_dim});
  keys.v = Tensor::empty(c.dtype, {blocks, c.num_heads_kv, tokens, c.head_dim});
  keys.seqlens = indices(std::vector<std::int32_t>(static_cast<std::size_t>(c.batch), 0), {c.batch});
  if (c.page_size != 0) {
    std::vector<std::int32_t> pages(static_cast<std::size_t>(blocks));
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(1));
    keys.page_table = indices(pages, {c.batch, pages_of(c)});
  }
  if (c.scale != ScaleGranularity::kNone) {
    for (Tensor* scale : {&keys.k_scale, &keys.v_scale}) {
      *scale = Tensor::empty(DType::kFloat32, scale_shape(c, blocks, tokens));
      // Of the tensor: 4 standard deviations reach 127; other scales are written by append_kv.
      std::fill_n(static_cast<float*>(scale->view.data), scale->view.numel(), 4.0f / 127.0f);
    }
  }
  const std::vector<std::int64_t> shape{c.batch, c.num_heads_kv, c.seqlen_k, c.head_dim};
  append_kv(keys.cache(c, 0, c.batch), normal(c.query_dtype, shape, 2).view, normal(c.query_dtype, shape, 3).view);
  return keys;
}

TensorView rows(const Tensor& tensor, std::int64_t begin, std::int64_t end) {
  TensorView view = tensor.view;
  if (!view.given()) return view;
  view.data = static_cast<std::byte*>(view.data) + begin * view.strides[0] * size_of(view.dtype);
  view.shape[0] = end - begin;
  return view;
}

std::vector<double> values_of(const Tensor& tensor) {
  std::vector<double> values;
  with_float_type(tensor.view.dtype, [&]<class T>(T) {
    const T* const data = static_cast<const T*>(tensor.view.data);
    for (std::int64_t i = 0; i < tensor.view.numel(); ++i) values.push_back(to_float(data[i]));
  });
  return values;
}

}  // namespace

Tensor Tensor::empty(DType dtype, const std::vector<std::int64_t>& shape, Device device) {
  Tensor tensor;
  tensor.view.dtype = dtype;
  tensor.view.device = device;
  tensor.view.rank = static_cast<std::int32_t>(shape.size());
  std::int64_t stride = 1;
  for (int i = tensor.view.rank - 1; i >= 0; --i) {
    tensor.view.shape[i] = shape[static_cast<std::size_t>(i)];
    tensor.view.strides[i] = stride;
    stride *= tensor.view.shape[i];
  }
  tensor.memory = allocate(tensor.bytes(), device);
  tensor.view.data = tensor.memory.get();
  return tensor;
}

std::size_t Tensor::bytes() const { return static_cast<std::size_t>(view.numel() * size_of(view.dtype)); }

Tensor Tensor::on(Device device) const {
  if (!view.given()) return {};
  Tensor copy = *this;
  copy.memory = allocate(bytes(), device);
  copy.view.data = copy.memory.get();
  copy.view.device = device;
  copy_to_device(copy.view.data, view.data, bytes(), device);
  return copy;
}

Keys Keys::on(Device device) const {
  return {k.on(device),       v.on(device),          k_scale.on(device),
          v_scale.on(device), page_table.on(device), seqlens.on(device)};
}

KVCacheView Keys::cache(const Case& c, std::int64_t begin, std::int64_t end) const {
  const bool paged = page_table.view.given();
  const bool whole = paged || c.scale == ScaleGranularity::kTensor;
  const auto storage = [&](const Tensor& tensor, bool keep) { return keep ? tensor.view : rows(tensor, begin, end); };
  KVCacheView view;
  view.k = storage(k, paged);
  view.v = storage(v, paged);
  view.page_table = rows(page_table, begin, end);
  view.seqlens = rows(seqlens, begin, end);
  view.k_scale = storage(k_scale, whole);
  view.v_scale = storage(v_scale, whole);
  view.scale_granularity = c.scale;
  view.scale_group = c.scale_group;
  return view;
}

Workload::Workload(const Case& c, Device device, double rotate) : case_(c), device_(device) {
  std::vector<std::int64_t> shape{c.batch, c.num_heads, c.seqlen_q, c.head_dim};
  if (has_parts()) {
    shape = {c.total_q(), c.num_heads, c.head_dim};
    std::vector<std::int32_t> bounds{0};
    for (std::int64_t b = 0; b < c.batch; ++b) {
      bounds.push_back(bounds.back() + static_cast<std::int32_t>(b < c.prefills() ? c.seqlen_q : 1));
    }
    host_bounds_ = indices(bounds, {c.batch + 1});
  } else if (c.prefills() == 0) {
    shape[2] = 1;
  }
  host_q_ = normal(c.query_dtype, shape, 1);
  if (c.alibi) {
    host_slopes_ = Tensor::empty(DType::kFloat32, {c.num_heads});
    for (std::int64_t h = 0; h < c.num_heads; ++h) {
      static_cast<float*>(host_slopes_.view.data)[h] = static_cast<float>(alibi_slope(h, c.num_heads));
    }
  }
  if (c.kind == Kind::kPrefill) {
    const std::vector<std::int64_t> keys{c.batch, c.num_heads_kv, c.seqlen_k, c.head_dim};
    host_.k = normal(c.dtype, keys, 2);
    host_.v = normal(c.dtype, keys, 3);
  } else {
    host_ = filled_cache(c);
  }
  q_ = host_q_.on(device);
  out_ = Tensor::empty(c.query_dtype, shape, device);
  slopes_ = host_slopes_.on(device);
  bounds_ = host_bounds_.on(device);
  for (double bytes = 0.0; copies_.empty() || bytes < rotate; bytes += c.kv_bytes())
    copies_.push_back(host_.on(device));
}

const Keys& Workload::next() {
  copy_ = (copy_ + 1) % copies_.size();
  return copies_[copy_];
}

CachedOptions Workload::cached_options(const Tensor& slopes) const {
  CachedOptions options;
  options.causal = case_.causal;
  options.alibi.slopes = slopes.view;
  options.num_splits = case_.num_splits;
  if (case_.window) options.window.left = *case_.window - 1;
  return options;
}

void Workload::call(const Keys& keys, const Tensor& q, const Tensor& out, const Tensor& slopes, const Tensor& bounds,
                    const ExecutionContext& context) const {
  const AttentionOutputs outputs{.out = out.view};
  if (case_.kind == Kind::kPrefill) {
    AttentionOptions options;
    options.causal = case_.causal;
    options.alibi.slopes = slopes.view;
    if (case_.window) options.window.left = *case_.window - 1;
    attention(q.view, keys.k.view, keys.v.view, outputs, options, context);
    return;
  }
  CachedOptions options = cached_options(slopes);
  options.cu_seqlens_q = bounds.view;
  if (bounds.view.given()) options.max_seqlen_q = case_.seqlen_q;
  cached_attention(q.view, keys.cache(case_, 0, case_.batch), outputs, options, context);
}

void Workload::call_part(std::int64_t begin, std::int64_t end, std::int64_t queries,
                         const ExecutionContext& context) const {
  const std::int64_t first = begin == 0 ? 0 : case_.prefills() * case_.seqlen_q;
  // Packed rows (batch·queries, heads, dim) seen as (batch, heads, queries, dim).
  const auto dense = [&](const Tensor& tensor) {
    const TensorView part = rows(tensor, first, first + (end - begin) * queries);
    const std::int64_t token = part.strides[0], head = part.strides[1];
    return TensorView(part.data, part.dtype, {end - begin, case_.num_heads, queries, case_.head_dim},
                      {queries * token, head, token, 1}, part.device);
  };
  cached_attention(dense(q_), copies_[copy_].cache(case_, begin, end), {.out = dense(out_)}, cached_options(slopes_),
                   context);
}

void Workload::run(const ExecutionContext& context) { call(next(), q_, out_, slopes_, bounds_, context); }

void Workload::run_apart(const ExecutionContext& context) {
  next();
  call_part(0, case_.prefills(), case_.seqlen_q, context);
  call_part(case_.prefills(), case_.batch, 1, context);
}

double Workload::error() const {
  Tensor got = host_q_.on({}), want = got.on({});
  copy_to_host(got.view.data, out_.view.data, out_.bytes(), device_);
  call(host_, host_q_, want, host_slopes_, host_bounds_, {.backend = "reference"});
  const std::vector<double> a = values_of(got), b = values_of(want);
  double difference = 0.0, largest = 0.0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference = std::max(difference, std::isnan(a[i]) ? INFINITY : std::abs(a[i] - b[i]));
    largest = std::max(largest, std::abs(b[i]));
  }
  return difference / largest;
}

}  // namespace onepass::bench
