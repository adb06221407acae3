// cpu/total_attention.h: column sums of the softmax weights, from the LSE.
#pragma once

#include "core/piecewise.h"
#include "cpu/workers.h"
#include "onepass/execution.h"

namespace onepass::cpu {

// The second pass of a call that wants total attention. Takes its memory when constructed, so before the first pass
// has written anything; runs after it. The parts' lse is given.
class TotalAttention {
 public:
  TotalAttention(Parts parts, const ExecutionContext& context);
  void run() const;

 private:
  Parts parts_;
  Workers workers_;
};

// Writes problem.total_attention from problem.lse.
void total_attention(const Problem& problem, const ExecutionContext& context);

}  // namespace onepass::cpu
