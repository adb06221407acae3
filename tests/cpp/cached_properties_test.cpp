// Calls of cached_attention and append_kv that must give the same bits: in every case on every present backend,
// wherever the tokens are stored, however they came there, and whoever else is in the batch.
#include <algorithm>
#include <limits>

#include "support/cached_test.h"
#include "support/compare.h"

namespace onepass::test {
namespace {

class CachedProperties : public CachedTest {};
ONEPASS_FOR_EVERY_CACHE_CASE(CachedProperties);

void expect_same_bits(const CacheInstance& a, const CacheInstance& b) {
  EXPECT_TRUE(identical(a.loaded_out(), b.loaded_out())) << "out";
  EXPECT_TRUE(identical(a.loaded_lse(), b.loaded_lse())) << "lse";
}

TEST_P(CachedProperties, SameBitsAgain) {
  const auto& [target, definition] = GetParam();
  CacheInstance first(definition, target), second(definition, target);
  first.attend();
  second.attend();
  expect_same_bits(first, second);
}

TEST_P(CachedProperties, PagesAndStoragePlaceDoNotChangeBits) {
  const auto& [target, definition] = GetParam();
  CacheInstance cache(definition, target);
  cache.attend();
  for (std::int64_t page_size : {0, 1, 16, 48}) {
    CacheCase other = definition;
    other.page_size = page_size;
    other.batch_index = false;
    other.token_major = !definition.token_major;
    CacheInstance moved(other, target);
    moved.attend();
    expect_same_bits(cache, moved);
  }
}

TEST_P(CachedProperties, UnusedCapacityDoesNotChangeBits) {
  const auto& [target, definition] = GetParam();
  CacheInstance clean(definition, target);
  CacheCase larger = definition;
  if (definition.page_size == 0) larger.capacity += 100;
  CacheInstance poisoned(larger, target);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<const Tensor*> storage{&poisoned.k, &poisoned.v};
  // Everything is poison, then the tokens are stored again.
  for (Tensor* tensor : {&poisoned.k, &poisoned.v}) {
    tensor->store(Values(tensor->view().numel(), poisoned.storage() == DType::kInt8 ? -128 : nan));
  }
  if (definition.granularity != ScaleGranularity::kNone && definition.granularity != ScaleGranularity::kTensor) {
    for (Tensor* scale : {&poisoned.k_scale, &poisoned.v_scale}) {
      scale->store(Values(scale->view().numel(), nan));
    }
  }
  Values stored = poisoned.seqlens.load();
  poisoned.seqlens.store(Values(poisoned.batch(), 0.0));
  poisoned.append(std::vector<std::int64_t>(poisoned.batch(), 0), {stored.begin(), stored.end()}, false);
  clean.attend();
  poisoned.attend();
  expect_same_bits(clean, poisoned);
}

TEST_P(CachedProperties, AppendInPartsStoresTheSameBits) {
  const auto& [target, definition] = GetParam();
  if (definition.append) GTEST_SKIP() << "stores its last tokens itself";
  CacheInstance whole(definition, target), parts(definition, target);
  parts.seqlens.store(Values(parts.batch(), 0.0));
  std::vector<std::int64_t> from(parts.batch(), 0);
  for (std::int64_t step : {1, 2, 3}) {
    std::vector<std::int64_t> to = definition.lengths;
    if (step < 3) {
      for (std::int64_t b = 0; b < parts.batch(); ++b) to[b] = definition.lengths[b] * step / 3;
    }
    parts.append(from, to, /*as_packed=*/step == 2);
    from = to;
  }
  EXPECT_TRUE(identical(parts.seqlens.load(), whole.seqlens.load()));
  whole.attend();
  parts.attend();
  expect_same_bits(whole, parts);
}

TEST_P(CachedProperties, ARowAloneEqualsTheRowInABatch) {
  const auto& [target, definition] = GetParam();
  CacheCase fixed = definition;
  fixed.num_splits = std::max<std::int64_t>(1, definition.num_splits);
  CacheInstance cache(fixed, target);
  cache.attend();
  const std::int64_t row_size = definition.num_heads * cache.c.head_dim_v;
  const Values all = cache.loaded_out(), all_lse = cache.loaded_lse();
  if (!cache.packed() || definition.append) return;
  const std::int64_t step = std::max<std::int64_t>(1, cache.batch() / 8);  // some of many: each costs a batch
  for (std::int64_t b = 0; b < cache.batch(); b += step) {
    const std::int64_t start = cache.query_starts()[b], count = cache.c.queries[b];
    if (count == 0) continue;
    // The others leave: no queries, no keys.
    CacheInstance alone(fixed, target);
    Values bounds(alone.batch() + 1, 0.0), lengths(alone.batch(), 0.0);
    std::fill(bounds.begin() + b + 1, bounds.end(), double(count));
    lengths[b] = double(definition.lengths[b]);
    alone.cu_seqlens.store(bounds);
    alone.seqlens.store(lengths);
    Values q = alone.q.load();
    const std::int64_t q_size = definition.num_heads * definition.head_dim;
    std::rotate(q.begin(), q.begin() + start * q_size, q.end());
    alone.q.store(q);
    alone.attend();
    const Values out = alone.out.load();
    EXPECT_TRUE(identical(Values(out.begin(), out.begin() + count * row_size),
                          Values(all.begin() + start * row_size, all.begin() + (start + count) * row_size)));
    // Rows behind the last sequence are empty ones.
    EXPECT_TRUE(std::all_of(out.begin() + count * row_size, out.end(), [](double x) { return x == 0.0; }));
  }
}

}  // namespace
}  // namespace onepass::test
