// csrc/piecewise.cpp: piecewise attention, forward and backward.
#include "onepass/piecewise.h"

#include <optional>
#include <tuple>

#include "context.h"
#include "kernels.h"
#include "tensor.h"

namespace onepass::binding {
namespace {

// q1, k1, q2, k2, v, dist_threshold, causal and softmax_scale, in the order of the schemas.
struct PiecewiseArguments {
  explicit PiecewiseArguments(Arguments& arguments)
      : q1(arguments.tensor()),
        k1(arguments.tensor()),
        q2(arguments.tensor()),
        k2(arguments.tensor()),
        v(arguments.tensor()),
        dist_threshold(arguments.integer()),
        causal(arguments.boolean()),
        softmax_scale(arguments.optional_real()) {}

  // Kernels read rows as they lie: those strided in the last dimension are copied.
  void make_rows_contiguous() {
    for (Tensor* operand : {&q1, &k1, &q2, &k2, &v}) *operand = with_contiguous_rows(*operand);
  }
  AttentionOptions options() const { return {.causal = causal, .softmax_scale = softmax_scale}; }

  Tensor q1, k1, q2, k2, v;
  std::int64_t dist_threshold;
  bool causal;
  std::optional<double> softmax_scale;
};

struct PiecewiseViews {
  PiecewiseViews(const PiecewiseArguments& given, const char* operation)
      : q1(view_of(given.q1, operation, "q1", 4)),
        k1(view_of(given.k1, operation, "k1", 4)),
        q2(view_of(given.q2, operation, "q2", 4)),
        k2(view_of(given.k2, operation, "k2", 4)),
        v(view_of(given.v, operation, "v", 4)) {}

  TensorView q1, k1, q2, k2, v;
};

}  // namespace

void piecewise_attention(Stack stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  PiecewiseArguments given(arguments);
  const auto [out, lse] = translate_errors([&] {
    given.make_rows_contiguous();
    const PiecewiseViews views(given, "piecewise_attention");
    const auto& q = views.q1.shape;
    NewTensor result = empty_in_order_of(views.q1, {q[0], q[1], q[2], views.v.shape[3]});
    NewTensor rows = empty_contiguous({q[0], q[1], q[2]}, accumulator_of(views.q1.dtype), views.q1.device);
    const CallContext context(views.q1.device);
    onepass::piecewise_attention(views.q1, views.k1, views.q2, views.k2, views.v, given.dist_threshold,
                                 {.out = result.view, .lse = rows.view}, given.options(), context.get());
    return std::tuple(result.tensor, rows.tensor);
  });
  set_results(stack, out, lse);
}

void piecewise_attention_backward(Stack stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor dout = arguments.tensor(), out = arguments.tensor();
  const Tensor lse = arguments.tensor();
  PiecewiseArguments given(arguments);
  const bool deterministic = arguments.boolean();
  const auto [dq1, dk1, dq2, dk2, dv] = translate_errors([&] {
    constexpr const char* kOperation = "piecewise_attention_backward";
    dout = with_contiguous_rows(dout);
    out = with_contiguous_rows(out);
    given.make_rows_contiguous();
    const PiecewiseViews views(given, kOperation);
    NewTensor of_q1 = empty_like(views.q1), of_k1 = empty_like(views.k1), of_v = empty_like(views.v);
    NewTensor of_q2 = empty_like(views.q2), of_k2 = empty_like(views.k2);
    AttentionOptions options = given.options();
    options.deterministic = deterministic;
    const PiecewiseGradients gradients{
        .near = {.dq = of_q1.view, .dk = of_k1.view, .dv = of_v.view}, .dq2 = of_q2.view, .dk2 = of_k2.view};
    const CallContext context(views.q1.device);
    onepass::piecewise_attention_backward(view_of(dout, kOperation, "dout"), views.q1, views.k1, views.q2, views.k2,
                                          views.v, given.dist_threshold, view_of(out, kOperation, "out"),
                                          view_of(lse, kOperation, "lse"), gradients, options, context.get());
    return std::tuple(of_q1.tensor, of_k1.tensor, of_q2.tensor, of_k2.tensor, of_v.tensor);
  });
  set_results(stack, dq1, dk1, dq2, dk2, dv);
}

}  // namespace onepass::binding
