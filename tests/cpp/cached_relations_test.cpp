// cached_attention on every present backend, in calls made for one question each: splits, chunks, and what is not
// finite or rare in a cache.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/float8.h"
#include "support/cache_oracle.h"
#include "support/compare.h"

namespace onepass::test {
namespace {

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
