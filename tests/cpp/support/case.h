// support/case.h: one named attention call: sizes, options and layout, its random inputs, and how to run it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "onepass/onepass.h"
#include "support/tensor.h"

namespace onepass::test {

inline constexpr std::uint64_t kDropoutSeed = 0x0123456789ABCDEF, kDropoutOffset = 0x1F00000003;

enum class AlibiKind { kNone, kPerHead, kPerBatch, kZeroForFuture };
enum class Layouts { kContiguous, kSwapped, kPadded, kMixed };  // of all tensors; mixed: each its own

struct Case {
  std::string name = {};
  std::int64_t batch = 2, num_heads = 4, num_heads_kv = 2;
  std::int64_t seqlen_q = 70, seqlen_k = 90, head_dim = 64;
  std::int64_t head_dim_v = 0;                               // 0: head_dim
  std::vector<std::int32_t> lengths_q = {}, lengths_k = {};  // ragged when given; batch and seqlens follow
  std::int64_t tail = 0;                                     // tokens of a ragged tensor after its last sequence

  bool causal = false, top_left = false;
  std::optional<std::int64_t> left = {}, right = {};
  std::vector<std::int32_t> key_begin = {}, key_end = {};
  std::optional<double> scale = {};  // default 1/√head_dim
  double softcap = 0.0;
  AlibiKind alibi = AlibiKind::kNone;
  std::string bias = "";  // of "bhqk" the dimensions that are not broadcast; "1": all are; "": no bias
  bool sinks = false;
  bool float32_extras = false;  // bias and sinks in float32 beside half operands
  double dropout = 0.0;

  double magnitude = 1.0;                           // standard deviation of q and k
  std::optional<std::int64_t> dist_threshold = {};  // given: piecewise attention, with a second q and k
  Layouts layouts = Layouts::kContiguous;

  bool ragged() const { return !lengths_q.empty(); }
};

struct Results {
  Values out, lse, total;            // forward
  Values dq, dk, dv, dbias, dsinks;  // backward
  Values dq2, dk2;                   // of the far pair; empty but for piecewise attention
};

// A case with inputs, all representable in `dtype`.
struct Instance {
  Instance(const Case& definition, DType dtype, std::uint64_t seed = 1);

  Case c;
  DType dtype;
  Device device = {};
  std::vector<std::int64_t> start_q, start_k;  // ragged: (batch + 1) token offsets
  std::int64_t total_q = 0, total_k = 0;       // ragged: tokens
  Values q, k, v, dout, slopes, bias, sinks;
  Values q2, k2;  // piecewise: the far pair

  double scale() const;  // representable in float32, so that every backend gets the same
  std::int64_t length_q(std::int64_t b) const { return c.ragged() ? c.lengths_q[b] : c.seqlen_q; }
  std::int64_t length_k(std::int64_t b) const { return c.ragged() ? c.lengths_k[b] : c.seqlen_k; }
  std::int64_t diagonal(std::int64_t b) const { return c.top_left ? 0 : length_k(b) - length_q(b); }

  // Position of a row in the Values of q and out, of k and v, of lse, and of total attention.
  std::int64_t query_row(std::int64_t b, std::int64_t h, std::int64_t i) const;
  std::int64_t key_row(std::int64_t b, std::int64_t g, std::int64_t j) const;
  std::int64_t lse_at(std::int64_t b, std::int64_t h, std::int64_t i) const;
  std::int64_t total_at(std::int64_t b, std::int64_t h, std::int64_t j) const;
  std::int64_t bias_at(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const;

  // Mask and distance by their definitions, independent of the library's.
  bool visible(std::int64_t b, std::int64_t i, std::int64_t j) const;
  bool is_far(std::int64_t b, std::int64_t i, std::int64_t j) const;
  double alibi(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const;

  Shape query_shape(std::int64_t dim) const;
  Shape key_shape(std::int64_t dim) const;
  Shape lse_shape() const;
  Shape total_shape() const;
  Shape bias_shape() const;
};

// A call's tensors in the case's layouts, in the dtype asked for, which may be wider than the instance's.
struct Call {
  Call(const Instance& instance, DType dtype);

  const Instance& instance;
  DType dtype;
  Tensor q, k, v, out, lse, total;
  Tensor dout, dq, dk, dv, dbias, dsinks;
  Tensor q2, k2, dq2, dk2;
  Tensor bias, sinks, slopes, cu_seqlens_q, cu_seqlens_k, key_begin, key_end;
  bool deterministic = true;  // so that gradients can be compared bit for bit

  AttentionOptions options() const;
  void forward(const ExecutionContext& context);
  void backward(const ExecutionContext& context);  // from what is in out and lse
  Results results() const;
  std::vector<Tensor*> outputs();  // of both passes
};

// Forward, then backward from its out and lse.
Results run(const Instance& instance, DType dtype, const ExecutionContext& context, bool with_backward = true);

// The oracle: the reference backend on float64 tensors that hold the instance's values.
Results oracle(const Instance& instance, bool with_backward = true);

}  // namespace onepass::test
