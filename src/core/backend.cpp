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

// What a problem says of itself: the operation's name, the device and the element type.
struct Request {
  const char* operation;
  Device device;
  DType dtype;
};
Request request_of(const Problem& problem) { return {problem.operation, problem.device, problem.dtype}; }
Request request_of(const BackwardProblem& problem) { return request_of(problem.forward); }
Request request_of(const PiecewiseProblem& problem) { return request_of(problem.near); }
Request request_of(const PiecewiseBackwardProblem& problem) { return request_of(problem.near); }
Request request_of(const MergeProblem& problem) { return {"merge_states", problem.device, problem.dtype}; }
Request request_of(const AppendProblem& problem) { return {problem.operation, problem.device, problem.dtype}; }
Request request_of(const CachedProblem& problem) { return request_of(problem.attention); }

template <class P>
using Operation = void (*)(const P&, const ExecutionContext&);

// The operation of the first backend of the problem's device that has it, is present and supports the problem.
template <class P>
Operation<P> choose(const P& problem, const ExecutionContext& context, Unsupported (*Backend::*supports)(const P&),
                    Operation<P> Backend::*run) {
  const Request request = request_of(problem);
  const char* const insisted = insisted_backend(context);
  std::string reasons;
  for (const Backend* backend : backends()) {
    if (backend->device != request.device.type) continue;
    if (insisted != nullptr && std::strcmp(insisted, backend->name) != 0) continue;
    Unsupported reason;
    if (backend->*run == nullptr) {
      reason = "lacks the operation";
    } else if (backend == &kReferenceBackend && insisted == nullptr && request.dtype != DType::kFloat64) {
      reason = "serves float64 only unless chosen by name";
    } else if (reason = backend->available(); !reason) {
      reason = (backend->*supports)(problem);
    }
    if (!reason) return backend->*run;
    reasons += std::string(reasons.empty() ? "" : "; ") + backend->name + ": " + *reason;
  }
  if (reasons.empty())
    reasons = insisted != nullptr ? std::string(insisted) + ": no such backend for the device" : "none";
  throw Error(ErrorCode::kUnsupported, std::string(request.operation) + ": no backend for this call (" + reasons + ")");
}

template <class P>
void dispatch(const P& problem, const ExecutionContext& context, Unsupported (*Backend::*supports)(const P&),
              Operation<P> Backend::*run) {
  choose(problem, context, supports, run)(problem, context);
}

}  // namespace

const std::vector<const Backend*>& backends() {
  static const std::vector<const Backend*> list{&kHopperBackend, &kCudaBackend, &kCpuBackend, &kReferenceBackend};
  return list;
}

void run_forward(const Problem& problem, const ExecutionContext& context) {
  dispatch(problem, context, &Backend::supports_forward, &Backend::forward);
}

void run_backward(const BackwardProblem& problem, const ExecutionContext& context) {
  dispatch(problem, context, &Backend::supports_backward, &Backend::backward);
}

void run_piecewise(const PiecewiseProblem& problem, const ExecutionContext& context) {
  dispatch(problem, context, &Backend::supports_piecewise, &Backend::piecewise);
}

void run_piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context) {
  dispatch(problem, context, &Backend::supports_piecewise_backward, &Backend::piecewise_backward);
}

void run_total_attention(const Problem& problem, const ExecutionContext& context) {
  dispatch(problem, context, &Backend::supports_total_attention, &Backend::total_attention);
}

void run_merge(const MergeProblem& problem, const ExecutionContext& context) {
  dispatch(problem, context, &Backend::supports_merge, &Backend::merge);
}

void run_append(const AppendProblem& problem, const ExecutionContext& context) {
  dispatch(problem, context, &Backend::supports_append, &Backend::append);
}

void run_cached(const AppendProblem* append, const CachedProblem& problem, const ExecutionContext& context) {
  const auto attend = choose(problem, context, &Backend::supports_cached, &Backend::cached);
  if (append == nullptr) return attend(problem, context);
  if (problem.attention.device.type != DeviceType::kCpu || !append->advance) {
    dispatch(*append, context, &Backend::supports_append, &Backend::append);
    return attend(problem, context);
  }
  // The lengths grow last: when memory is short in between, the cache is what it was.
  AppendProblem stored = *append;
  stored.advance = false;
  CachedProblem with_stored = problem;
  with_stored.pending = append->tokens;
  dispatch(stored, context, &Backend::supports_append, &Backend::append);
  attend(with_stored, context);
  for (std::int64_t b = 0; b < append->cache.batch; ++b) {
    append->cache.seqlens[b] += static_cast<std::int32_t>(append->tokens.count(b));
  }
}

}  // namespace onepass
