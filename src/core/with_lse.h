// core/with_lse.h: total attention is a second pass over the scores, from the LSE of the first: it needs one also where
// the caller did not ask for it.
#pragma once

#include "core/parallel.h"
#include "core/problem.h"

namespace onepass {

// The problem with an LSE, its own where need be. Construct it before anything is written: it takes memory.
class WithLse {
 public:
  WithLse(const Problem& problem, const ExecutionContext& context)
      : memory_(context, problem.device, is_own(problem) ? rows(problem) * sizeof(float) : 0), problem_(problem) {
    if (!is_own(problem)) return;
    const std::int64_t tokens = problem.ragged() ? problem.total_q : problem.seqlen_q;
    problem_.lse = {.data = memory_.as<float>(),
                    .batch_stride = problem.ragged() ? 0 : problem.num_heads * tokens,
                    .head_stride = tokens};
  }

  const Problem& problem() const { return problem_; }

 private:
  static bool is_own(const Problem& problem) { return problem.total_attention && !problem.lse; }
  static std::size_t rows(const Problem& problem) {
    return static_cast<std::size_t>(problem.num_heads * problem.total_q);
  }

  Workspace memory_;
  Problem problem_;
};

}  // namespace onepass
