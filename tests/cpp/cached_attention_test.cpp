// cached_attention and append_kv on every present backend: against the oracle over what the cache holds, what append
// should have stored, and relations between calls that must give the same bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/float8.h"
#include "support/cache.h"
#include "support/compare.h"
#include "support/naive.h"

namespace onepass::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The rows of a dense instance of batch 1 in the order of CacheInstance::loaded_out and loaded_lse.
void append_rows(const Instance& in, const Results& results, Values& out, Values& lse) {
  for (std::int64_t i = 0; i < in.c.seqlen_q; ++i) {
    for (std::int64_t h = 0; h < in.c.num_heads; ++h) {
      const auto row = results.out.begin() + in.query_row(0, h, i) * in.c.head_dim_v;
      out.insert(out.end(), row, row + in.c.head_dim_v);
      lse.push_back(results.lse[in.lse_at(0, h, i)]);
    }
  }
}

// out without the values whose weight relative to the row's largest is at most `threshold`.
Values pruned(const Instance& in, double threshold, const Results& exact) {
  Values out = exact.out;
  for (std::int64_t h = 0; h < in.c.num_heads; ++h) {
    const std::int64_t g = h / (in.c.num_heads / in.c.num_heads_kv);
    for (std::int64_t i = 0; i < in.c.seqlen_q; ++i) {
      Values logits(in.c.seqlen_k, -kInfinity);
      for (std::int64_t j = 0; j < in.c.seqlen_k; ++j) {
        if (!in.visible(0, i, j)) continue;
        double dot = 0;
        for (std::int64_t d = 0; d < in.c.head_dim; ++d) {
          dot += in.q[in.query_row(0, h, i) * in.c.head_dim + d] * in.k[in.key_row(0, g, j) * in.c.head_dim + d];
        }
        logits[j] = dot * in.scale();
      }
      const double largest = *std::max_element(logits.begin(), logits.end()), lse = exact.lse[in.lse_at(0, h, i)];
      for (std::int64_t d = 0; d < in.c.head_dim_v; ++d) {
        double& sum = out[in.query_row(0, h, i) * in.c.head_dim_v + d] = 0;
        for (std::int64_t j = 0; j < in.c.seqlen_k; ++j) {
          if (std::exp(logits[j] - largest) <= threshold) continue;
          sum += std::exp(logits[j] - lse) * in.v[in.key_row(0, g, j) * in.c.head_dim_v + d];
        }
      }
    }
  }
  return out;
}

struct Expected {
  Values out, lse, naive_out, naive_lse;
};

Expected expected(const CacheInstance& cache) {
  Expected e;
  for (std::int64_t b = 0; b < cache.batch(); ++b) {
    const Instance dense = cache.sequence(b);
    Results want = oracle(dense, /*with_backward=*/false), yardstick = naive(dense, cache.target.dtype);
    if (cache.c.prob_threshold > 0) {
      const Values kept = pruned(dense, cache.c.prob_threshold, want);
      for (std::size_t i = 0; i < kept.size(); ++i) yardstick.out[i] += kept[i] - want.out[i];
      want.out = kept;
    }
    append_rows(dense, want, e.out, e.lse);
    append_rows(dense, yardstick, e.naive_out, e.naive_lse);
  }
  return e;
}

using Parameter = std::tuple<Target, CacheCase>;
class CachedAttention : public testing::TestWithParam<Parameter> {
 protected:
  void SetUp() override {
    if (!has_cached(std::get<0>(GetParam()))) GTEST_SKIP() << "the backend lacks the operation";
  }
};

TEST_P(CachedAttention, WithinTwiceTheNaiveError) {
  const auto& [target, definition] = GetParam();
  CacheInstance cache(definition, target);
  cache.attend();
  if (!definition.advance) {  // the tokens are stored, but the lengths are the caller's to change
    Values lengths(definition.lengths.begin(), definition.lengths.end());
    for (std::int64_t b = 0; b < cache.batch(); ++b) lengths[b] -= cache.c.queries[b];
    EXPECT_EQ(cache.seqlens.load(), lengths);
  } else {
    EXPECT_EQ(cache.seqlens.load(), Values(cache.c.lengths.begin(), cache.c.lengths.end()));
  }
  const Expected want = expected(cache);
  EXPECT_TRUE(accurate(cache.loaded_out(), want.out, want.naive_out, target.dtype)) << "out";
  EXPECT_TRUE(accurate(cache.loaded_lse(), want.lse, want.naive_lse, DType::kFloat32)) << "lse";
  for (const Tensor* output : {&cache.out, &cache.lse, &cache.k, &cache.v}) EXPECT_TRUE(output->canaries_intact());
}

// Half a step of the stored type around x: of int8 with this scale, or of a float type.
double half_step(DType storage, double x, double scale) {
  if (storage == DType::kInt8) return 0.5 * scale;
  if (storage == DType::kFloat8E4M3) return std::max(std::abs(x) / 16, scale * 0x1p-10);
  if (storage == DType::kFloat8E5M2) return std::max(std::abs(x) / 8, scale * 0x1p-17);
  return std::abs(x) * epsilon_of(storage) / 2 + 1e-7;  // rotation in float32; float16's subnormals
}

TEST_P(CachedAttention, AppendStoresTheNearestValues) {
  const auto& [target, definition] = GetParam();
  CacheInstance cache(definition, target);
  cache.attend();
  const bool quantized = cache.storage() == DType::kInt8;
  std::int64_t offset = 0;
  for (std::int64_t b = 0; b < cache.batch(); ++b) {
    for (std::int64_t t = 0; t < definition.lengths[b]; ++t) {
      std::vector<Values> rows;
      double of_token = 0;
      for (std::int64_t g = 0; g < definition.num_heads_kv; ++g) {
        rows.push_back(cache.expected_key(b, g, t));
        for (double x : rows.back()) of_token = std::max(of_token, std::abs(x));
      }
      for (std::int64_t g = 0; g < definition.num_heads_kv; ++g) {
        const Values stored = cache.stored_key(b, g, t);
        for (std::int64_t d = 0; d < definition.head_dim; ++d) {
          double largest = of_token, limit = kInfinity, scale = 1.0;
          if (definition.granularity == ScaleGranularity::kHead || definition.granularity == ScaleGranularity::kGroup) {
            const std::int64_t size = definition.scale_group ? definition.scale_group : definition.head_dim;
            const auto first = rows[g].begin() + d / size * size;
            largest = 0;
            std::for_each(first, first + size, [&](double x) { largest = std::max(largest, std::abs(x)); });
          }
          if (quantized) scale = std::max(largest / 127, 1e-5);
          if (definition.granularity == ScaleGranularity::kTensor) {
            scale = cache.k_scale.at(0);
            limit = scale * (quantized ? 127 : cache.storage() == DType::kFloat8E4M3 ? 448 : 57344);
          }
          const double want = std::clamp(rows[g][d], -limit, limit);
          ASSERT_NEAR(stored[d], want, half_step(cache.storage(), want, scale) * (1 + 1e-4) + 1e-6 * largest)
              << "key " << t << " of head " << g << " of sequence " << b << ", channel " << d;
        }
        const Values value = cache.stored_value(b, g, t);
        if (!quantized) {
          for (std::int64_t d = 0; d < cache.c.head_dim_v; ++d) {
            const double want = cache.values[(offset + g * definition.lengths[b] + t) * cache.c.head_dim_v + d];
            const double scale = cache.v_scale.view().given() ? cache.v_scale.at(0) : 1.0;
            ASSERT_NEAR(value[d], want, half_step(cache.storage(), want, scale) * (1 + 1e-4));
          }
        }
      }
    }
    offset += definition.lengths[b] * definition.num_heads_kv;
  }
}

void expect_same_bits(const CacheInstance& a, const CacheInstance& b) {
  EXPECT_TRUE(identical(a.loaded_out(), b.loaded_out())) << "out";
  EXPECT_TRUE(identical(a.loaded_lse(), b.loaded_lse())) << "lse";
}

TEST_P(CachedAttention, SameBitsAgain) {
  const auto& [target, definition] = GetParam();
  CacheInstance first(definition, target), second(definition, target);
  first.attend();
  second.attend();
  expect_same_bits(first, second);
}

TEST_P(CachedAttention, PagesAndStoragePlaceDoNotChangeBits) {
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

TEST_P(CachedAttention, UnusedCapacityDoesNotChangeBits) {
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

TEST_P(CachedAttention, AppendInPartsStoresTheSameBits) {
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

TEST_P(CachedAttention, ARowAloneEqualsTheRowInABatch) {
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

std::string name_of_parameter(const testing::TestParamInfo<Parameter>& info) {
  return name_of_target(std::get<0>(info.param)) + "_" + std::get<1>(info.param).name;
}
INSTANTIATE_TEST_SUITE_P(Cases, CachedAttention,
                         testing::Combine(testing::ValuesIn(targets()), testing::ValuesIn(cache_cases())),
                         name_of_parameter);

class CachedRelations : public testing::TestWithParam<Target> {
 protected:
  void SetUp() override {
    if (!has_cached(GetParam())) GTEST_SKIP() << "the backend lacks the operation";
  }
};

Values attended(const CacheCase& definition, const Target& target, Values* lse = nullptr) {
  CacheInstance cache(definition, target);
  cache.attend();
  if (lse != nullptr) *lse = cache.loaded_lse();
  return cache.loaded_out();
}

double tolerance(const Target& target) { return target.dtype == DType::kFloat32 ? 2e-6 : epsilon_of(target.dtype); }

TEST_P(CachedRelations, SplittingAnywhereChangesNothingButRounding) {
  CacheCase definition{.name = "splits", .lengths = {500, 31}, .queries = {1, 1}, .capacity = 512};
  Values want_lse;
  const Values want = attended(definition, GetParam(), &want_lse);
  for (std::int64_t splits : {1, 2, 3, 7, 16, 600}) {
    definition.num_splits = splits;
    Values lse;
    EXPECT_TRUE(close(attended(definition, GetParam(), &lse), want, tolerance(GetParam()))) << splits << " splits";
    EXPECT_TRUE(close(lse, want_lse, 4e-6)) << splits << " splits";
  }
}

// A prompt in one call, and in chunks that append and attend.
TEST_P(CachedRelations, ChunkedPrefillEqualsOneCall) {
  const CacheCase definition{.name = "prompt", .lengths = {150, 97}, .queries = {150, 97}, .page_size = 16};
  CacheInstance whole(definition, GetParam());
  whole.attend();
  const Values want = whole.loaded_out();
  const std::int64_t row = definition.num_heads * definition.head_dim;
  for (std::int64_t chunk : {1, 40}) {
    CacheInstance chunked(definition, GetParam());
    const Values q = chunked.q.load();
    Values got(want.size());
    std::vector<std::int64_t> done(2, 0);
    while (done != definition.lengths) {
      Values bounds{0.0}, part;
      std::vector<std::int64_t> counts(2);
      Values lengths(2);
      for (std::int64_t b : {0, 1}) {
        counts[b] = std::min(chunk, definition.lengths[b] - done[b]);
        const auto from = q.begin() + (whole.query_starts()[b] + done[b]) * row;
        part.insert(part.end(), from, from + counts[b] * row);
        bounds.push_back(bounds.back() + double(counts[b]));
        lengths[b] = double(done[b] + counts[b]);
      }
      const auto total = static_cast<std::int64_t>(bounds.back());
      const Shape shape{total, definition.num_heads, definition.head_dim};
      chunked.q = Tensor(GetParam().dtype, shape, part, Layout::kContiguous, GetParam().device());
      chunked.out = Tensor(GetParam().dtype, shape, Layout::kContiguous, GetParam().device());
      chunked.lse = Tensor(DType::kFloat32, {definition.num_heads, total}, Layout::kContiguous, GetParam().device());
      chunked.cu_seqlens.store(bounds);
      chunked.seqlens.store(lengths);
      chunked.attend();
      const Values out = chunked.out.load();
      for (std::int64_t b : {0, 1}) {
        std::copy_n(out.begin() + std::int64_t(bounds[b]) * row, counts[b] * row,
                    got.begin() + (whole.query_starts()[b] + done[b]) * row);
        done[b] += counts[b];
      }
    }
    EXPECT_TRUE(close(got, want, tolerance(GetParam()))) << "chunks of " << chunk;
  }
}

TEST_P(CachedRelations, ValuesOfOneGiveOne) {
  CacheInstance cache({.name = "ones", .lengths = {150, 33}, .queries = {5, 5}, .page_size = 16}, GetParam());
  cache.v.store(Values(cache.v.view().numel(), 1.0));
  cache.attend();
  const Values out = cache.loaded_out();
  EXPECT_TRUE(close(out, Values(out.size(), 1.0), GetParam().dtype == DType::kFloat32 ? 1e-6 : 0.0));
}

// A NaN reaches exactly the rows that see it, in keys and in values, at the edge of the causal mask too.
TEST_P(CachedRelations, NanReachesTheRowsThatSeeIt) {
  for (const DType storage : {GetParam().dtype, DType::kFloat8E4M3, DType::kFloat8E5M2}) {
    for (const bool in_values : {false, true}) {
      for (std::int64_t queries : {1, 4, 40}) {
        const std::int64_t length = 150, poisoned = length - 2;  // seen by the last two queries
        CacheInstance cache({.name = "nan",
                             .num_heads = 4,
                             .num_heads_kv = 1,
                             .lengths = {length},
                             .queries = {queries},
                             .storage = storage},
                            GetParam());
        Tensor& tensor = in_values ? cache.v : cache.k;
        Values values = tensor.load();
        values[poisoned * 64 + 5] = std::numeric_limits<double>::quiet_NaN();
        tensor.store(values);
        cache.attend();
        const Values out = cache.loaded_out();
        for (std::int64_t i = 0; i < queries; ++i) {
          const bool sees = i + length - queries >= poisoned;
          for (std::int64_t h = 0; h < 4; ++h) {
            for (std::int64_t d = 0; d < 64; ++d) {
              EXPECT_EQ(std::isnan(out[(i * 4 + h) * 64 + d]), sees && (!in_values || d == 5))
                  << name_of(storage) << (in_values ? " value" : " key") << ", query " << i << " of " << queries
                  << ", channel " << d;
            }
          }
        }
      }
    }
  }
}

// The last key of a part that does not fill its block stands in for those that are missing: with no weight, so that
// infinity stays infinity.
TEST_P(CachedRelations, InfinityInTheLastValueStays) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (std::int64_t heads : {1, 4, 8}) {
    CacheInstance cache({.name = "infinity", .num_heads = heads, .num_heads_kv = 1, .lengths = {150}, .queries = {1}},
                        GetParam());
    Values values = cache.v.load();
    values[149 * 64 + 5] = infinity;
    cache.v.store(values);
    cache.attend();
    const Values out = cache.loaded_out();
    for (std::size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i] == infinity, i % 64 == 5) << "element " << i;
  }
}

// Subnormals and the largest values of float8 too.
TEST_P(CachedRelations, EveryFloat8CodeCounts) {
  for (const DType storage : {DType::kFloat8E4M3, DType::kFloat8E5M2}) {
    for (std::int64_t heads : {1, 4, 8}) {
      CacheInstance cache({.name = "codes",
                           .num_heads = heads,
                           .num_heads_kv = 1,
                           .lengths = {150},
                           .queries = {1},
                           .storage = storage},
                          GetParam());
      Values keys = cache.k.load(), values = cache.v.load();
      for (std::size_t i = 0; i < values.size(); ++i) {
        const auto code = static_cast<std::uint8_t>(i * 37);
        const double x = storage == DType::kFloat8E4M3 ? to_float(Float8E4M3{code}) : to_float(Float8E5M2{code});
        if (std::isfinite(x)) values[i] = x;
        if (std::abs(x) < 4) keys[i] = x;
      }
      cache.k.store(keys);
      cache.v.store(values);
      cache.attend();
      const Expected want = expected(cache);
      EXPECT_TRUE(accurate(cache.loaded_out(), want.out, want.naive_out, GetParam().dtype))
          << name_of(storage) << ", " << heads << " heads";
    }
  }
}

// Scales are powers of two, so that every code is stored as it is; −128, which onepass never writes, too.
TEST_P(CachedRelations, EveryInt8CodeCounts) {
  for (std::int64_t heads : {1, 3, 4, 8, 16}) {
    CacheInstance cache({.name = "codes",
                         .num_heads = heads,
                         .num_heads_kv = 1,
                         .lengths = {150},
                         .queries = {1},
                         .storage = DType::kInt8,
                         .granularity = ScaleGranularity::kHead},
                        GetParam());
    for (Tensor* side : {&cache.k, &cache.v}) {
      Values codes = side->load();
      for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::int8_t>(i * 37 + i / 256);
      side->store(codes);
    }
    for (Tensor* scales : {&cache.k_scale, &cache.v_scale}) {
      Values values = scales->load();
      for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::ldexp(1.0, -6 - static_cast<int>(i % 3));
      scales->store(values);
    }
    cache.attend();
    const Expected want = expected(cache);
    EXPECT_TRUE(accurate(cache.loaded_out(), want.out, want.naive_out, GetParam().dtype)) << heads << " heads";
  }
}

// The same for tokens that were not finite when they were quantized, whose scale is NaN, and for queries.
TEST_P(CachedRelations, NanScalesAndQueriesReachTheirRows) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const char* place : {"key", "value", "query"}) {
    for (std::int64_t queries : {1, 2, 40}) {
      const std::int64_t length = 150, poisoned = length - 2, last = queries - 1;
      CacheInstance cache({.name = place,
                           .num_heads = 4,
                           .num_heads_kv = 1,
                           .lengths = {length},
                           .queries = {queries},
                           .storage = DType::kInt8,
                           .granularity = ScaleGranularity::kHead},
                          GetParam());
      const bool of_query = place == std::string("query");
      Tensor& tensor = of_query ? cache.q : place == std::string("key") ? cache.k_scale : cache.v_scale;
      Values values = tensor.load();
      values[of_query ? last * 64 + 7 : poisoned] = nan;  // of head 0
      tensor.store(values);
      cache.attend();
      const Values out = cache.loaded_out();
      for (std::int64_t i = 0; i < queries; ++i) {
        for (std::int64_t h = 0; h < 4; ++h) {
          const bool sees = of_query ? i == last && h == 0 : i + length - queries >= poisoned;
          for (std::int64_t d = 0; d < 64; ++d) {
            EXPECT_EQ(std::isnan(out[(i * 4 + h) * 64 + d]), sees)
                << place << ", query " << i << " of " << queries << ", head " << h << ", channel " << d;
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, CachedRelations, testing::ValuesIn(targets()),
                         [](const auto& instance) { return name_of_target(instance.param); });

}  // namespace
}  // namespace onepass::test
