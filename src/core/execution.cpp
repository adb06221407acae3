#include <new>
#include <string>

#include "core/parallel.h"
#include "core/thread_pool.h"
#include "onepass/error.h"

namespace onepass {
namespace {

constexpr std::size_t kAlignment = 256;  // promised by Allocator

class CpuAllocator final : public Allocator {
 public:
  void* allocate(std::size_t bytes, Device, void*) override {
    return ::operator new (bytes, std::align_val_t{kAlignment}, std::nothrow);
  }
  void deallocate(void* block, std::size_t, Device, void*) override {
    ::operator delete (block, std::align_val_t{kAlignment});
  }
};

Allocator& allocator_of(const ExecutionContext& context, Device device) {
  static CpuAllocator cpu;
  if (context.allocator != nullptr) return *context.allocator;
  return device.type == DeviceType::kCuda ? cuda_allocator() : cpu;
}

}  // namespace

Executor& executor_of(const ExecutionContext& context) {
  return context.executor != nullptr ? *context.executor : default_executor();
}

Workspace::Workspace(const ExecutionContext& context, Device device, std::size_t bytes)
    : context_(context), device_(device), bytes_(bytes), block_(nullptr) {
  if (bytes == 0) return;
  block_ = allocator_of(context, device).allocate(bytes, device, context.stream);
  if (block_ == nullptr) {
    throw Error(ErrorCode::kOutOfMemory, "workspace: allocator: got null; need " + std::to_string(bytes) + " bytes");
  }
}

Workspace::~Workspace() {
  if (block_ != nullptr) allocator_of(context_, device_).deallocate(block_, bytes_, device_, context_.stream);
}

}  // namespace onepass
