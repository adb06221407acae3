// csrc/library.cpp: the operations of torch.ops.onepass. Python adds their fake kernels and autograd
// (onepass/_ops.py, onepass/autograd.py); nothing here needs the Python headers.
#include <torch/csrc/stable/library.h>

#include "kernels.h"
#include "options.h"

namespace {

#define ONEPASS_VARLEN_OPERANDS \
  "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
#define ONEPASS_PIECEWISE_ARGUMENTS                                                                         \
  "Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, SymInt dist_threshold, bool causal=False, float? " \
  "softmax_scale=None"
#define ONEPASS_BACKWARD_REQUEST ", bool bias_gradient=False, bool sinks_gradient=False, bool deterministic=False"

template <class Library>
void register_kernels(Library& library) {
  using namespace onepass::binding;
  library.impl("plain_attention", &plain_attention);
  library.impl("attention", &attention);
  library.impl("attention_with_lse", &attention_with_lse);
  library.impl("attention_backward", &attention_backward);
  library.impl("varlen_attention", &varlen_attention);
  library.impl("varlen_attention_with_lse", &varlen_attention_with_lse);
  library.impl("varlen_attention_backward", &varlen_attention_backward);
  library.impl("total_attention", &total_attention);
  library.impl("piecewise_attention", &piecewise_attention);
  library.impl("piecewise_attention_backward", &piecewise_attention_backward);
  library.impl("merge_states", &merge_states);
}

}  // namespace

STABLE_TORCH_LIBRARY(onepass, library) {
  library.def("plain_attention(Tensor q, Tensor k, Tensor v, bool causal=False, float? softmax_scale=None) -> Tensor");
  library.def("attention(Tensor q, Tensor k, Tensor v, " ONEPASS_ATTENTION_OPTIONS ") -> Tensor");
  library.def("attention_with_lse(Tensor q, Tensor k, Tensor v, " ONEPASS_ATTENTION_OPTIONS
              ", bool return_total_attention=False) -> (Tensor out, Tensor lse, Tensor total_attention)");
  library.def("attention_backward(Tensor dout, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "  //
              ONEPASS_ATTENTION_OPTIONS ONEPASS_BACKWARD_REQUEST
              ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)");
  library.def("varlen_attention(" ONEPASS_VARLEN_OPERANDS ONEPASS_ATTENTION_OPTIONS ") -> Tensor");
  library.def("varlen_attention_with_lse(" ONEPASS_VARLEN_OPERANDS ONEPASS_ATTENTION_OPTIONS
              ", bool return_total_attention=False) -> (Tensor out, Tensor lse, Tensor total_attention)");
  library.def("varlen_attention_backward(Tensor dout, Tensor out, Tensor lse, "  //
              ONEPASS_VARLEN_OPERANDS ONEPASS_ATTENTION_OPTIONS ONEPASS_BACKWARD_REQUEST
              ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)");
  library.def(
      "total_attention(Tensor q, Tensor k, Tensor lse, bool causal=False, float? softmax_scale=None) -> Tensor");
  library.def("piecewise_attention(" ONEPASS_PIECEWISE_ARGUMENTS ") -> (Tensor out, Tensor lse)");
  library.def("piecewise_attention_backward(Tensor dout, Tensor out, Tensor lse, " ONEPASS_PIECEWISE_ARGUMENTS
              ", bool deterministic=False) -> (Tensor dq1, Tensor dk1, Tensor dq2, Tensor dk2, Tensor dv)");
  library.def("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");
  library.def("info() -> str");
  library.def("version() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(onepass, CPU, library) { register_kernels(library); }
STABLE_TORCH_LIBRARY_IMPL(onepass, CUDA, library) { register_kernels(library); }
STABLE_TORCH_LIBRARY_IMPL(onepass, CompositeExplicitAutograd, library) {
  library.impl("info", &onepass::binding::info);
  library.impl("version", &onepass::binding::version);
}
