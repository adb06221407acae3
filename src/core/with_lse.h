// core/with_lse.h: total attention is a second pass over the scores, from the LSE of the first, and so may be a part of
// piecewise attention: they need one also where the caller did not ask for it.
#pragma once

#include "core/parallel.h"
#include "core/problem.h"

namespace onepass {

// The problem with an LSE, its own where need be. Construct it before anything is written: it takes memory.
class WithLse {
 public:
  WithLse(const Problem& problem, const ExecutionContext& context)
      : WithLse(problem, context, static_cast<bool>(problem.total_attention)) {}
  WithLse(const Problem& problem, const ExecutionContext& context, bool needed)
      : memory_(context, problem.device, needed && !problem.lse ? rows(problem) * sizeof(float) : 0),
        problem_(problem) {
    if (!needed || problem.lse) return;
    const std::int64_t tokens = problem.ragged() ? problem.total_q : problem.seqlen_q;
    problem_.lse = {.data = memory_.as<float>(),
                    .batch_stride = problem.ragged() ? 0 : problem.num_heads * tokens,
                    .head_stride = tokens};
  }

  const Problem& problem() const { return problem_; }

 private:
  static std::size_t rows(const Problem& problem) {
    return static_cast<std::size_t>(problem.num_heads * problem.total_q);
  }

  Workspace memory_;
  Problem problem_;
};

}  // namespace onepass
