#include "context.h"

#include <dlfcn.h>
#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

namespace onepass::binding {
namespace {

// torch's intra-op pool. Workers draw the next index from a counter, because tasks differ in length (causal rows) and
// torch would hand each thread one fixed range.
class TorchExecutor final : public Executor {
 public:
  int concurrency() const override { return static_cast<int>(torch::stable::get_num_threads()); }

  void run(std::int64_t count, const std::function<void(std::int64_t)>& task) override {
    const std::int64_t workers = std::min<std::int64_t>(count, concurrency());
    if (workers <= 1) {
      for (std::int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    std::atomic<std::int64_t> next = 0;
    std::exception_ptr first;
    std::mutex mutex;
    const auto work = [&](std::int64_t, std::int64_t) {
      for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        try {
          task(i);
        } catch (...) {  // an exception that leaves parallel_for loses its message
          const std::lock_guard lock(mutex);
          if (!first) first = std::current_exception();
        }
      }
    };
    torch::stable::parallel_for(0, workers, 1, work);
    if (first) std::rethrow_exception(first);
  }
};

// The OpenMP runtime under torch's pool does not survive fork: a child that enters it after the parent did hangs.
// A forked child therefore computes on the library's own pool, which is remade there, with torch's thread count.
std::atomic<bool> forked = false;

Executor* executor() {
  static TorchExecutor torch_executor;
  [[maybe_unused]] static const int registered =
      pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  if (!forked.load(std::memory_order_relaxed)) return &torch_executor;
  if (const int threads = torch_executor.concurrency(); threads != num_threads()) set_num_threads(threads);
  return nullptr;
}

// Workspace of small calls: one block of each thread is kept, so that a call does not pay for a trip of a large block
// through malloc, which hands such blocks back to the system. Larger requests, and nested ones, are served directly.
class ScratchAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes, Device, void*) override {
    if (bytes > kKept || scratch.used) return ::operator new(bytes, kAlignment, std::nothrow);
    if (scratch.block == nullptr) scratch.block.reset(::operator new(kKept, kAlignment, std::nothrow));
    scratch.used = scratch.block != nullptr;
    return scratch.block.get();
  }
  void deallocate(void* block, std::size_t, Device, void*) override {
    if (block == scratch.block.get()) {
      scratch.used = false;
    } else {
      ::operator delete(block, kAlignment);
    }
  }

 private:
  static constexpr std::size_t kKept = std::size_t{1} << 20;
  static constexpr std::align_val_t kAlignment{256};  // promised by Allocator

  struct Free {
    void operator()(void* block) const { ::operator delete(block, kAlignment); }
  };
  struct Scratch {
    std::unique_ptr<void, Free> block;
    bool used = false;
  };
  static thread_local Scratch scratch;
};

thread_local ScratchAllocator::Scratch ScratchAllocator::scratch;

// Entry points that only a CUDA build of torch has, looked up in the libtorch_cuda that torch has loaded.
struct CudaEntryPoints {
  AOTITorchError (*current_stream)(std::int32_t device, void** stream) = nullptr;
  AOTITorchError (*allocate)(std::uint64_t bytes, void** block) = nullptr;
  AOTITorchError (*deallocate)(void* block) = nullptr;
};

template <class Function>
void look_up(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(library != nullptr ? dlsym(library, name) : nullptr);
  if (function == nullptr) {
    throw Error(ErrorCode::kUnsupported,
                std::string("torch binding: device: got cuda; need a CUDA build of torch 2.10 or newer (no ") + name +
                    " in libtorch_cuda)");
  }
}

const CudaEntryPoints& cuda_entry_points() {
  static const CudaEntryPoints entry_points = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    CudaEntryPoints found;
    look_up(library, "aoti_torch_get_current_cuda_stream", found.current_stream);
    look_up(library, "aoti_torch_cuda_caching_allocator_raw_alloc", found.allocate);
    look_up(library, "aoti_torch_cuda_caching_allocator_raw_delete", found.deallocate);
    return found;
  }();
  return entry_points;
}

// Blocks of torch's caching allocator belong to the current stream of the current device, which is the call's.
class TorchCudaAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes, Device, void*) override {
    void* block = nullptr;
    return cuda_entry_points().allocate(bytes, &block) == TORCH_SUCCESS ? block : nullptr;
  }
  void deallocate(void* block, std::size_t, Device, void*) override { cuda_entry_points().deallocate(block); }
};

}  // namespace

CallContext::CallContext(Device device) {
  if (device.type == DeviceType::kCpu) {
    static ScratchAllocator scratch_allocator;
    context_.executor = executor();
    context_.allocator = &scratch_allocator;
    return;
  }
  static TorchCudaAllocator allocator;
  guard_.emplace(device.index);
  TORCH_ERROR_CODE_CHECK(cuda_entry_points().current_stream(device.index, &context_.stream));
  context_.allocator = &allocator;
}

void rethrow_for_torch(const Error& error) {
  const auto kind = [&] {
    switch (error.code()) {
      case ErrorCode::kInvalidArgument: return "ValueError";
      case ErrorCode::kInvalidType: return "TypeError";
      case ErrorCode::kUnsupported: return "NotImplementedError";
      case ErrorCode::kOutOfMemory: return "OutOfMemoryError";
      case ErrorCode::kDevice:
      case ErrorCode::kInternal: break;
    }
    return "RuntimeError";
  };
  throw std::runtime_error(std::string(kind()) + ": " + error.what());
}

}  // namespace onepass::binding
