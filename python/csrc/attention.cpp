// csrc/attention.cpp: attention, dense and ragged, forward and backward.
#include "onepass/attention.h"

#include <optional>
#include <tuple>

#include "context.h"
#include "kernels.h"
#include "options.h"
#include "tensor.h"

namespace onepass::binding {
namespace {

enum class Form { kDense, kVarlen };

constexpr int rank_of(Form form) { return form == Form::kDense ? 4 : 3; }
constexpr const char* name_of(Form form) { return form == Form::kDense ? "attention" : "varlen_attention"; }
constexpr const char* backward_name_of(Form form) {
  return form == Form::kDense ? "attention_backward" : "varlen_attention_backward";
}

// q, k, v and, ragged, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k.
struct Operands {
  Operands(Arguments& arguments, Form form) : q(arguments.tensor()), k(arguments.tensor()), v(arguments.tensor()) {
    if (form == Form::kDense) return;
    cu_seqlens_q = arguments.tensor();
    cu_seqlens_k = arguments.tensor();
    max_seqlen_q = arguments.integer();
    max_seqlen_k = arguments.integer();
  }

  // Kernels read rows as they lie: those strided in the last dimension are copied.
  void make_rows_contiguous() {
    for (Tensor* operand : {&q, &k, &v}) *operand = with_contiguous_rows(*operand);
  }

  VarlenShape varlen_shape(const char* operation) const {
    return {.cu_seqlens_q = view_of(cu_seqlens_q, operation, "cu_seqlens_q"),
            .cu_seqlens_k = view_of(cu_seqlens_k, operation, "cu_seqlens_k"),
            .max_seqlen_q = max_seqlen_q,
            .max_seqlen_k = max_seqlen_k};
  }

  Tensor q, k, v;
  OptionalTensor cu_seqlens_q, cu_seqlens_k;
  std::int64_t max_seqlen_q = 0, max_seqlen_k = 0;
};

struct OperandViews {
  OperandViews(const Operands& operands, Form form, const char* operation)
      : q(view_of(operands.q, operation, "q", rank_of(form))),
        k(view_of(operands.k, operation, "k", rank_of(form))),
        v(view_of(operands.v, operation, "v", rank_of(form))) {}

  TensorView q, k, v;
};

NewTensor empty_out(const OperandViews& operands, Form form) {
  const auto& q = operands.q.shape;
  const auto& v = operands.v.shape;
  return form == Form::kDense ? empty_in_order_of(operands.q, {q[0], q[1], q[2], v[3]})
                              : empty_in_order_of(operands.q, {q[0], q[1], v[2]});
}

// A scalar for each head and token of `tokens` (q or k): (batch, num_heads, seqlen) or (num_heads, total).
NewTensor empty_rows(const OperandViews& operands, const TensorView& tokens, Form form) {
  const auto& q = operands.q.shape;
  const DType dtype = accumulator_of(operands.q.dtype);
  return form == Form::kDense ? empty_contiguous({q[0], q[1], tokens.shape[2]}, dtype, operands.q.device)
                              : empty_contiguous({q[1], tokens.shape[0]}, dtype, operands.q.device);
}

// An output that was not asked for: torch's schemas have no optional result.
NewTensor no_tensor(const TensorView& like) { return empty_contiguous({0}, accumulator_of(like.dtype), like.device); }

void run(const Operands& operands, const OperandViews& views, Form form, const AttentionOutputs& outputs,
         const AttentionOptions& options) {
  const CallContext context(views.q.device);
  if (form == Form::kDense) {
    onepass::attention(views.q, views.k, views.v, outputs, options, context.get());
  } else {
    onepass::varlen_attention(views.q, views.k, views.v, operands.varlen_shape(name_of(form)), outputs, options,
                              context.get());
  }
}

void forward(Stack stack, Form form) {
  Arguments arguments(stack);
  Operands operands(arguments, form);
  const OptionArguments options(arguments);
  const Tensor out = translate_errors([&] {
    operands.make_rows_contiguous();
    const OperandViews views(operands, form, name_of(form));
    NewTensor result = empty_out(views, form);
    run(operands, views, form, {.out = result.view}, options.view(name_of(form)));
    return result.tensor;
  });
  set_results(stack, out);
}

void forward_with_lse(Stack stack, Form form) {
  Arguments arguments(stack);
  Operands operands(arguments, form);
  const OptionArguments options(arguments);
  const bool wants_total = arguments.boolean();
  const auto [out, lse, total] = translate_errors([&] {
    operands.make_rows_contiguous();
    const OperandViews views(operands, form, name_of(form));
    NewTensor result = empty_out(views, form);
    NewTensor rows = empty_rows(views, views.q, form);
    NewTensor keys = wants_total ? empty_rows(views, views.k, form) : no_tensor(views.q);
    run(operands, views, form,
        {.out = result.view, .lse = rows.view, .total_attention = wants_total ? keys.view : TensorView{}},
        options.view(name_of(form)));
    return std::tuple(result.tensor, rows.tensor, keys.tensor);
  });
  set_results(stack, out, lse, total);
}

// dout, out and lse, then operands and options as in the forward schema, then what is wanted.
void backward(Stack stack, Form form) {
  Arguments arguments(stack);
  Tensor dout = arguments.tensor(), out = arguments.tensor();
  const Tensor lse = arguments.tensor();
  Operands operands(arguments, form);
  const OptionArguments option_arguments(arguments);
  const bool wants_bias = arguments.boolean(), wants_sinks = arguments.boolean();
  const bool deterministic = arguments.boolean();
  const auto [dq, dk, dv, dbias, dsinks] = translate_errors([&] {
    const char* const operation = backward_name_of(form);
    dout = with_contiguous_rows(dout);
    out = with_contiguous_rows(out);
    operands.make_rows_contiguous();
    const OperandViews views(operands, form, operation);
    AttentionOptions options = option_arguments.view(operation);
    options.deterministic = deterministic;
    const TensorView& bias = options.bias;
    const DType accumulator = accumulator_of(views.q.dtype);
    NewTensor of_q = empty_like(views.q), of_k = empty_like(views.k), of_v = empty_like(views.v);
    NewTensor of_bias = wants_bias && bias.rank == 4
                            ? empty_contiguous({bias.shape[0], bias.shape[1], bias.shape[2], bias.shape[3]},
                                               accumulator, views.q.device)
                            : no_tensor(views.q);
    NewTensor of_sinks =
        wants_sinks ? empty_contiguous({views.q.shape[1]}, accumulator, views.q.device) : no_tensor(views.q);
    const AttentionGradients gradients{.dq = of_q.view,
                                       .dk = of_k.view,
                                       .dv = of_v.view,
                                       .dbias = wants_bias ? of_bias.view : TensorView{},
                                       .dsinks = wants_sinks ? of_sinks.view : TensorView{}};
    const TensorView dout_view = view_of(dout, operation, "dout"), out_view = view_of(out, operation, "out");
    const TensorView lse_view = view_of(lse, operation, "lse");
    const CallContext context(views.q.device);
    if (form == Form::kDense) {
      onepass::attention_backward(dout_view, views.q, views.k, views.v, out_view, lse_view, gradients, options,
                                  context.get());
    } else {
      onepass::varlen_attention_backward(dout_view, views.q, views.k, views.v, operands.varlen_shape(operation),
                                         out_view, lse_view, gradients, options, context.get());
    }
    return std::tuple(of_q.tensor, of_k.tensor, of_v.tensor, of_bias.tensor, of_sinks.tensor);
  });
  set_results(stack, dq, dk, dv, dbias, dsinks);
}

}  // namespace

void plain_attention(Stack stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Operands operands(arguments, Form::kDense);
  const bool causal = arguments.boolean();
  const std::optional<double> softmax_scale = arguments.optional_real();
  const Tensor out = translate_errors([&] {
    operands.make_rows_contiguous();
    const OperandViews views(operands, Form::kDense, name_of(Form::kDense));
    NewTensor result = empty_out(views, Form::kDense);
    run(operands, views, Form::kDense, {.out = result.view}, {.causal = causal, .softmax_scale = softmax_scale});
    return result.tensor;
  });
  set_results(stack, out);
}
void total_attention(Stack stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor q = arguments.tensor(), k = arguments.tensor();
  const Tensor lse = arguments.tensor();
  const bool causal = arguments.boolean();
  const std::optional<double> softmax_scale = arguments.optional_real();
  const Tensor total = translate_errors([&] {
    constexpr const char* kOperation = "total_attention";
    q = with_contiguous_rows(q);
    k = with_contiguous_rows(k);
    const TensorView queries = view_of(q, kOperation, "q", 4), keys = view_of(k, kOperation, "k", 4);
    NewTensor result = empty_contiguous({queries.shape[0], queries.shape[1], keys.shape[2]},
                                        accumulator_of(queries.dtype), queries.device);
    const CallContext context(queries.device);
    onepass::total_attention(queries, keys, view_of(lse, kOperation, "lse"), result.view,
                             {.causal = causal, .softmax_scale = softmax_scale}, context.get());
    return result.tensor;
  });
  set_results(stack, total);
}
void attention(Stack stack, std::uint64_t, std::uint64_t) { forward(stack, Form::kDense); }
void attention_with_lse(Stack stack, std::uint64_t, std::uint64_t) { forward_with_lse(stack, Form::kDense); }
void attention_backward(Stack stack, std::uint64_t, std::uint64_t) { backward(stack, Form::kDense); }
void varlen_attention(Stack stack, std::uint64_t, std::uint64_t) { forward(stack, Form::kVarlen); }
void varlen_attention_with_lse(Stack stack, std::uint64_t, std::uint64_t) { forward_with_lse(stack, Form::kVarlen); }
void varlen_attention_backward(Stack stack, std::uint64_t, std::uint64_t) { backward(stack, Form::kVarlen); }

}  // namespace onepass::binding
