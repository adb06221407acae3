// onepass/execution.h: what a call may use but does not own: stream, workspace memory and threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "onepass/export.h"
#include "onepass/tensor.h"

namespace onepass {

// Runs tasks in parallel. The default is a small thread pool of the library (one per process, made on first use,
// remade in a forked child); the torch binding passes torch's own intra-op pool.
class ONEPASS_API Executor {
 public:
  virtual ~Executor() = default;

  // Threads that may run tasks at once (≥ 1).
  virtual int concurrency() const = 0;

  // Calls task(index) for every index in [0, count), each exactly once, on any thread, and returns when all are done.
  // The first exception that a task throws is rethrown here, after the others have ended.
  virtual void run(std::int64_t count, const std::function<void(std::int64_t index)>& task) = 0;
};

// Workspace memory. Blocks are aligned to at least 256 bytes. On CUDA the block is used on `stream` only.
class ONEPASS_API Allocator {
 public:
  virtual ~Allocator() = default;
  virtual void* allocate(std::size_t bytes, Device device, void* stream) = 0;  // null: out of memory
  virtual void deallocate(void* block, std::size_t bytes, Device device, void* stream) = 0;
};

struct ExecutionContext {
  void* stream = nullptr;          // cudaStream_t of the tensors' device; ignored on the CPU
  Executor* executor = nullptr;    // null: the library's thread pool
  Allocator* allocator = nullptr;  // null: aligned operator new on the CPU, cudaMallocAsync on CUDA
  const char* backend = nullptr;   // "hopper", "cuda", "cpu" or "reference": use no other; null: the first that can
};

// Threads of the library's own pool: the count asked for, or that of the hardware. Takes effect at the next call.
ONEPASS_API void set_num_threads(int count);
ONEPASS_API int num_threads();

}  // namespace onepass
