// c_api_reader.h: C structs → C++ values, or an Error that names the field.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <string>

#include "onepass/onepass.h"
#include "onepass/onepass_c.h"

namespace onepass::c_api {

constexpr std::uint64_t kKnownFlags =
    ONEPASS_CAUSAL | ONEPASS_TOP_LEFT | ONEPASS_ALIBI_ZERO_FOR_FUTURE | ONEPASS_DETERMINISTIC | ONEPASS_SOFTMAX_SCALE;

[[noreturn]] inline void refuse(const char* operation, const std::string& argument, const std::string& received,
                                const std::string& required, ErrorCode code = ErrorCode::kInvalidArgument) {
  throw Error(code, std::string(operation) + ": " + argument + ": got " + received + "; need " + required);
}

// The one place that reads C structs. `operation` is for messages.
class Reader {
 public:
  explicit Reader(const char* operation) : operation_(operation) {}

  TensorView optional(const char* name, const onepass_tensor* tensor) const {
    if (tensor == nullptr) return {};
    check_struct(name, *tensor);
    check_reserved(name, tensor->reserved);
    TensorView view;
    view.data = tensor->data;
    view.dtype = narrowed<DType>(name, "dtype", tensor->dtype);
    view.device = {narrowed<DeviceType>(name, "device_type", tensor->device_type), tensor->device_index};
    view.rank = tensor->rank;
    std::copy_n(tensor->shape, kMaxRank, view.shape.begin());
    std::copy_n(tensor->strides, kMaxRank, view.strides.begin());
    return view;
  }

  TensorView required(const char* name, const onepass_tensor* tensor) const {
    if (tensor == nullptr) refuse(operation_, name, "a null pointer", "a tensor");
    return optional(name, tensor);
  }

  AttentionOptions options(const onepass_attention_options* options) const {
    if (options == nullptr) return {};
    check_struct("options", *options);
    check_reserved("options", options->reserved);
    check_flags(options->flags, kKnownFlags);
    const auto flag = [options](std::uint64_t bit) { return (options->flags & bit) != 0; };
    AttentionOptions result;
    result.causal = flag(ONEPASS_CAUSAL);
    if (flag(ONEPASS_TOP_LEFT)) result.alignment = CausalAlignment::kTopLeft;
    if (flag(ONEPASS_SOFTMAX_SCALE)) result.softmax_scale = options->softmax_scale;
    result.window = window(options->window_left, options->window_right);
    result.softcap = options->softcap;
    result.alibi = {optional("alibi_slopes", options->alibi_slopes), flag(ONEPASS_ALIBI_ZERO_FOR_FUTURE)};
    result.bias = optional("bias", options->bias);
    result.sinks = optional("sinks", options->sinks);
    result.key_begin = optional("key_begin", options->key_begin);
    result.key_end = optional("key_end", options->key_end);
    result.dropout = {options->dropout_p, options->dropout_seed, options->dropout_offset};
    result.deterministic = flag(ONEPASS_DETERMINISTIC);
    return result;
  }

  AttentionOutputs outputs(const onepass_attention_outputs* outputs) const {
    check_given("outputs", outputs);
    return {required("out", outputs->out), optional("lse", outputs->lse),
            optional("total_attention", outputs->total_attention)};
  }

  AttentionGradients gradients(const onepass_attention_gradients* gradients, bool piecewise = false) const {
    check_given("gradients", gradients);
    if (!piecewise && (gradients->dq2 != nullptr || gradients->dk2 != nullptr)) {
      refuse(operation_, gradients->dq2 != nullptr ? "dq2" : "dk2", "a tensor", "none: there is no second pair");
    }
    return {required("dq", gradients->dq), required("dk", gradients->dk), required("dv", gradients->dv),
            optional("dbias", gradients->dbias), optional("dsinks", gradients->dsinks)};
  }

  VarlenShape varlen_shape(const onepass_varlen_shape* shape) const {
    check_given("shape", shape);
    return {required("cu_seqlens_q", shape->cu_seqlens_q), required("cu_seqlens_k", shape->cu_seqlens_k),
            shape->max_seqlen_q, shape->max_seqlen_k};
  }

  KVCacheView cache(const onepass_kv_cache* cache) const {
    check_given("cache", cache);
    KVCacheView view;
    view.k = required("cache.k", cache->k);
    view.v = required("cache.v", cache->v);
    view.page_table = optional("cache.page_table", cache->page_table);
    view.seqlens = required("cache.seqlens", cache->seqlens);
    view.k_scale = optional("cache.k_scale", cache->k_scale);
    view.v_scale = optional("cache.v_scale", cache->v_scale);
    check_reserved("cache", cache->reserved2);
    view.scale_granularity = narrowed<ScaleGranularity>("cache", "scale_granularity", cache->scale_granularity);
    view.scale_group = cache->scale_group;
    view.first_key = optional("cache.first_key", cache->first_key);
    view.batch_index = optional("cache.batch_index", cache->batch_index);
    return view;
  }

  PagePool page_pool(const onepass_page_pool* pool) const {
    check_given("pool", pool);
    return {required("pool.page_table", pool->page_table), required("pool.seqlens", pool->seqlens),
            required("pool.reference_counts", pool->reference_counts), pool->page_size};
  }

  Rotary rotary(const onepass_rotary* rotary) const {
    if (rotary == nullptr) return {};
    check_struct("rotary", *rotary);
    return {required("rotary.cos", rotary->cos), required("rotary.sin", rotary->sin), rotary->interleaved != 0};
  }

  AppendOptions append_options(const onepass_append_options* options) const {
    if (options == nullptr) return {};
    check_struct("options", *options);
    return {optional("cu_seqlens", options->cu_seqlens), optional("seqlens", options->seqlens), rotary(options->rotary),
            options->keep_seqlens == 0};
  }

  CachedOptions cached_options(const onepass_cached_options* options) const {
    if (options == nullptr) return {};
    check_struct("options", *options);
    check_flags(options->flags, ONEPASS_CAUSAL | ONEPASS_ALIBI_ZERO_FOR_FUTURE | ONEPASS_SOFTMAX_SCALE);
    CachedOptions result;
    result.causal = (options->flags & ONEPASS_CAUSAL) != 0;
    if ((options->flags & ONEPASS_SOFTMAX_SCALE) != 0) result.softmax_scale = options->softmax_scale;
    result.window = window(options->window_left, options->window_right);
    result.softcap = options->softcap;
    result.alibi = {optional("alibi_slopes", options->alibi_slopes),
                    (options->flags & ONEPASS_ALIBI_ZERO_FOR_FUTURE) != 0};
    result.sinks = optional("sinks", options->sinks);
    result.cu_seqlens_q = optional("cu_seqlens_q", options->cu_seqlens_q);
    result.max_seqlen_q = options->max_seqlen_q;
    result.k_new = optional("k_new", options->k_new);
    result.v_new = optional("v_new", options->v_new);
    result.advance = options->keep_seqlens == 0;
    result.rotary = rotary(options->rotary);
    result.num_splits = options->num_splits;
    result.prob_threshold = options->prob_threshold;
    return result;
  }

  template <class S>
  void check_struct(const char* name, const S& given) const {
    if (given.struct_size == sizeof(S)) return;
    refuse(operation_, std::string(name) + ".struct_size", std::to_string(given.struct_size),
           std::to_string(sizeof(S)) + ", the size in version " + version());
  }

 private:
  template <class S>
  void check_given(const char* name, const S* given) const {
    if (given == nullptr) refuse(operation_, name, "a null pointer", "a struct");
    check_struct(name, *given);
    check_reserved(name, given->reserved);
  }

  void check_reserved(const char* name, std::int64_t reserved) const {
    if (reserved != 0) refuse(operation_, std::string(name) + ".reserved", std::to_string(reserved), "0");
  }

  void check_flags(std::uint64_t flags, std::uint64_t known) const {
    if ((flags & ~known) == 0) return;
    refuse(operation_, "options.flags", std::to_string(flags), "a combination of the bits in " + std::to_string(known));
  }

  static Window window(std::int64_t left, std::int64_t right) {
    Window result;
    if (left != ONEPASS_UNBOUNDED) result.left = left;
    if (right != ONEPASS_UNBOUNDED) result.right = right;
    return result;
  }

  // The C++ enums have one byte: 256 must not become 0.
  template <class Enum>
  Enum narrowed(const char* name, const char* field, std::int32_t value) const {
    if (value < 0 || value > 255) {
      refuse(operation_, name, std::string(field).append(" ").append(std::to_string(value)), "a known one",
             ErrorCode::kInvalidType);
    }
    return static_cast<Enum>(value);
  }

  const char* operation_;
};

class CAllocator final : public Allocator {
 public:
  explicit CAllocator(const onepass_context& context) : context_(context) {}
  void* allocate(std::size_t bytes, Device device, void* stream) override {
    return context_.allocate(context_.user, bytes, static_cast<onepass_device_type>(device.type), device.index, stream);
  }
  void deallocate(void* block, std::size_t bytes, Device device, void* stream) override {
    context_.deallocate(context_.user, block, bytes, static_cast<onepass_device_type>(device.type), device.index,
                        stream);
  }

 private:
  const onepass_context& context_;
};

// Tasks run inside the caller's C code, which no exception may cross.
class CExecutor final : public Executor {
 public:
  explicit CExecutor(const onepass_context& context) : context_(context) {}
  int concurrency() const override { return context_.concurrency; }
  void run(std::int64_t count, const std::function<void(std::int64_t)>& task) override {
    Region region{task};
    context_.run(context_.user, count, &Region::call, &region);
    if (region.error) std::rethrow_exception(region.error);
    if (region.calls != count) {
      refuse("context", "run", std::to_string(region.calls) + " calls of the task", std::to_string(count),
             ErrorCode::kInternal);
    }
  }

 private:
  struct Region {
    const std::function<void(std::int64_t)>& task;
    std::atomic<std::int64_t> calls{0};
    std::mutex mutex = {};
    std::exception_ptr error = {};

    static void call(void* data, std::int64_t index) noexcept {
      auto& region = *static_cast<Region*>(data);
      ++region.calls;
      try {
        region.task(index);
      } catch (...) {
        const std::lock_guard lock(region.mutex);
        if (!region.error) region.error = std::current_exception();
      }
    }
  };

  const onepass_context& context_;
};

// A C++ context that lives as long as the call.
class CallContext {
 public:
  CallContext(const Reader& reader, const char* operation, const onepass_context* context)
      : given_(copy(reader, context)), allocator_(given_), executor_(given_) {
    if ((given_.allocate == nullptr) != (given_.deallocate == nullptr)) {
      refuse(operation, "context.allocate", "one of allocate and deallocate", "both or none");
    }
    if (given_.run != nullptr && given_.concurrency < 1) {
      refuse(operation, "context.concurrency", std::to_string(given_.concurrency), "at least 1 beside run");
    }
    context_.stream = given_.stream;
    context_.backend = given_.backend;
    if (given_.allocate != nullptr) context_.allocator = &allocator_;
    if (given_.run != nullptr) context_.executor = &executor_;
  }
  operator const ExecutionContext&() const { return context_; }

 private:
  static onepass_context copy(const Reader& reader, const onepass_context* context) {
    if (context == nullptr) return ONEPASS_CONTEXT_INIT;
    reader.check_struct("context", *context);
    return *context;
  }

  onepass_context given_;
  CAllocator allocator_;
  CExecutor executor_;
  ExecutionContext context_;
};

}  // namespace onepass::c_api
