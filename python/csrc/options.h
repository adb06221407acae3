// csrc/options.h: the schema's part that all attention operations share, and AttentionOptions read from it.
#pragma once

#include <cstdint>
#include <optional>

#include "arguments.h"
#include "onepass/attention.h"

namespace onepass::binding {

// Follows the operands in the schema of attention and varlen_attention, forward and backward. dropout_state: int64
// (seed, offset) on the CPU. Everything has a default, so that a plain call passes few arguments.
#define ONEPASS_ATTENTION_OPTIONS                                                                         \
  "bool causal=False, float? softmax_scale=None, Tensor? bias=None, Tensor? sinks=None, "                 \
  "Tensor? alibi_slopes=None, Tensor? key_begin=None, Tensor? key_end=None, Tensor? dropout_state=None, " \
  "float dropout_p=0.0, SymInt? window_left=None, SymInt? window_right=None, float softcap=0.0, "         \
  "bool top_left=False, bool alibi_zero_for_future=False"

// The options' arguments, which own their tensors for the duration of the call.
class OptionArguments {
 public:
  explicit OptionArguments(Arguments& arguments);

  // Checks what cannot be expressed as AttentionOptions; the rest is validated by the operation.
  AttentionOptions view(const char* operation) const;

 private:
  bool causal_;
  std::optional<double> softmax_scale_;
  OptionalTensor bias_, sinks_, alibi_slopes_, key_begin_, key_end_, dropout_state_;
  double dropout_p_;
  std::optional<std::int64_t> window_left_, window_right_;
  double softcap_;
  bool top_left_, alibi_zero_for_future_;
};

}  // namespace onepass::binding
