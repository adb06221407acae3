// reference/backend.cpp: the oracle's table. It takes everything that validation lets through.
#include "core/backend.h"
#include "reference/reference.h"

namespace onepass {
namespace {

Unsupported available() { return std::nullopt; }
std::string describe() { return "float64 inside, every option, not fast"; }
template <class P>
Unsupported supports(const P&) {
  return std::nullopt;
}

}  // namespace

const Backend kReferenceBackend{
    .name = "reference",
    .device = DeviceType::kCpu,
    .available = available,
    .describe = describe,
    .supports_forward = supports<Problem>,
    .forward = reference::forward,
    .supports_backward = supports<BackwardProblem>,
    .backward = reference::backward,
    .supports_piecewise = supports<PiecewiseProblem>,
    .piecewise = reference::piecewise,
    .supports_piecewise_backward = supports<PiecewiseBackwardProblem>,
    .piecewise_backward = reference::piecewise_backward,
    .supports_total_attention = supports<Problem>,
    .total_attention = reference::total_attention,
    .supports_merge = supports<MergeProblem>,
    .merge = reference::merge,
    .supports_append = supports<AppendProblem>,
    .append = reference::append,
    .supports_cached = supports<CachedProblem>,
    .cached = reference::cached,
};

}  // namespace onepass
