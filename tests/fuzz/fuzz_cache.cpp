// fuzz/fuzz_cache.cpp: bytes → a nearly valid cached_attention of the C interface, with or without new tokens, over a
// contiguous or paged cache of any type between guard pages.
//
// What must hold is what fuzz_c_api.cpp asks for; and a refused call leaves the cache as it was.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "bytes.h"
#include "onepass/onepass_c.h"
#include "slots.h"

namespace onepass::fuzz {
namespace {

using State = std::vector<std::vector<std::byte>>;

struct CacheCall {
  explicit CacheCall(Bytes& bytes);

  onepass_status run(const char* backend);
  State state() const;  // of all memory
  void restore(const State& state);

  bool usable = true;
  Slot q, out, lse, k_new, v_new, k, v, k_scale, v_scale, page_table, seqlens, first_key, slopes, sinks, cu_q;
  std::vector<Slot*> slots{&q,       &out,        &lse,     &k_new,     &v_new,  &k,     &v,   &k_scale,
                           &v_scale, &page_table, &seqlens, &first_key, &slopes, &sinks, &cu_q};

 private:
  void describe(Bytes& bytes);
  void describe_storage(Bytes& bytes);
  void spoil(Bytes& bytes);
  void allocate(Bytes& bytes);
  void fill_indices(Bytes& bytes);

  std::int32_t query_dtype_ = ONEPASS_FLOAT32, granularity_ = ONEPASS_SCALE_NONE;
  std::int64_t group_ = 0, batch_ = 1, heads_ = 1, heads_kv_ = 1, dim_ = 1, dim_v_ = 1;
  std::int64_t capacity_ = 1, page_size_ = 0, queries_ = 1;
  onepass_cached_options options_ = ONEPASS_CACHED_OPTIONS_INIT;
};

void CacheCall::describe_storage(Bytes& bytes) {
  const bool swapped = bytes.one_in(3);
  const std::int32_t storage[] = {ONEPASS_FLOAT32, ONEPASS_FLOAT16,     ONEPASS_BFLOAT16,
                                  ONEPASS_INT8,    ONEPASS_FLOAT8_E4M3, ONEPASS_FLOAT8_E5M2};
  const std::int32_t dtype = storage[bytes.below(6)];
  std::int64_t blocks = batch_, tokens = capacity_ = 1 + bytes.below(90);
  if (bytes.one_in(2)) {
    page_size_ = tokens = 1 + bytes.below(9);
    const std::int64_t max_pages = 1 + bytes.below(9);
    capacity_ = max_pages * page_size_;
    blocks = batch_ * max_pages;
    set(page_table, Role::kIndex, ONEPASS_INT32, {batch_, max_pages});
  }
  if (dtype == ONEPASS_INT8) {
    granularity_ = static_cast<std::int32_t>(ONEPASS_SCALE_TENSOR + bytes.below(4));
    if (granularity_ == ONEPASS_SCALE_GROUP) {
      group_ = 1 + bytes.below(8);
      dim_ *= group_;
      dim_v_ *= group_;
    }
  } else if (dtype >= ONEPASS_FLOAT8_E4M3 && bytes.one_in(2)) {
    granularity_ = ONEPASS_SCALE_TENSOR;
  }
  set(k, Role::kInput, dtype, {blocks, heads_kv_, tokens, dim_}, swapped);
  set(v, Role::kInput, dtype, {blocks, heads_kv_, tokens, dim_v_}, swapped);
  for (Slot* scale : {&k_scale, &v_scale}) {
    const std::int64_t groups = group_ == 0 ? 0 : (scale == &k_scale ? dim_ : dim_v_) / group_;
    switch (granularity_) {
      case ONEPASS_SCALE_TENSOR: set(*scale, Role::kScale, ONEPASS_FLOAT32, {1}); break;
      case ONEPASS_SCALE_TOKEN: set(*scale, Role::kScale, ONEPASS_FLOAT32, {blocks, tokens}); break;
      case ONEPASS_SCALE_HEAD: set(*scale, Role::kScale, ONEPASS_FLOAT32, {blocks, heads_kv_, tokens}); break;
      case ONEPASS_SCALE_GROUP: set(*scale, Role::kScale, ONEPASS_FLOAT32, {blocks, heads_kv_, tokens, groups}); break;
    }
  }
}

void CacheCall::describe(Bytes& bytes) {
  batch_ = 1 + bytes.below(3);
  heads_kv_ = 1 + bytes.below(2);
  heads_ = heads_kv_ * (1 + bytes.below(5));
  dim_ = 1 + bytes.below(40);
  dim_v_ = bytes.one_in(3) ? 1 + bytes.below(40) : dim_;
  query_dtype_ = static_cast<std::int32_t>(ONEPASS_FLOAT32 + bytes.below(3));
  queries_ = bytes.one_in(2) ? 1 : bytes.below(30);
  describe_storage(bytes);
  const auto tokens = [&](Slot& slot, Role role, std::int64_t heads, std::int64_t dim, bool packed) {
    if (packed) {
      set(slot, role, query_dtype_, {batch_ * queries_, heads, dim});
    } else {
      set(slot, role, query_dtype_, {batch_, heads, queries_, dim});
    }
  };
  const bool packed = bytes.one_in(3);
  tokens(q, Role::kInput, heads_, dim_, packed);
  tokens(out, Role::kOutput, heads_, dim_v_, packed);
  if (bytes.one_in(2)) {
    tokens(k_new, Role::kInput, heads_kv_, dim_, packed);
    tokens(v_new, Role::kInput, heads_kv_, dim_v_, packed);
  }
  if (packed) set(cu_q, Role::kIndex, ONEPASS_INT32, {batch_ + 1});
  if (bytes.one_in(2)) {
    if (packed) {
      set(lse, Role::kOutput, ONEPASS_FLOAT32, {heads_, batch_ * queries_});
    } else {
      set(lse, Role::kOutput, ONEPASS_FLOAT32, {batch_, heads_, queries_});
    }
  }
  set(seqlens, Role::kIndex, ONEPASS_INT32, {batch_});
  if (bytes.one_in(4)) set(first_key, Role::kIndex, ONEPASS_INT32, {batch_});
  if (bytes.one_in(4)) set(slopes, Role::kInput, ONEPASS_FLOAT32, {heads_});
  if (bytes.one_in(4)) set(sinks, Role::kInput, query_dtype_, {heads_});
  if (bytes.one_in(3)) options_.flags = 0;
  if (bytes.one_in(4)) options_.window_left = bytes.below(50);
  if (bytes.one_in(4)) options_.softcap = 3.0;
  if (bytes.one_in(3)) options_.num_splits = bytes.below(6);
  if (bytes.one_in(4)) options_.keep_seqlens = 1;
}

void CacheCall::spoil(Bytes& bytes) {
  for (std::int64_t count = bytes.below(4); count > 0; --count) {
    onepass_tensor& t = slots[static_cast<std::size_t>(bytes.below(static_cast<std::int64_t>(slots.size())))]->tensor;
    const std::int64_t value = bytes.wild();
    switch (const std::int64_t field = bytes.below(kSpoilableFields + 6); field) {
      case kSpoilableFields: options_.flags = static_cast<std::uint64_t>(value); break;
      case kSpoilableFields + 1: options_.window_left = value; break;
      case kSpoilableFields + 2: options_.num_splits = value; break;
      case kSpoilableFields + 3: options_.softcap = value == 7 ? NAN : static_cast<double>(value); break;
      case kSpoilableFields + 4: granularity_ = static_cast<std::int32_t>(value); break;
      case kSpoilableFields + 5: group_ = value; break;
      default: fuzz::spoil(t, field, value);
    }
  }
}

// Mostly lengths that leave room for the new tokens and pages that are one sequence's own; now and then anything.
void CacheCall::fill_indices(Bytes& bytes) {
  const std::uint8_t bad = bytes.byte();
  const auto value = [&](Slot& slot, std::int64_t i) -> std::int64_t {
    const std::int64_t room = std::max<std::int64_t>(0, capacity_ - queries_);
    if (&slot == &page_table) return batch_ * (capacity_ / std::max<std::int64_t>(page_size_, 1)) - 1 - i;
    if (&slot == &cu_q) return i * queries_;
    if (&slot == &first_key) return bytes.below(4);
    return k_new.given ? bytes.byte() % (room + 1) : queries_ + bytes.byte() % (room + 1);
  };
  for (Slot* slot : {&page_table, &seqlens, &first_key, &cu_q}) {
    if (!slot->given || slot->tensor.dtype != ONEPASS_INT32) continue;
    const auto elements = static_cast<std::int64_t>(slot->memory->bytes() / sizeof(std::int32_t));
    for (std::int64_t i = 0; i < elements; ++i) {
      const bool wild = bad > 240 || (bad > 200 && bytes.one_in(8));
      put(*slot, i, static_cast<std::int32_t>(wild ? bytes.wild() : value(*slot, i)));
    }
  }
}

void CacheCall::allocate(Bytes& bytes) {
  const bool at_front = bytes.one_in(2);
  std::minstd_rand generator(bytes.byte());
  for (Slot* slot : slots) {
    if (slot->given && fuzz::allocate(*slot, at_front, generator) < 0) usable = false;
    if (!usable) return;
  }
  fill_indices(bytes);
}

CacheCall::CacheCall(Bytes& bytes) {
  describe(bytes);
  spoil(bytes);
  allocate(bytes);
}

onepass_status CacheCall::run(const char* backend) {
  onepass_kv_cache cache = ONEPASS_KV_CACHE_INIT;
  cache.k = k.view();
  cache.v = v.view();
  cache.page_table = page_table.view();
  cache.seqlens = seqlens.view();
  cache.k_scale = k_scale.view();
  cache.v_scale = v_scale.view();
  cache.scale_granularity = granularity_;
  cache.scale_group = group_;
  cache.first_key = first_key.view();
  options_.alibi_slopes = slopes.view();
  options_.sinks = sinks.view();
  options_.cu_seqlens_q = cu_q.view();
  options_.k_new = k_new.view();
  options_.v_new = v_new.view();
  onepass_attention_outputs outputs = ONEPASS_ATTENTION_OUTPUTS_INIT;
  outputs.out = out.view();
  outputs.lse = lse.view();
  onepass_context context = ONEPASS_CONTEXT_INIT;
  context.backend = backend;
  return checked(onepass_cached_attention(q.view(), &cache, &outputs, &options_, &context));
}

State CacheCall::state() const {
  State state;
  for (const Slot* slot : slots) state.push_back(bytes_of(*slot));
  return state;
}

void CacheCall::restore(const State& state) {
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (slots[i]->memory) std::copy(state[i].begin(), state[i].end(), slots[i]->memory->data());
  }
}

}  // namespace
}  // namespace onepass::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace onepass::fuzz;
  Bytes bytes(data, size);
  CacheCall call(bytes);
  if (!call.usable) return 0;
  const State before = call.state();
  if (call.run(nullptr) != ONEPASS_OK) {
    REQUIRE(call.state() == before);
    return 0;
  }
  const State after = call.state();
  const std::vector<double> out = values_of(call.out);
  const std::vector<double> lse = call.lse.given ? values_of(call.lse) : std::vector<double>{};
  call.restore(before);
  REQUIRE(call.run(nullptr) == ONEPASS_OK);
  REQUIRE(call.state() == after);
  call.restore(before);
  REQUIRE(call.run("reference") == ONEPASS_OK);
  require_close(out, values_of(call.out), call.q.tensor.dtype);
  if (call.lse.given) require_close(lse, values_of(call.lse), ONEPASS_FLOAT32);
  return 0;
}
