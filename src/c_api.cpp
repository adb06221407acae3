// c_api.cpp: the C interface over the C++ one. Exceptions stop here.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "c_api_reader.h"
#include "onepass/onepass.h"
#include "onepass/onepass_c.h"

namespace onepass {
namespace {

static_assert(ONEPASS_MAX_RANK == kMaxRank);
static_assert(ONEPASS_FLOAT64 == static_cast<int>(DType::kFloat64) && ONEPASS_INT64 == static_cast<int>(DType::kInt64));
static_assert(ONEPASS_SCALE_GROUP == static_cast<int>(ScaleGranularity::kGroup));
static_assert(ONEPASS_CUDA == static_cast<int>(DeviceType::kCuda));
static_assert(ONEPASS_INVALID_ARGUMENT == static_cast<int>(ErrorCode::kInvalidArgument));
static_assert(ONEPASS_INTERNAL == static_cast<int>(ErrorCode::kInternal));

// A fixed array, so that reporting an error needs no memory.
thread_local char last_error[1024] = "";

onepass_status fail(onepass_status status, const char* message) {
  std::size_t length = std::min(std::strlen(message), sizeof(last_error) - 1);
  while (length > 0 && (message[length] & 0xC0) == 0x80) --length;  // not in the middle of a UTF-8 character
  std::memcpy(last_error, message, length);
  last_error[length] = '\0';
  return status;
}

template <class F>
onepass_status guarded(F&& operation) noexcept {
  try {
    operation();
    return ONEPASS_OK;
  } catch (const Error& error) {
    return fail(static_cast<onepass_status>(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return fail(ONEPASS_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(ONEPASS_INTERNAL, error.what());
  } catch (...) {
    return fail(ONEPASS_INTERNAL, "an exception of unknown type");
  }
}

}  // namespace
}  // namespace onepass

using onepass::guarded;
using onepass::c_api::CallContext;
using onepass::c_api::Reader;

onepass_status onepass_attention(const onepass_tensor* q, const onepass_tensor* k, const onepass_tensor* v,
                                 const onepass_attention_outputs* outputs, const onepass_attention_options* options,
                                 const onepass_context* context) {
  return guarded([&] {
    const Reader read("attention");
    onepass::attention(read.required("q", q), read.required("k", k), read.required("v", v), read.outputs(outputs),
                       read.options(options), CallContext(read, "attention", context));
  });
}

onepass_status onepass_attention_backward(const onepass_tensor* dout, const onepass_tensor* q, const onepass_tensor* k,
                                          const onepass_tensor* v, const onepass_tensor* out, const onepass_tensor* lse,
                                          const onepass_attention_gradients* gradients,
                                          const onepass_attention_options* options, const onepass_context* context) {
  return guarded([&] {
    const Reader read("attention_backward");
    onepass::attention_backward(read.required("dout", dout), read.required("q", q), read.required("k", k),
                                read.required("v", v), read.required("out", out), read.required("lse", lse),
                                read.gradients(gradients), read.options(options),
                                CallContext(read, "attention_backward", context));
  });
}

onepass_status onepass_varlen_attention(const onepass_tensor* q, const onepass_tensor* k, const onepass_tensor* v,
                                        const onepass_varlen_shape* shape, const onepass_attention_outputs* outputs,
                                        const onepass_attention_options* options, const onepass_context* context) {
  return guarded([&] {
    const Reader read("varlen_attention");
    onepass::varlen_attention(read.required("q", q), read.required("k", k), read.required("v", v),
                              read.varlen_shape(shape), read.outputs(outputs), read.options(options),
                              CallContext(read, "varlen_attention", context));
  });
}

onepass_status onepass_varlen_attention_backward(const onepass_tensor* dout, const onepass_tensor* q,
                                                 const onepass_tensor* k, const onepass_tensor* v,
                                                 const onepass_varlen_shape* shape, const onepass_tensor* out,
                                                 const onepass_tensor* lse,
                                                 const onepass_attention_gradients* gradients,
                                                 const onepass_attention_options* options,
                                                 const onepass_context* context) {
  return guarded([&] {
    const Reader read("varlen_attention_backward");
    onepass::varlen_attention_backward(read.required("dout", dout), read.required("q", q), read.required("k", k),
                                       read.required("v", v), read.varlen_shape(shape), read.required("out", out),
                                       read.required("lse", lse), read.gradients(gradients), read.options(options),
                                       CallContext(read, "varlen_attention_backward", context));
  });
}

onepass_status onepass_piecewise_attention(const onepass_tensor* q1, const onepass_tensor* k1, const onepass_tensor* q2,
                                           const onepass_tensor* k2, const onepass_tensor* v, int64_t dist_threshold,
                                           const onepass_attention_outputs* outputs,
                                           const onepass_attention_options* options, const onepass_context* context) {
  return guarded([&] {
    const Reader read("piecewise_attention");
    onepass::piecewise_attention(read.required("q1", q1), read.required("k1", k1), read.required("q2", q2),
                                 read.required("k2", k2), read.required("v", v), dist_threshold, read.outputs(outputs),
                                 read.options(options), CallContext(read, "piecewise_attention", context));
  });
}

onepass_status onepass_piecewise_attention_backward(
    const onepass_tensor* dout, const onepass_tensor* q1, const onepass_tensor* k1, const onepass_tensor* q2,
    const onepass_tensor* k2, const onepass_tensor* v, int64_t dist_threshold, const onepass_tensor* out,
    const onepass_tensor* lse, const onepass_attention_gradients* gradients, const onepass_attention_options* options,
    const onepass_context* context) {
  return guarded([&] {
    const Reader read("piecewise_attention_backward");
    const onepass::AttentionGradients near = read.gradients(gradients, /*piecewise=*/true);
    onepass::piecewise_attention_backward(
        read.required("dout", dout), read.required("q1", q1), read.required("k1", k1), read.required("q2", q2),
        read.required("k2", k2), read.required("v", v), dist_threshold, read.required("out", out),
        read.required("lse", lse), {near, read.required("dq2", gradients->dq2), read.required("dk2", gradients->dk2)},
        read.options(options), CallContext(read, "piecewise_attention_backward", context));
  });
}

onepass_status onepass_total_attention(const onepass_tensor* q, const onepass_tensor* k, const onepass_tensor* lse,
                                       const onepass_tensor* total, const onepass_attention_options* options,
                                       const onepass_context* context) {
  return guarded([&] {
    const Reader read("total_attention");
    onepass::total_attention(read.required("q", q), read.required("k", k), read.required("lse", lse),
                             read.required("total", total), read.options(options),
                             CallContext(read, "total_attention", context));
  });
}

onepass_status onepass_merge_states(const onepass_tensor* out_a, const onepass_tensor* lse_a,
                                    const onepass_tensor* out_b, const onepass_tensor* lse_b, const onepass_tensor* out,
                                    const onepass_tensor* lse, const onepass_context* context) {
  return guarded([&] {
    const Reader read("merge_states");
    onepass::merge_states(read.required("out_a", out_a), read.required("lse_a", lse_a), read.required("out_b", out_b),
                          read.required("lse_b", lse_b), read.required("out", out), read.required("lse", lse),
                          CallContext(read, "merge_states", context));
  });
}

onepass_status onepass_append_kv(const onepass_kv_cache* cache, const onepass_tensor* k_new,
                                 const onepass_tensor* v_new, const onepass_append_options* options,
                                 const onepass_context* context) {
  return guarded([&] {
    const Reader read("append_kv");
    onepass::append_kv(read.cache(cache), read.required("k_new", k_new), read.required("v_new", v_new),
                       read.append_options(options), CallContext(read, "append_kv", context));
  });
}

onepass_status onepass_cached_attention(const onepass_tensor* q, const onepass_kv_cache* cache,
                                        const onepass_attention_outputs* outputs, const onepass_cached_options* options,
                                        const onepass_context* context) {
  return guarded([&] {
    const Reader read("cached_attention");
    onepass::cached_attention(read.required("q", q), read.cache(cache), read.outputs(outputs),
                              read.cached_options(options), CallContext(read, "cached_attention", context));
  });
}

onepass_status onepass_page_pool_reserve(const onepass_page_pool* pool, const int64_t* counts,
                                         onepass_page_copy* copies, size_t* num_copies) {
  return guarded([&] {
    constexpr const char* kOperation = "page_pool.reserve";
    onepass::PagePool pages = Reader(kOperation).page_pool(pool);
    const auto given = [&](const char* name, const void* array) {
      if (array == nullptr) onepass::c_api::refuse(kOperation, name, "a null pointer", "room for one of each sequence");
    };
    given("counts", counts);
    given("copies", copies);
    given("num_copies", num_copies);
    const auto sequences = static_cast<std::size_t>(pool->seqlens->shape[0]);
    const std::vector<onepass::PageCopy> made = pages.reserve({counts, sequences});
    for (std::size_t i = 0; i < made.size(); ++i) copies[i] = {made[i].source, made[i].target};
    *num_copies = made.size();
  });
}

onepass_status onepass_page_pool_truncate(const onepass_page_pool* pool, int64_t sequence, int64_t length) {
  return guarded([&] { Reader("page_pool.truncate").page_pool(pool).truncate(sequence, length); });
}

onepass_status onepass_page_pool_fork(const onepass_page_pool* pool, int64_t source, int64_t target, int64_t length) {
  return guarded([&] {
    std::optional<std::int64_t> tokens;
    if (length != ONEPASS_WHOLE_SEQUENCE) tokens = length;
    Reader("page_pool.fork").page_pool(pool).fork(source, target, tokens);
  });
}

onepass_status onepass_page_pool_free_pages(const onepass_page_pool* pool, int64_t* count) {
  return guarded([&] {
    constexpr const char* kOperation = "page_pool.free_pages";
    const onepass::PagePool pages = Reader(kOperation).page_pool(pool);
    if (count == nullptr) onepass::c_api::refuse(kOperation, "count", "a null pointer", "where to write the count");
    *count = pages.free_pages();
  });
}

onepass_status onepass_copy_pages(const onepass_kv_cache* cache, const onepass_page_copy* copies, size_t num_copies) {
  return guarded([&] {
    constexpr const char* kOperation = "copy_pages";
    if (copies == nullptr && num_copies != 0) {
      onepass::c_api::refuse(kOperation, "copies", "a null pointer", std::to_string(num_copies) + " copies");
    }
    std::vector<onepass::PageCopy> pages;
    for (std::size_t i = 0; i < num_copies; ++i) pages.push_back({copies[i].source, copies[i].target});
    onepass::copy_pages(Reader(kOperation).cache(cache), pages);
  });
}

onepass_status onepass_alibi_slope(int64_t head, int64_t num_heads, int32_t geometric, double* slope) {
  return guarded([&] {
    if (slope == nullptr) onepass::c_api::refuse("alibi_slope", "slope", "a null pointer", "where to write the slope");
    *slope = onepass::alibi_slope(head, num_heads, geometric != 0);
  });
}

const char* onepass_version(void) { return onepass::version(); }

onepass_status onepass_info(char* text, size_t capacity, size_t* length) {
  return guarded([&] {
    if (text == nullptr && capacity != 0) {
      onepass::c_api::refuse("info", "text", "a null pointer", "room for " + std::to_string(capacity) + " bytes");
    }
    const std::string info = onepass::info();
    if (length != nullptr) *length = info.size();
    if (capacity == 0) return;
    const std::size_t written = std::min(info.size(), capacity - 1);
    std::memcpy(text, info.data(), written);
    text[written] = '\0';
  });
}

const char* onepass_last_error(void) { return onepass::last_error; }

void onepass_set_num_threads(int32_t count) { onepass::set_num_threads(count); }
int32_t onepass_num_threads(void) { return onepass::num_threads(); }
