// api/append_kv.cpp: arguments → AppendProblem, or an error.
#include "api/kv_cache.h"
#include "core/backend.h"

namespace onepass {

void append_kv(const KVCacheView& view, const TensorView& k_new, const TensorView& v_new, const AppendOptions& options,
               const ExecutionContext& context) {
  constexpr const char* kOperation = "append_kv";
  const KVStorage cache = api::lower_cache(kOperation, view);
  const api::NewTensors tensors{
      {"k_new", k_new}, {"v_new", v_new}, {"cu_seqlens", options.cu_seqlens}, {"seqlens", options.seqlens}};
  const AppendProblem problem = api::lower_append(kOperation, view, cache, tensors, options.rotary, options.advance);
  if (problem.device.type == DeviceType::kCpu) {
    api::check_sequences(kOperation, cache, problem.tokens, problem.rotary);
  }
  run_append(problem, context);
}

}  // namespace onepass
