#include <tuple>

#include "context.h"
#include "kernels.h"
#include "onepass/attention.h"
#include "tensor.h"

namespace onepass::binding {

void merge_states(Stack stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  const Tensor given_a = arguments.tensor(), lse_a = arguments.tensor();
  const Tensor given_b = arguments.tensor(), lse_b = arguments.tensor();
  const auto [out, lse] = translate_errors([&] {
    constexpr const char* kOperation = "merge_states";
    const Tensor out_a = with_contiguous_rows(given_a), out_b = with_contiguous_rows(given_b);
    const TensorView a = view_of(out_a, kOperation, "out_a", 4), rows_a = view_of(lse_a, kOperation, "lse_a", 3);
    const TensorView b = view_of(out_b, kOperation, "out_b"), rows_b = view_of(lse_b, kOperation, "lse_b");
    NewTensor merged = empty_like(a);
    NewTensor rows = empty_contiguous({rows_a.shape[0], rows_a.shape[1], rows_a.shape[2]}, rows_a.dtype, a.device);
    const CallContext context(a.device);
    onepass::merge_states(a, rows_a, b, rows_b, merged.view, rows.view, context.get());
    return std::tuple(merged.tensor, rows.tensor);
  });
  set_results(stack, out, lse);
}

}  // namespace onepass::binding
