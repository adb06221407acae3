// api/merge_states.cpp: arguments → MergeProblem, or an error.
#include <string>

#include "api/validate.h"
#include "core/backend.h"
#include "onepass/attention.h"

namespace onepass {
namespace {

// An output may be an input, element for element, or lie apart from it; not over other elements of it.
void check_apart_or_same(const char* operation, api::Named output, api::Named input) {
  const TensorView &a = output.view, &b = input.view;
  if (a.data == b.data && a.rank == b.rank && a.shape == b.shape && a.strides == b.strides) return;
  if (api::overlap(a, b)) {
    api::refuse(operation, output.name, std::string("memory that overlaps ") + input.name,
                std::string("memory apart from it, or ") + input.name + " itself");
  }
}

}  // namespace

void merge_states(const TensorView& out_a, const TensorView& lse_a, const TensorView& out_b, const TensorView& lse_b,
                  const TensorView& out, const TensorView& lse, const ExecutionContext& context) {
  constexpr const char* kOperation = "merge_states";
  const auto& s = out_a.shape;
  api::check_tensor(kOperation, {"out_a", out_a}, 4);
  api::check_dtype(kOperation, {"out_a", out_a}, {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64});
  for (const api::Named& part : {api::Named{"out_b", out_b}, api::Named{"out", out}}) {
    api::check_tensor(kOperation, part, 4);
    api::check_dtype(kOperation, part, {out_a.dtype});
    api::check_device(kOperation, part, out_a.device);
    api::check_shape(kOperation, part, {s[0], s[1], s[2], s[3]});
  }
  const DType row_dtype = out_a.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  for (const api::Named& part : {api::Named{"lse_a", lse_a}, api::Named{"lse_b", lse_b}, api::Named{"lse", lse}}) {
    api::check_tensor(kOperation, part, 3, /*any_inner_stride=*/true);
    api::check_dtype(kOperation, part, {row_dtype});
    api::check_device(kOperation, part, out_a.device);
    api::check_shape(kOperation, part, {s[0], s[1], s[2]});
  }
  for (const api::Named& output : {api::Named{"out", out}, api::Named{"lse", lse}}) {
    api::check_output(kOperation, output, {});
    for (const api::Named& input : {api::Named{"out_a", out_a}, api::Named{"lse_a", lse_a}, api::Named{"out_b", out_b},
                                    api::Named{"lse_b", lse_b}}) {
      check_apart_or_same(kOperation, output, input);
    }
  }
  run_merge({.device = out_a.device,
             .dtype = out_a.dtype,
             .batch = s[0],
             .num_heads = s[1],
             .seqlen = s[2],
             .head_dim = s[3],
             .out_a = api::operand_of(out_a),
             .out_b = api::operand_of(out_b),
             .out = api::operand_of(out),
             .lse_a = api::row_vector_of(lse_a),
             .lse_b = api::row_vector_of(lse_b),
             .lse = api::row_vector_of(lse)},
            context);
}

}  // namespace onepass
