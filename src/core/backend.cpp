#include "core/backend.h"

#include <cstdlib>
#include <cstring>

#include "onepass/error.h"

namespace onepass {
namespace {

// The one backend that the caller or the environment insists on; null: any.
const char* insisted_backend(const ExecutionContext& context) {
  if (context.backend != nullptr) return context.backend;
  const char* name = std::getenv("ONEPASS_BACKEND");
  return name == nullptr || *name == '\0' ? nullptr : name;
}

// Runs `problem` on the first backend of its device that has the operation, is present and supports it.
template <class P, class Supports, class Run>
void dispatch(const P& problem, const char* operation, Device device, DType dtype, const ExecutionContext& context,
              Supports Backend::*supports, Run Backend::*run) {
  const char* const insisted = insisted_backend(context);
  std::string reasons;
  for (const Backend* backend : backends()) {
    if (backend->device != device.type) continue;
    if (insisted != nullptr && std::strcmp(insisted, backend->name) != 0) continue;
    Unsupported reason;
    if (backend->*run == nullptr) {
      reason = "lacks the operation";
    } else if (backend == &kReferenceBackend && insisted == nullptr && dtype != DType::kFloat64) {
      reason = "serves float64 only unless chosen by name";
    } else if (reason = backend->available(); !reason) {
      reason = (backend->*supports)(problem);
    }
    if (!reason) return (backend->*run)(problem, context);
    reasons += std::string(reasons.empty() ? "" : "; ") + backend->name + ": " + *reason;
  }
  if (reasons.empty())
    reasons = insisted != nullptr ? std::string(insisted) + ": no such backend for the device" : "none";
  throw Error(ErrorCode::kUnsupported, std::string(operation) + ": no backend for this call (" + reasons + ")");
}

}  // namespace

const std::vector<const Backend*>& backends() {
  static const std::vector<const Backend*> list{&kHopperBackend, &kCudaBackend, &kCpuBackend, &kReferenceBackend};
  return list;
}

void run_forward(const Problem& problem, const ExecutionContext& context) {
  dispatch(problem, problem.operation, problem.device, problem.dtype, context, &Backend::supports_forward,
           &Backend::forward);
}

void run_backward(const BackwardProblem& problem, const ExecutionContext& context) {
  const Problem& forward = problem.forward;
  dispatch(problem, forward.operation, forward.device, forward.dtype, context, &Backend::supports_backward,
           &Backend::backward);
}

void run_merge(const MergeProblem& problem, const ExecutionContext& context) {
  dispatch(problem, "merge_states", problem.device, problem.dtype, context, &Backend::supports_merge, &Backend::merge);
}

}  // namespace onepass
