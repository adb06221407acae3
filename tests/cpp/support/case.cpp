#include "support/case.h"

#include <cmath>
#include <numeric>
#include <random>

namespace onepass::test {
namespace {

std::int64_t numel(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

Values normal(const Shape& shape, double deviation, DType dtype, std::mt19937_64& generator) {
  std::normal_distribution<double> distribution(0.0, deviation);
  Values values(numel(shape));
  for (double& x : values) x = rounded(distribution(generator), dtype);
  return values;
}

std::vector<std::int64_t> starts_of(const std::vector<std::int32_t>& lengths) {
  std::vector<std::int64_t> starts(lengths.size() + 1, 0);
  for (std::size_t b = 0; b < lengths.size(); ++b) starts[b + 1] = starts[b] + lengths[b];
  return starts;
}

bool varies(const Case& c, char dimension) { return c.bias.find(dimension) != std::string::npos; }

DType statistic_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

template <class Container>
Tensor int32_tensor(const Container& values, Device device) {
  if (values.empty()) return {};
  return Tensor(DType::kInt32, {static_cast<std::int64_t>(values.size())}, Values(values.begin(), values.end()),
                Layout::kContiguous, device);
}

Layout layout_of(Layouts layouts, int tensor) {
  constexpr Layout kMixed[] = {Layout::kPadded, Layout::kSwapped, Layout::kReversed, Layout::kContiguous};
  switch (layouts) {
    case Layouts::kContiguous: return Layout::kContiguous;
    case Layouts::kSwapped: return Layout::kSwapped;
    case Layouts::kPadded: return Layout::kPadded;
    case Layouts::kMixed: return kMixed[tensor % 4];
  }
  return Layout::kContiguous;
}

}  // namespace

Instance::Instance(const Case& definition, DType dtype_, std::uint64_t seed) : c(definition), dtype(dtype_) {
  if (c.head_dim_v == 0) c.head_dim_v = c.head_dim;
  if (c.ragged()) {
    start_q = starts_of(c.lengths_q);
    start_k = starts_of(c.lengths_k);
    c.batch = static_cast<std::int64_t>(c.lengths_q.size());
    total_q = start_q.back() + c.tail;
    total_k = start_k.back() + c.tail;
  }
  std::mt19937_64 generator(seed);
  const DType extras = c.float32_extras ? DType::kFloat32 : dtype;
  q = normal(query_shape(c.head_dim), c.magnitude, dtype, generator);
  k = normal(key_shape(c.head_dim), c.magnitude, dtype, generator);
  v = normal(key_shape(c.head_dim_v), 1.0, dtype, generator);
  dout = normal(query_shape(c.head_dim_v), 1.0, dtype, generator);
  if (!c.bias.empty()) bias = normal(bias_shape(), 1.0, extras, generator);
  if (c.sinks) sinks = normal({c.num_heads}, 1.0, extras, generator);
  if (c.alibi != AlibiKind::kNone) {
    const std::int64_t rows = c.alibi == AlibiKind::kPerBatch ? c.batch : 1;
    for (std::int64_t b = 0; b < rows; ++b) {
      for (std::int64_t h = 0; h < c.num_heads; ++h) {
        slopes.push_back(rounded(alibi_slope(h, c.num_heads) / double(b + 1), DType::kFloat32));
      }
    }
  }
  if (c.dist_threshold) {
    q2 = normal(query_shape(c.head_dim), c.magnitude, dtype, generator);
    k2 = normal(key_shape(c.head_dim), c.magnitude, dtype, generator);
  }
}

double Instance::scale() const {
  return rounded(c.scale.value_or(1.0 / std::sqrt(static_cast<double>(c.head_dim))), DType::kFloat32);
}

std::int64_t Instance::query_row(std::int64_t b, std::int64_t h, std::int64_t i) const {
  return c.ragged() ? (start_q[b] + i) * c.num_heads + h : (b * c.num_heads + h) * c.seqlen_q + i;
}
std::int64_t Instance::key_row(std::int64_t b, std::int64_t g, std::int64_t j) const {
  return c.ragged() ? (start_k[b] + j) * c.num_heads_kv + g : (b * c.num_heads_kv + g) * c.seqlen_k + j;
}
std::int64_t Instance::lse_at(std::int64_t b, std::int64_t h, std::int64_t i) const {
  return c.ragged() ? h * total_q + start_q[b] + i : (b * c.num_heads + h) * c.seqlen_q + i;
}
std::int64_t Instance::total_at(std::int64_t b, std::int64_t h, std::int64_t j) const {
  return c.ragged() ? h * total_k + start_k[b] + j : (b * c.num_heads + h) * c.seqlen_k + j;
}
std::int64_t Instance::bias_at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
  const Shape shape = bias_shape();
  const std::int64_t index[] = {b, h, i, j};
  std::int64_t position = 0;
  for (int d = 0; d < 4; ++d) position = position * shape[d] + (shape[d] == 1 ? 0 : index[d]);
  return position;
}

bool Instance::visible(std::int64_t b, std::int64_t i, std::int64_t j) const {
  const std::int64_t center = i + diagonal(b);
  return j >= 0 && j < length_k(b) && (c.key_begin.empty() || j >= c.key_begin[b]) &&
         (c.key_end.empty() || j < c.key_end[b]) && (!c.causal || j <= center) && (!c.left || j >= center - *c.left) &&
         (!c.right || j <= center + *c.right);
}

bool Instance::is_far(std::int64_t b, std::int64_t i, std::int64_t j) const {
  return c.dist_threshold && i + diagonal(b) - j >= *c.dist_threshold;
}

double Instance::alibi(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
  if (c.alibi == AlibiKind::kNone) return 0.0;
  const double slope = slopes[c.alibi == AlibiKind::kPerBatch ? b * c.num_heads + h : h];
  const double past = static_cast<double>(i + diagonal(b) - j);
  if (past < 0) return c.alibi == AlibiKind::kZeroForFuture ? 0.0 : slope * past;
  return -slope * past;
}

Shape Instance::query_shape(std::int64_t dim) const {
  return c.ragged() ? Shape{total_q, c.num_heads, dim} : Shape{c.batch, c.num_heads, c.seqlen_q, dim};
}
Shape Instance::key_shape(std::int64_t dim) const {
  return c.ragged() ? Shape{total_k, c.num_heads_kv, dim} : Shape{c.batch, c.num_heads_kv, c.seqlen_k, dim};
}
Shape Instance::lse_shape() const {
  return c.ragged() ? Shape{c.num_heads, total_q} : Shape{c.batch, c.num_heads, c.seqlen_q};
}
Shape Instance::total_shape() const {
  return c.ragged() ? Shape{c.num_heads, total_k} : Shape{c.batch, c.num_heads, c.seqlen_k};
}
Shape Instance::bias_shape() const {
  return {varies(c, 'b') ? c.batch : 1, varies(c, 'h') ? c.num_heads : 1, varies(c, 'q') ? c.seqlen_q : 1,
          varies(c, 'k') ? c.seqlen_k : 1};
}

Call::Call(const Instance& instance_, DType dtype_) : instance(instance_), dtype(dtype_) {
  const Case& c = instance.c;
  const Device device = instance.device;
  const DType statistic = statistic_dtype(dtype), extras = c.float32_extras ? statistic : dtype;
  int count = 0;
  const auto layout = [&] { return layout_of(c.layouts, count++); };
  q = Tensor(dtype, instance.query_shape(c.head_dim), instance.q, layout(), device);
  k = Tensor(dtype, instance.key_shape(c.head_dim), instance.k, layout(), device);
  v = Tensor(dtype, instance.key_shape(c.head_dim_v), instance.v, layout(), device);
  out = Tensor(dtype, instance.query_shape(c.head_dim_v), layout(), device);
  lse = Tensor(statistic, instance.lse_shape(), layout(), device);
  total = Tensor(statistic, instance.total_shape(), layout(), device);
  dout = Tensor(dtype, instance.query_shape(c.head_dim_v), instance.dout, layout(), device);
  dq = Tensor(dtype, instance.query_shape(c.head_dim), layout(), device);
  dk = Tensor(dtype, instance.key_shape(c.head_dim), layout(), device);
  dv = Tensor(dtype, instance.key_shape(c.head_dim_v), layout(), device);
  if (!c.bias.empty()) {
    bias = Tensor(extras, instance.bias_shape(), instance.bias, layout(), device);
    dbias = Tensor(statistic, instance.bias_shape(), layout(), device);
  }
  if (c.sinks) {
    sinks = Tensor(extras, {c.num_heads}, instance.sinks, Layout::kContiguous, device);
    dsinks = Tensor(statistic, {c.num_heads}, Layout::kContiguous, device);
  }
  if (!instance.slopes.empty()) {
    const Shape shape = c.alibi == AlibiKind::kPerBatch ? Shape{c.batch, c.num_heads} : Shape{c.num_heads};
    slopes = Tensor(DType::kFloat32, shape, instance.slopes, Layout::kContiguous, device);
  }
  if (c.dist_threshold) {
    q2 = Tensor(dtype, instance.query_shape(c.head_dim), instance.q2, layout(), device);
    k2 = Tensor(dtype, instance.key_shape(c.head_dim), instance.k2, layout(), device);
    dq2 = Tensor(dtype, instance.query_shape(c.head_dim), layout(), device);
    dk2 = Tensor(dtype, instance.key_shape(c.head_dim), layout(), device);
  }
  cu_seqlens_q = int32_tensor(instance.start_q, device);
  cu_seqlens_k = int32_tensor(instance.start_k, device);
  key_begin = int32_tensor(c.key_begin, device);
  key_end = int32_tensor(c.key_end, device);
}

AttentionOptions Call::options() const {
  const Case& c = instance.c;
  return {.causal = c.causal,
          .alignment = c.top_left ? CausalAlignment::kTopLeft : CausalAlignment::kBottomRight,
          .softmax_scale = instance.scale(),
          .window = {c.left, c.right},
          .softcap = c.softcap,
          .alibi = {slopes, c.alibi == AlibiKind::kZeroForFuture},
          .bias = bias,
          .sinks = sinks,
          .key_begin = key_begin,
          .key_end = key_end,
          .dropout = {c.dropout, kDropoutSeed, kDropoutOffset},
          .deterministic = deterministic};
}

void Call::forward(const ExecutionContext& context) {
  if (instance.c.dist_threshold) {
    piecewise_attention(q, k, q2, k2, v, *instance.c.dist_threshold, {out, lse, total}, options(), context);
  } else if (instance.c.ragged()) {
    varlen_attention(q, k, v, {cu_seqlens_q, cu_seqlens_k}, {out, lse, total}, options(), context);
  } else {
    attention(q, k, v, {out, lse, total}, options(), context);
  }
}

void Call::backward(const ExecutionContext& context) {
  const AttentionGradients gradients{dq, dk, dv, dbias, dsinks};
  if (instance.c.dist_threshold) {
    piecewise_attention_backward(dout, q, k, q2, k2, v, *instance.c.dist_threshold, out, lse, {gradients, dq2, dk2},
                                 options(), context);
  } else if (instance.c.ragged()) {
    varlen_attention_backward(dout, q, k, v, {cu_seqlens_q, cu_seqlens_k}, out, lse, gradients, options(), context);
  } else {
    attention_backward(dout, q, k, v, out, lse, gradients, options(), context);
  }
}

Results Call::results() const {
  return {out.load(), lse.load(),   total.load(),  dq.load(),  dk.load(),
          dv.load(),  dbias.load(), dsinks.load(), dq2.load(), dk2.load()};
}

std::vector<Tensor*> Call::outputs() {
  std::vector<Tensor*> all{&out, &lse, &total, &dq, &dk, &dv};
  for (Tensor* optional : {&dbias, &dsinks, &dq2, &dk2}) {
    if (optional->view().given()) all.push_back(optional);
  }
  return all;
}

Results run(const Instance& instance, DType dtype, const ExecutionContext& context, bool with_backward) {
  Call call(instance, dtype);
  call.forward(context);
  if (with_backward) call.backward(context);
  return call.results();
}

Results oracle(const Instance& instance, bool with_backward) {
  Instance on_host = instance;
  on_host.device = {};
  on_host.c.layouts = Layouts::kContiguous;
  return run(on_host, DType::kFloat64, {.backend = "reference"}, with_backward);
}

}  // namespace onepass::test
