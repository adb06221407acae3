// csrc/context.h: torch's threads, current CUDA stream and caching allocator as an ExecutionContext, and the kernels'
// exceptions as those that torch turns into Python's.
#pragma once

#include <optional>

#include <torch/csrc/stable/accelerator.h>

#include "onepass/error.h"
#include "onepass/execution.h"
#include "onepass/tensor.h"

namespace onepass::binding {

// What one call runs on: for CUDA tensors their device is current while this lives, and the previous one afterwards.
class CallContext {
 public:
  explicit CallContext(Device device);

  const ExecutionContext& get() const { return context_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  ExecutionContext context_;
};

// Throws `error` for torch, which makes a RuntimeError of whatever a kernel throws: the kind of Python exception stands
// in front of the message, and onepass/_library.py raises that kind.
[[noreturn]] void rethrow_for_torch(const Error& error);

// Runs a kernel's body.
template <class Body>
auto translate_errors(Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    rethrow_for_torch(error);
  }
}

}  // namespace onepass::binding
