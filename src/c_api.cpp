// c_api.cpp: the C interface over the C++ one. Exceptions stop here.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <string>

#include "onepass/onepass.h"
#include "onepass/onepass_c.h"

namespace onepass {
namespace {

static_assert(ONEPASS_MAX_RANK == kMaxRank);
static_assert(ONEPASS_FLOAT64 == static_cast<int>(DType::kFloat64) && ONEPASS_INT64 == static_cast<int>(DType::kInt64));
static_assert(ONEPASS_CUDA == static_cast<int>(DeviceType::kCuda));
static_assert(ONEPASS_INVALID_ARGUMENT == static_cast<int>(ErrorCode::kInvalidArgument));
static_assert(ONEPASS_INTERNAL == static_cast<int>(ErrorCode::kInternal));

constexpr std::uint64_t kKnownFlags =
    ONEPASS_CAUSAL | ONEPASS_TOP_LEFT | ONEPASS_ALIBI_ZERO_FOR_FUTURE | ONEPASS_DETERMINISTIC | ONEPASS_SOFTMAX_SCALE;

// A fixed array, so that reporting an error needs no memory.
thread_local char last_error[1024] = "";

onepass_status fail(onepass_status status, const char* message) {
  std::size_t length = std::min(std::strlen(message), sizeof(last_error) - 1);
  while (length > 0 && length == sizeof(last_error) - 1 && (message[length] & 0xC0) == 0x80) --length;  // whole UTF-8
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

[[noreturn]] void refuse(const char* operation, const std::string& argument, const std::string& received,
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
    if ((options->flags & ~kKnownFlags) != 0) {
      refuse(operation_, "options.flags", std::to_string(options->flags),
             "a combination of bits up to " + std::to_string(kKnownFlags));
    }
    const auto flag = [options](std::uint64_t bit) { return (options->flags & bit) != 0; };
    AttentionOptions result;
    result.causal = flag(ONEPASS_CAUSAL);
    if (flag(ONEPASS_TOP_LEFT)) result.alignment = CausalAlignment::kTopLeft;
    if (flag(ONEPASS_SOFTMAX_SCALE)) result.softmax_scale = options->softmax_scale;
    if (options->window_left != ONEPASS_UNBOUNDED) result.window.left = options->window_left;
    if (options->window_right != ONEPASS_UNBOUNDED) result.window.right = options->window_right;
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

}  // namespace
}  // namespace onepass

using onepass::CallContext;
using onepass::guarded;
using onepass::Reader;

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

onepass_status onepass_alibi_slope(int64_t head, int64_t num_heads, int32_t geometric, double* slope) {
  return guarded([&] {
    if (slope == nullptr) onepass::refuse("alibi_slope", "slope", "a null pointer", "where to write the slope");
    *slope = onepass::alibi_slope(head, num_heads, geometric != 0);
  });
}

const char* onepass_version(void) { return onepass::version(); }

onepass_status onepass_info(char* text, size_t capacity, size_t* length) {
  return guarded([&] {
    if (text == nullptr && capacity != 0) {
      onepass::refuse("info", "text", "a null pointer", "room for " + std::to_string(capacity) + " bytes");
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
