// fuzz/fuzz_c_api.cpp: bytes → a nearly valid call of the C interface on tensors between guard pages.
//
// What must hold: the status is one of the table; a refused call says what is needed and has written nothing; an
// accepted one gives the same bits twice, and what the float64 reference gives.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "bytes.h"
#include "onepass/onepass_c.h"
#include "slots.h"

namespace onepass::fuzz {
namespace {

struct Call {
  explicit Call(Bytes& bytes);

  onepass_status run(const char* backend);
  bool usable = true;  // false: the call might be valid, but needs memory that nobody has
  bool backward = false;
  bool forward_accepted = false;  // by the last run
  Slot q, k, v, out, lse, total, dout, dq, dk, dv, dbias, dsinks;
  Slot bias, sinks, slopes, key_begin, key_end, cu_q, cu_k;
  Slot q2, k2, dq2, dk2;  // piecewise attention, when given
  std::vector<Slot*> slots{&q,    &k,     &v,      &out,       &lse,     &total, &dout, &dq, &dk, &dv,  &dbias, &dsinks,
                           &bias, &sinks, &slopes, &key_begin, &key_end, &cu_q,  &cu_k, &q2, &k2, &dq2, &dk2};
  onepass_attention_options options = ONEPASS_ATTENTION_OPTIONS_INIT;

 private:
  void describe(Bytes& bytes);
  void spoil(Bytes& bytes);
  void allocate(Bytes& bytes);

  bool ragged_ = false, piecewise_ = false;
  std::int64_t dist_threshold_ = 0;
};

void Call::describe(Bytes& bytes) {
  const std::int32_t dtype = static_cast<std::int32_t>(bytes.below(4));
  const std::int32_t statistic = dtype == ONEPASS_FLOAT64 ? ONEPASS_FLOAT64 : ONEPASS_FLOAT32;
  const std::int64_t batch = bytes.below(4), group = 1 + bytes.below(3), heads_kv = 1 + bytes.below(2);
  const std::int64_t heads = group * heads_kv, sq = bytes.below(40), sk = bytes.below(70);
  const std::int64_t dim = 1 + bytes.below(70), dim_v = bytes.one_in(3) ? 1 + bytes.below(70) : dim;
  const bool swapped = bytes.one_in(3);
  ragged_ = bytes.one_in(3);
  backward = bytes.one_in(2);
  const auto operand = [&](Slot& slot, Role role, std::int64_t h, std::int64_t tokens, std::int64_t d) {
    if (ragged_) {
      set(slot, role, dtype, {tokens, h, d}, swapped);
    } else {
      set(slot, role, dtype, {batch, h, tokens, d}, swapped);
    }
  };
  const auto rows = [&](Slot& slot, std::int64_t tokens) {
    if (ragged_) {
      set(slot, Role::kOutput, statistic, {heads, tokens});
    } else {
      set(slot, Role::kOutput, statistic, {batch, heads, tokens});
    }
  };
  operand(q, Role::kInput, heads, sq, dim);
  operand(k, Role::kInput, heads_kv, sk, dim);
  operand(v, Role::kInput, heads_kv, sk, dim_v);
  operand(out, Role::kOutput, heads, sq, dim_v);
  if (backward || bytes.one_in(2)) rows(lse, sq);
  if (bytes.one_in(2)) rows(total, sk);
  if (backward) {
    operand(dout, Role::kInput, heads, sq, dim_v);
    operand(dq, Role::kOutput, heads, sq, dim);
    operand(dk, Role::kOutput, heads_kv, sk, dim);
    operand(dv, Role::kOutput, heads_kv, sk, dim_v);
  }
  piecewise_ = !ragged_ && bytes.one_in(3);
  if (piecewise_) {
    dist_threshold_ = bytes.one_in(4) ? bytes.wild() : bytes.below(60) - 10;
    operand(q2, Role::kInput, heads, sq, dim);
    operand(k2, Role::kInput, heads_kv, sk, dim);
    if (backward) {
      operand(dq2, Role::kOutput, heads, sq, dim);
      operand(dk2, Role::kOutput, heads_kv, sk, dim);
    }
  }
  if (ragged_) {
    set(cu_q, Role::kIndex, ONEPASS_INT32, {batch + 1});
    set(cu_k, Role::kIndex, ONEPASS_INT32, {batch + 1});
  }
  if (!ragged_ && bytes.one_in(3)) {
    const std::uint8_t broadcast = bytes.byte();
    const auto size = [&](int bit, std::int64_t full) { return broadcast >> bit & 1 ? 1 : full; };
    set(bias, Role::kInput, dtype, {size(0, batch), size(1, heads), size(2, sq), size(3, sk)});
    if (backward && bytes.one_in(2)) {
      set(dbias, Role::kOutput, statistic, {size(0, batch), size(1, heads), size(2, sq), size(3, sk)});
    }
  }
  if (bytes.one_in(3)) {
    set(sinks, Role::kInput, dtype, {heads});
    if (backward && bytes.one_in(2)) set(dsinks, Role::kOutput, statistic, {heads});
  }
  if (bytes.one_in(4)) set(slopes, Role::kInput, ONEPASS_FLOAT32, {heads});
  if (bytes.one_in(4)) set(key_begin, Role::kIndex, ONEPASS_INT32, {batch});
  if (bytes.one_in(4)) set(key_end, Role::kIndex, ONEPASS_INT32, {batch});
  options.flags = bytes.below(16);
  if (bytes.one_in(3)) options.window_left = bytes.below(50);
  if (bytes.one_in(3)) options.window_right = bytes.below(50);
  if (bytes.one_in(4)) options.softcap = 2.0;
  if (bytes.one_in(4)) {
    options.dropout_p = 0.25;
    options.dropout_seed = bytes.byte();
  }
}

// Up to three fields get any value.
void Call::spoil(Bytes& bytes) {
  for (std::int64_t count = bytes.below(4); count > 0; --count) {
    onepass_tensor& t = slots[static_cast<std::size_t>(bytes.below(static_cast<std::int64_t>(slots.size())))]->tensor;
    const std::int64_t value = bytes.wild();
    switch (const std::int64_t field = bytes.below(kSpoilableFields + 5); field) {
      case kSpoilableFields: options.flags = static_cast<std::uint64_t>(value); break;
      case kSpoilableFields + 1: options.window_left = value; break;
      case kSpoilableFields + 2: options.window_right = value; break;
      case kSpoilableFields + 3: options.softcap = value == 7 ? NAN : static_cast<double>(value); break;
      case kSpoilableFields + 4: options.dropout_p = static_cast<double>(value) / 8; break;
      default: fuzz::spoil(t, field, value);
    }
  }
}

void Call::allocate(Bytes& bytes) {
  const bool at_front = bytes.one_in(2);
  std::minstd_rand generator(bytes.byte());
  const std::uint8_t bad_index = bytes.byte();
  for (Slot* slot : slots) {
    if (!slot->given) continue;
    const std::int64_t elements = fuzz::allocate(*slot, at_front, generator);
    usable = usable && elements >= 0;
    if (!usable) return;
    if (slot->role != Role::kIndex || slot->tensor.dtype != ONEPASS_INT32) continue;
    // Rising, so that cu_seqlens are mostly valid; now and then not.
    const std::int64_t tokens = slot == &cu_q ? q.tensor.shape[0] : k.tensor.shape[ragged_ ? 0 : 2];
    for (std::int64_t i = 0; i < elements; ++i) {
      const std::int64_t rising = elements > 1 ? i * tokens / (elements - 1) : 0;
      put(*slot, i, static_cast<std::int32_t>(bad_index > 240 ? bytes.wild() : rising));
    }
  }
}

Call::Call(Bytes& bytes) {
  describe(bytes);
  spoil(bytes);
  allocate(bytes);
}

onepass_status Call::run(const char* backend) {
  options.alibi_slopes = slopes.view();
  options.bias = bias.view();
  options.sinks = sinks.view();
  options.key_begin = key_begin.view();
  options.key_end = key_end.view();
  options.flags |= backward && options.flags < 16 ? ONEPASS_DETERMINISTIC : 0;
  onepass_context context = ONEPASS_CONTEXT_INIT;
  context.backend = backend;
  onepass_varlen_shape shape = ONEPASS_VARLEN_SHAPE_INIT;
  shape.cu_seqlens_q = cu_q.view();
  shape.cu_seqlens_k = cu_k.view();
  onepass_attention_outputs outputs = ONEPASS_ATTENTION_OUTPUTS_INIT;
  outputs.out = out.view();
  outputs.lse = lse.view();
  outputs.total_attention = total.view();
  const onepass_status forward =
      checked(piecewise_ ? onepass_piecewise_attention(q.view(), k.view(), q2.view(), k2.view(), v.view(),
                                                       dist_threshold_, &outputs, &options, &context)
              : ragged_  ? onepass_varlen_attention(q.view(), k.view(), v.view(), &shape, &outputs, &options, &context)
                         : onepass_attention(q.view(), k.view(), v.view(), &outputs, &options, &context));
  forward_accepted = forward == ONEPASS_OK;
  if (!backward) return forward;
  // Also after a refused forward: with the same spoilt arguments, or with what happens to be in out and lse.
  onepass_attention_gradients gradients = ONEPASS_ATTENTION_GRADIENTS_INIT;
  gradients.dq = dq.view();
  gradients.dk = dk.view();
  gradients.dv = dv.view();
  gradients.dbias = dbias.view();
  gradients.dsinks = dsinks.view();
  if (piecewise_) {
    gradients.dq2 = dq2.view();
    gradients.dk2 = dk2.view();
    return checked(onepass_piecewise_attention_backward(dout.view(), q.view(), k.view(), q2.view(), k2.view(), v.view(),
                                                        dist_threshold_, out.view(), lse.view(), &gradients, &options,
                                                        &context));
  }
  return checked(ragged_ ? onepass_varlen_attention_backward(dout.view(), q.view(), k.view(), v.view(), &shape,
                                                             out.view(), lse.view(), &gradients, &options, &context)
                         : onepass_attention_backward(dout.view(), q.view(), k.view(), v.view(), out.view(), lse.view(),
                                                      &gradients, &options, &context));
}

}  // namespace
}  // namespace onepass::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace onepass::fuzz;
  Bytes bytes(data, size);
  Call call(bytes);
  if (!call.usable) return 0;
  const std::vector<Slot*> outputs{&call.out, &call.lse,   &call.total,  &call.dq,  &call.dk,
                                   &call.dv,  &call.dbias, &call.dsinks, &call.dq2, &call.dk2};
  const onepass_status status = call.run(nullptr);
  if (status != ONEPASS_OK) {
    for (const Slot* slot : outputs) {
      const bool gradient = slot != &call.out && slot != &call.lse && slot != &call.total;
      if (call.backward && !gradient) continue;  // the forward pass before it may have been fine
      for (std::byte b : bytes_of(*slot)) REQUIRE(b == kCanary);
    }
    return 0;
  }
  if (call.backward && !call.forward_accepted) return 0;  // gradients of nothing in particular
  std::vector<std::vector<std::byte>> first;
  std::vector<std::vector<double>> values;
  for (const Slot* slot : outputs) {
    first.push_back(bytes_of(*slot));
    values.push_back(slot->given ? values_of(*slot) : std::vector<double>{});
  }
  REQUIRE(call.run(nullptr) == ONEPASS_OK);
  for (std::size_t i = 0; i < outputs.size(); ++i) REQUIRE(bytes_of(*outputs[i]) == first[i]);
  REQUIRE(call.run("reference") == ONEPASS_OK);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i]->given) require_close(values[i], values_of(*outputs[i]), call.q.tensor.dtype);
  }
  return 0;
}
