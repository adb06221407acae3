// cached_attention and append_kv in every case on every present backend: against the oracle over what the cache holds,
// and what append should have stored.
#include <algorithm>
#include <cmath>
#include <limits>

#include "support/cache_oracle.h"
#include "support/cached_test.h"
#include "support/compare.h"

namespace onepass::test {
namespace {

class CachedAttention : public CachedTest {};
ONEPASS_FOR_EVERY_CACHE_CASE(CachedAttention);

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
          double largest = of_token, limit = std::numeric_limits<double>::infinity(), scale = 1.0;
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

}  // namespace
}  // namespace onepass::test
