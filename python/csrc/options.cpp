#include "options.h"

#include "onepass/error.h"
#include "tensor.h"

namespace onepass::binding {
namespace {

Dropout dropout_of(double p, const OptionalTensor& state, const char* operation) {
  Dropout dropout{.p = p};
  if (!(p > 0.0)) return dropout;  // none, or a value that the operation refuses
  const TensorView view = view_of(state, operation, "dropout_state");
  const bool usable = view.rank == 1 && view.shape[0] == 2 && view.strides[0] == 1 && view.dtype == DType::kInt64 &&
                      view.device == Device{};
  if (!usable) {
    throw Error(ErrorCode::kInvalidArgument, std::string(operation) +
                                                 ": dropout_state: got none or another kind of tensor; need int64 "
                                                 "(seed, offset) on the CPU when dropout_p > 0");
  }
  const auto* values = static_cast<const std::int64_t*>(view.data);
  dropout.seed = static_cast<std::uint64_t>(values[0]);
  dropout.offset = static_cast<std::uint64_t>(values[1]);
  return dropout;
}

}  // namespace

// Members are initialised in the order of their declaration, which is that of the schema.
OptionArguments::OptionArguments(Arguments& arguments)
    : causal_(arguments.boolean()),
      softmax_scale_(arguments.optional_real()),
      bias_(arguments.optional_tensor()),
      sinks_(arguments.optional_tensor()),
      alibi_slopes_(arguments.optional_tensor()),
      key_begin_(arguments.optional_tensor()),
      key_end_(arguments.optional_tensor()),
      dropout_state_(arguments.optional_tensor()),
      dropout_p_(arguments.real()),
      window_left_(arguments.optional_integer()),
      window_right_(arguments.optional_integer()),
      softcap_(arguments.real()),
      top_left_(arguments.boolean()),
      alibi_zero_for_future_(arguments.boolean()) {}

AttentionOptions OptionArguments::view(const char* operation) const {
  return {
      .causal = causal_,
      .alignment = top_left_ ? CausalAlignment::kTopLeft : CausalAlignment::kBottomRight,
      .softmax_scale = softmax_scale_,
      .window = {.left = window_left_, .right = window_right_},
      .softcap = softcap_,
      .alibi = {.slopes = view_of(alibi_slopes_, operation, "alibi_slopes"), .zero_for_future = alibi_zero_for_future_},
      .bias = view_of(bias_, operation, "bias"),
      .sinks = view_of(sinks_, operation, "sinks"),
      .key_begin = view_of(key_begin_, operation, "key_begin"),
      .key_end = view_of(key_end_, operation, "key_end"),
      .dropout = dropout_of(dropout_p_, dropout_state_, operation)};
}

}  // namespace onepass::binding
