// core/parallel.h: how backends get threads and workspace from the execution context.
#pragma once

#include <cstddef>
#include <functional>

#include "onepass/execution.h"

namespace onepass {

// The context's executor, or the library's thread pool.
Executor& executor_of(const ExecutionContext& context);

// The stream-ordered allocator of the CUDA backend; throws Error(kUnsupported) in a build without CUDA.
Allocator& cuda_allocator();

// A block from the context's allocator (or the default one of the device), freed with the object.
// Throws Error(kOutOfMemory) naming the bytes asked for.
class Workspace {
 public:
  Workspace(const ExecutionContext& context, Device device, std::size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(block_);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  const ExecutionContext& context_;
  Device device_;
  std::size_t bytes_;
  void* block_;
};

}  // namespace onepass
