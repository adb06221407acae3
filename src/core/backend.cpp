#include "core/backend.h"

#include <cstdlib>
#include <cstring>

#include "onepass/error.h"

namespace onepass {
namespace {

bool chosen_by_environment(const Backend& backend) {
  const char* name = std::getenv("ONEPASS_BACKEND");
  return name == nullptr || *name == '\0' || std::strcmp(name, backend.name) == 0;
}

// Runs `problem` on the first backend of its device that has the operation, is present and supports it.
template <class P, class Supports, class Run>
void dispatch(const P& problem, const Problem& forward, const ExecutionContext& context, Supports Backend::*supports,
              Run Backend::*run) {
  std::string reasons;
  for (const Backend* backend : backends()) {
    if (backend->device != forward.device.type || !chosen_by_environment(*backend)) continue;
    Unsupported reason;
    if (backend->*run == nullptr) {
      reason = "lacks the operation";
    } else if (reason = backend->available(); !reason) {
      reason = (backend->*supports)(problem);
    }
    if (!reason) return (backend->*run)(problem, context);
    reasons += std::string(reasons.empty() ? "" : "; ") + backend->name + ": " + *reason;
  }
  throw Error(ErrorCode::kUnsupported, std::string(forward.operation) + ": no backend for this call (" +
                                           (reasons.empty() ? "none for the device" : reasons) + ")");
}

}  // namespace

const std::vector<const Backend*>& backends() {
  static const std::vector<const Backend*> list{&kHopperBackend, &kCudaBackend, &kCpuBackend, &kReferenceBackend};
  return list;
}

void run_forward(const Problem& problem, const ExecutionContext& context) {
  dispatch(problem, problem, context, &Backend::supports_forward, &Backend::forward);
}

void run_backward(const BackwardProblem& problem, const ExecutionContext& context) {
  dispatch(problem, problem.forward, context, &Backend::supports_backward, &Backend::backward);
}

}  // namespace onepass
