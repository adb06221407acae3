// cuda/hopper/total_attention.h: the sum over queries of the attention weights on sm_90a, from the log-sum-exp.
#pragma once

#include <optional>

#include "core/backend.h"
#include "core/parallel.h"
#include "cuda/hopper/total_attention_plan.h"

namespace onepass::cuda::hopper {

Unsupported supports_total_attention(const Problem& problem);
void total_attention(const Problem& problem, const ExecutionContext& context);

// The second pass of a problem that supports_total_attention() accepts, on the current device.
class ColumnSums {
 public:
  // Takes its memory: before the first pass writes. `problem` stays alive and has an LSE.
  ColumnSums(const Problem& problem, const ExecutionContext& context);
  // Writes problem.total_attention, or adds to it; problem.lse has been written on the same stream.
  void run(bool add = false) const;

 private:
  const Problem& problem_;
  const ExecutionContext& context_;
  const TotalAttentionKernel& kernel_;
  std::int64_t tiles_, blocks_;
  std::optional<Workspace> counter_;
};

}  // namespace onepass::cuda::hopper
