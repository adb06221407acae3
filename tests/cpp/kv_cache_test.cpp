// What caches refuse, special values on the way into quantized storage, 8-bit floats, and page accounting.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "core/float8.h"
#include "support/cache.h"
#include "support/compare.h"

namespace onepass::test {
namespace {

// By the definition of the formats: sign, exponent with bias, mantissa.
double decoded(int bits, int mantissa_bits, int bias, bool has_infinity) {
  const int exponent_bits = 7 - mantissa_bits, exponent = (bits & 127) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1), top = (1 << exponent_bits) - 1;
  const double sign = bits & 128 ? -1.0 : 1.0;
  if (has_infinity && exponent == top) return mantissa ? NAN : sign * INFINITY;
  if (!has_infinity && (bits & 127) == 127) return NAN;
  const double fraction = double(mantissa) / (1 << mantissa_bits);
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1.0 + fraction, exponent - bias);
}

template <class T>
void expect_format(int mantissa_bits, int bias, bool has_infinity, float largest) {
  std::vector<double> finite;
  for (int bits = 0; bits < 256; ++bits) {
    const double want = decoded(bits, mantissa_bits, bias, has_infinity);
    const float got = to_float(T{static_cast<std::uint8_t>(bits)});
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(got)) << bits;
      EXPECT_TRUE(std::isnan(to_float(from_float<T>(got)))) << bits;
      continue;
    }
    EXPECT_EQ(got, want) << bits;
    if (std::isinf(want)) continue;
    EXPECT_EQ(from_float<T>(got).bits, bits);
    if (bits < 128) finite.push_back(want);
  }
  // Between neighbours: to the nearer, ties to the even code (codes and values are in the same order).
  for (std::size_t i = 0; i + 1 < finite.size(); ++i) {
    const auto middle = static_cast<float>((finite[i] + finite[i + 1]) / 2);
    EXPECT_EQ(from_float<T>(middle).bits, i % 2 == 0 ? i : i + 1);
    EXPECT_EQ(from_float<T>(std::nextafterf(middle, 0.0f)).bits, i);
    EXPECT_EQ(from_float<T>(std::nextafterf(middle, INFINITY)).bits, i + 1);
    EXPECT_EQ(from_float<T>(-middle).bits, 128 + (i % 2 == 0 ? i : i + 1));
  }
  for (float x : {largest * 1.5f, 1e30f, INFINITY}) {
    EXPECT_EQ(to_float(from_float<T>(x)), largest);
    EXPECT_EQ(to_float(from_float<T>(-x)), -largest);
  }
}

TEST(Float8, E4M3) { expect_format<Float8E4M3>(3, 7, false, 448.0f); }
TEST(Float8, E5M2) { expect_format<Float8E5M2>(2, 15, true, 57344.0f); }

const Target kReference{"reference", DType::kFloat32};

// The message of the Error that `call` throws; outputs and cache as they were.
std::string refusal(CacheInstance& cache, const std::function<void()>& call) {
  const Values k = cache.k.load(), seqlens = cache.seqlens.load();
  std::string message = "(no error)";
  try {
    call();
  } catch (const Error& error) {
    message = error.what();
  }
  EXPECT_TRUE(identical(cache.k.load(), k)) << message;
  EXPECT_TRUE(identical(cache.seqlens.load(), seqlens)) << message;
  EXPECT_TRUE(cache.out.untouched()) << message;
  EXPECT_TRUE(cache.lse.untouched()) << message;
  return message;
}

const CacheCase kPaged{.name = "paged", .page_size = 16, .append = true};
const CacheCase kInt8{.name = "int8",
                      .storage = DType::kInt8,
                      .granularity = ScaleGranularity::kGroup,
                      .scale_group = 16,
                      .append = true};

class CacheRefusal : public testing::Test {
 protected:
  using Spoil = std::function<void(CacheInstance&, KVCacheView&, CachedOptions&)>;
  void expect(const CacheCase& definition, const Spoil& spoil, const std::string& part) {
    CacheInstance cache(definition, kReference);
    KVCacheView view = cache.view();
    CachedOptions options = cache.options();
    spoil(cache, view, options);
    const std::string message = refusal(cache, [&] {
      cached_attention(cache.q, view, {cache.out, cache.lse}, options, kReference.context());
    });
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_EQ(message.rfind("cached_attention: ", 0), 0u) << message;
    EXPECT_NE(message.find("; need "), std::string::npos) << message;
  }
};

TEST_F(CacheRefusal, Lengths) {
  const CacheCase plain{.name = "plain", .append = true};
  expect(
      plain,
      [](auto& c, auto&, auto&) {
        c.seqlens.store({70, 160, 3});
      },
      "cache: got 1 new tokens behind 160 for sequence 1; need room for them in the capacity of 160");
  expect(
      plain,
      [](auto& c, auto&, auto&) {
        c.seqlens.store({70, -1, 3});
      },
      "cache.seqlens: got -1 for sequence 1");
  expect(
      plain,
      [](auto& c, auto&, auto&) {
        c.seqlens.store({70, 161, 3});
      },
      "cache.seqlens: got 161 for sequence 1");
  expect(
      plain, [](auto&, auto& view, auto&) { view.seqlens = {}; }, "cache.seqlens: got none");
}

TEST_F(CacheRefusal, Pages) {
  const auto spoil_page = [](double id) {
    return [id](CacheInstance& c, KVCacheView&, CachedOptions&) {
      Values table = c.page_table.load();
      table[1] = id;
      c.page_table.store(table);
    };
  };
  expect(kPaged, spoil_page(-1), "cache.page_table: got page -1 at 1 for sequence 0");
  expect(kPaged, spoil_page(1000), "cache.page_table: got page 1000 at 1 for sequence 0");
  expect(
      kPaged,
      [](auto& c, auto&, auto&) {
        Values table = c.page_table.load();
        const std::int64_t pages = c.page_table.view().shape[1];
        table[pages + 2] = table[4];  // the pages where sequences 0 (69 tokens) and 1 (32) grow
        c.page_table.store(table);
      },
      "written by two sequences");
  expect(  // new tokens before the first valid one are stored too
      {.name = "padded", .page_size = 16, .first_key = {50, 0, 0}, .append = true},
      [](auto& c, auto&, auto&) {
        Values table = c.page_table.load();
        table[0] = 1000;
        c.page_table.store(table);
        c.seqlens.store({0, 32, 3});
      },
      "cache.page_table: got page 1000 at 0 for sequence 0");
  expect(
      kPaged, [](auto& c, auto& view, auto&) { view.batch_index = c.seqlens; },
      "cache.batch_index: got a tensor; need none for a paged cache");
}

TEST_F(CacheRefusal, BatchIndex) {
  const CacheCase indexed{.name = "indexed", .batch_index = true, .append = true};
  expect(
      indexed,
      [](auto& c, auto&, auto&) {
        c.batch_index.store({0, 4, 2});
      },
      "cache.batch_index: got 4 for sequence 1; need 0 to 3");
  expect(
      indexed,
      [](auto& c, auto&, auto&) {
        c.batch_index.store({0, 2, 2});
      },
      "row 2 written by two sequences");
}

TEST_F(CacheRefusal, Scales) {
  expect(
      kInt8, [](auto&, auto& view, auto&) { view.scale_granularity = ScaleGranularity::kNone; },
      "cache.scale_granularity");
  expect(
      kInt8, [](auto&, auto& view, auto&) { view.scale_granularity = ScaleGranularity::kHead; }, "cache.k_scale");
  expect(
      kInt8, [](auto&, auto& view, auto&) { view.scale_group = 7; }, "cache.scale_group: got 7");
  expect(
      kInt8, [](auto&, auto& view, auto&) { view.k_scale = {}; }, "cache.k_scale: got none");
  expect(
      {.name = "float", .append = true}, [](auto& c, auto& view, auto&) { view.k_scale = c.lse; }, "cache.k_scale");
  expect(
      {.name = "fp8", .storage = DType::kFloat8E4M3, .append = true},
      [](auto&, auto& view, auto&) { view.scale_granularity = ScaleGranularity::kHead; },
      "cache.scale_granularity: got granularity 3 with float8_e4m3; need none or tensor");
}

TEST_F(CacheRefusal, ShapesAndTypes) {
  const CacheCase plain{.name = "plain", .append = true};
  expect(
      plain, [](auto& c, auto&, auto&) { c.q.view().shape[1] = 3; }, "num_heads divisible by num_heads_kv");
  expect(
      plain, [](auto& c, auto&, auto&) { c.q.view().shape[3] = 63; }, "q: got");
  expect(
      plain, [](auto&, auto& view, auto&) { view.v.dtype = DType::kFloat16; }, "cache.v: got float16");
  expect(
      plain, [](auto&, auto& view, auto&) { view.k.dtype = DType::kInt32; }, "cache.k: got int32");
  expect(
      plain, [](auto&, auto& view, auto&) { view.v.shape[2] = 100; }, "cache.v: got");
  expect(
      plain, [](auto&, auto&, auto& options) { options.v_new = {}; }, "v_new: got");
  expect(
      plain, [](auto&, auto&, auto& options) { options.v_new.rank = 2147483647; },
      "v_new: got float32 of rank 2147483647");
  expect(
      plain, [](auto&, auto&, auto& options) { options.k_new.shape[1] = 1; }, "k_new: got");
  expect(
      plain, [](auto&, auto&, auto& options) { options.num_splits = -1; }, "num_splits: got -1");
  expect(
      plain, [](auto&, auto&, auto& options) { options.prob_threshold = 1.0; }, "prob_threshold");
  expect(
      plain, [](auto&, auto&, auto& options) { options.prob_threshold = NAN; }, "prob_threshold");
  expect(
      plain, [](auto&, auto&, auto& options) { options.softmax_scale = NAN; }, "softmax_scale");
}

TEST_F(CacheRefusal, Rotary) {
  const CacheCase rotary{.name = "rotary", .rotary_pairs = 8, .append = true};
  expect(
      rotary, [](auto&, auto&, auto& options) { options.rotary.cos.shape[0] = options.rotary.sin.shape[0] = 100; },
      "rotary.cos: got 100 positions for 128 tokens for sequence 2");
  expect(
      rotary, [](auto&, auto&, auto& options) { options.rotary.sin = {}; }, "rotary.sin");
  expect(
      rotary, [](auto&, auto&, auto& options) { options.rotary.cos.shape[1] = options.rotary.sin.shape[1] = 33; },
      "rotary.cos");
}

TEST_F(CacheRefusal, OutputsOverTheCache) {
  CacheInstance cache({.name = "plain"}, kReference);
  TensorView out = cache.k;
  out.shape = {3, 4, 1, 64};
  EXPECT_THROW(cached_attention(cache.q, cache.view(), {out}, cache.options(), kReference.context()), Error);
}

// Finite tokens around a special one are not disturbed.
TEST(Append, SpecialValues) {
  for (const auto& [storage, granularity] :
       {std::pair{DType::kInt8, ScaleGranularity::kHead}, std::pair{DType::kInt8, ScaleGranularity::kToken},
        std::pair{DType::kFloat8E4M3, ScaleGranularity::kNone},
        std::pair{DType::kFloat8E5M2, ScaleGranularity::kNone}}) {
    for (const Target& target : targets()) {
      if (!has_cached(target)) continue;
      CacheCase definition{.name = "special",
                           .num_heads_kv = 1,
                           .head_dim = 20,
                           .lengths = {3},
                           .queries = {1},
                           .storage = storage,
                           .granularity = granularity};
      CacheInstance cache(definition, target);
      cache.seqlens.store({0});
      std::fill(cache.keys.begin(), cache.keys.end(), 0.0);
      cache.keys[20] = -0.0;
      cache.keys[21] = NAN;
      cache.keys[22] = INFINITY;
      cache.append({0}, {3}, true);
      const bool int8 = storage == DType::kInt8;
      EXPECT_TRUE(identical(cache.stored_key(0, 0, 0), Values(20, 0.0))) << name_of_target(target);
      EXPECT_TRUE(identical(cache.stored_key(0, 0, 2), Values(20, 0.0))) << name_of_target(target);
      const Values special = cache.stored_key(0, 0, 1);
      EXPECT_TRUE(std::isnan(special[1])) << name_of_target(target);
      EXPECT_EQ(std::isnan(special[5]), int8) << name_of_target(target);
      if (!int8) {
        EXPECT_EQ(special[2], storage == DType::kFloat8E4M3 ? 448.0 : 57344.0) << name_of_target(target);
      }
    }
  }
}

class Pages : public testing::Test {
 protected:
  static constexpr std::int64_t kSequences = 3, kMaxPages = 4, kPages = 8, kPageSize = 4;
  std::vector<std::int32_t> table = std::vector<std::int32_t>(kSequences * kMaxPages, -1);
  std::vector<std::int32_t> seqlens = std::vector<std::int32_t>(kSequences, 0);
  std::vector<std::int32_t> references = std::vector<std::int32_t>(kPages, 0);
  PagePool pool{TensorView(table.data(), DType::kInt32, {kSequences, kMaxPages}),
                TensorView(seqlens.data(), DType::kInt32, {kSequences}),
                TensorView(references.data(), DType::kInt32, {kPages}), kPageSize};

  std::vector<PageCopy> grow(std::vector<std::int64_t> counts) {
    const std::vector<PageCopy> copies = pool.reserve(counts);
    for (std::int64_t b = 0; b < kSequences; ++b) seqlens[b] += static_cast<std::int32_t>(counts[b]);
    expect_consistent();
    return copies;
  }
  // Every page's count is the number of table entries that name it, and lengths are covered.
  void expect_consistent() {
    std::vector<std::int32_t> seen(kPages, 0);
    for (std::int64_t b = 0; b < kSequences; ++b) {
      bool ended = false;
      for (std::int64_t page = 0; page < kMaxPages; ++page) {
        const std::int32_t id = table[b * kMaxPages + page];
        if (id >= 0) {
          EXPECT_FALSE(ended);
          ++seen[id];
        }
        ended = ended || id < 0;
        EXPECT_TRUE(page * kPageSize >= seqlens[b] || id >= 0);
      }
    }
    EXPECT_EQ(seen, references);
  }
  std::int32_t page(std::int64_t sequence, std::int64_t index) const { return table[sequence * kMaxPages + index]; }
};

TEST_F(Pages, GrowAndFree) {
  EXPECT_TRUE(grow({5, 1, 0}).empty());
  EXPECT_EQ(pool.free_pages(), 5);
  EXPECT_TRUE(grow({3, 3, 0}).empty());  // fills the pages that are there
  EXPECT_EQ(pool.free_pages(), 5);
  pool.free(0);
  expect_consistent();
  EXPECT_EQ(pool.free_pages(), 7);
  EXPECT_EQ(seqlens[0], 0);
  pool.truncate(1, 2);
  expect_consistent();
  EXPECT_EQ(seqlens[1], 2);
}

TEST_F(Pages, AForkSharesUntilItWrites) {
  grow({6, 0, 0});  // one full page, one with two tokens
  pool.fork(0, 1);
  expect_consistent();
  EXPECT_EQ(pool.free_pages(), 6);
  EXPECT_EQ(seqlens[1], 6);
  const auto copies = grow({0, 1, 0});  // into the shared second page
  ASSERT_EQ(copies.size(), 1u);
  EXPECT_EQ(copies[0].source, page(0, 1));
  EXPECT_EQ(copies[0].target, page(1, 1));
  EXPECT_EQ(page(0, 0), page(1, 0));     // the full one stays shared
  EXPECT_TRUE(grow({1, 0, 0}).empty());  // the last owner writes in place
  pool.free(0);
  expect_consistent();
  EXPECT_EQ(seqlens[1], 7);
}

TEST_F(Pages, TwoOwnersGrowAtOnce) {
  grow({6, 0, 0});
  pool.fork(0, 1);
  pool.fork(0, 2, 5);
  const auto copies = grow({1, 1, 1});
  EXPECT_EQ(copies.size(), 2u);
  EXPECT_NE(page(0, 1), page(1, 1));
  EXPECT_NE(page(0, 1), page(2, 1));
  EXPECT_NE(page(1, 1), page(2, 1));
}

TEST_F(Pages, AForkAtAPageEdgeCopiesNothing) {
  grow({8, 0, 0});
  pool.fork(0, 1, 4);
  EXPECT_EQ(page(1, 1), -1);
  EXPECT_TRUE(grow({1, 1, 0}).empty());
}

TEST_F(Pages, AllOrNothing) {
  grow({16, 9, 0});  // 7 pages
  const auto before = table;
  const std::vector<std::int64_t> too_many{0, 4, 5};
  try {
    pool.reserve(too_many);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
    EXPECT_STREQ(error.what(), "page_pool.reserve: counts: got a need for 3 pages; need at most the 1 free ones");
  }
  EXPECT_EQ(table, before);
  expect_consistent();
  const std::vector<std::int64_t> too_long{1, 0, 0};
  EXPECT_THROW(pool.reserve(too_long), Error);
  EXPECT_THROW(pool.free(3), Error);
  EXPECT_THROW(pool.fork(0, 0), Error);
  EXPECT_THROW(pool.truncate(1, 10), Error);
  expect_consistent();
}

// A forked sequence continues with its own tokens; the source's attention does not change by a bit.
TEST_F(Pages, ForkedStorageStaysIndependent) {
  constexpr std::int64_t kDim = 8;
  std::vector<float> k(kPages * kPageSize * kDim), v(k.size());
  const KVCacheView view{.k = TensorView(k.data(), DType::kFloat32, {kPages, 1, kPageSize, kDim}),
                         .v = TensorView(v.data(), DType::kFloat32, {kPages, 1, kPageSize, kDim}),
                         .page_table = TensorView(table.data(), DType::kInt32, {kSequences, kMaxPages}),
                         .seqlens = TensorView(seqlens.data(), DType::kInt32, {kSequences})};
  const auto append = [&](std::vector<std::int64_t> counts, float value) {
    copy_pages(view, pool.reserve(counts));
    const std::int64_t most = *std::max_element(counts.begin(), counts.end());
    std::vector<float> rows(kSequences * most * kDim, value);
    std::vector<std::int32_t> each(counts.begin(), counts.end());
    const TensorView tokens(rows.data(), DType::kFloat32, {kSequences, 1, most, kDim});
    append_kv(view, tokens, tokens, {.seqlens = TensorView(each.data(), DType::kInt32, {kSequences})},
              kReference.context());
    expect_consistent();
  };
  append({6, 0, 0}, 1.0f);
  pool.fork(0, 1);
  append({0, 3, 0}, 2.0f);
  append({2, 0, 0}, 3.0f);
  const auto value = [&](std::int64_t b, std::int64_t t) {
    return v[(page(b, t / kPageSize) * kPageSize + t % kPageSize) * kDim];
  };
  for (std::int64_t t = 0; t < 6; ++t) {
    EXPECT_EQ(value(0, t), 1.0f);
    EXPECT_EQ(value(1, t), 1.0f);
  }
  EXPECT_EQ(value(0, 6), 3.0f);
  EXPECT_EQ(value(0, 7), 3.0f);
  for (std::int64_t t = 6; t < 9; ++t) EXPECT_EQ(value(1, t), 2.0f);
}

}  // namespace
}  // namespace onepass::test
