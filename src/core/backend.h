// core/backend.h: what a backend offers, and the dispatcher's choice among them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/cache_problem.h"
#include "core/problem.h"
#include "onepass/execution.h"

namespace onepass {

// nullopt: supported. Otherwise one clause that says which option is not, e.g. "head_dim 300 (at most 256)".
using Unsupported = std::optional<std::string>;

// A backend is a table of functions; a null entry means that the backend lacks the operation.
struct Backend {
  const char* name = nullptr;
  DeviceType device = DeviceType::kCpu;
  // nullopt when present on this machine, else why not ("built without CUDA", "no NVIDIA driver", …).
  Unsupported (*available)() = nullptr;
  std::string (*describe)() = nullptr;  // instruction set, GPU, …, one line

  Unsupported (*supports_forward)(const Problem&) = nullptr;
  void (*forward)(const Problem&, const ExecutionContext&) = nullptr;
  Unsupported (*supports_backward)(const BackwardProblem&) = nullptr;
  void (*backward)(const BackwardProblem&, const ExecutionContext&) = nullptr;
  Unsupported (*supports_piecewise)(const PiecewiseProblem&) = nullptr;
  void (*piecewise)(const PiecewiseProblem&, const ExecutionContext&) = nullptr;
  Unsupported (*supports_piecewise_backward)(const PiecewiseBackwardProblem&) = nullptr;
  void (*piecewise_backward)(const PiecewiseBackwardProblem&, const ExecutionContext&) = nullptr;
  Unsupported (*supports_total_attention)(const Problem&) = nullptr;  // from a given lse
  void (*total_attention)(const Problem&, const ExecutionContext&) = nullptr;
  Unsupported (*supports_merge)(const MergeProblem&) = nullptr;
  void (*merge)(const MergeProblem&, const ExecutionContext&) = nullptr;
  Unsupported (*supports_append)(const AppendProblem&) = nullptr;
  void (*append)(const AppendProblem&, const ExecutionContext&) = nullptr;
  Unsupported (*supports_cached)(const CachedProblem&) = nullptr;
  void (*cached)(const CachedProblem&, const ExecutionContext&) = nullptr;
};

extern const Backend kReferenceBackend;  // src/reference
extern const Backend kCpuBackend;        // src/cpu
extern const Backend kHopperBackend;     // src/cuda, or src/cuda/unavailable.cpp in a build without CUDA
extern const Backend kCudaBackend;       // portable, sm_80+; likewise

// In order of preference.
const std::vector<const Backend*>& backends();

// Run the problem on the first backend that supports it; throws kUnsupported with every backend's reason.
// The context's `backend`, or else ONEPASS_BACKEND in the environment, restricts the choice. The reference backend
// serves float64 only, unless it is chosen by name: it is far too slow to be fallen back to in silence.
void run_forward(const Problem& problem, const ExecutionContext& context);
void run_backward(const BackwardProblem& problem, const ExecutionContext& context);
void run_piecewise(const PiecewiseProblem& problem, const ExecutionContext& context);
void run_piecewise_backward(const PiecewiseBackwardProblem& problem, const ExecutionContext& context);
void run_total_attention(const Problem& problem, const ExecutionContext& context);
void run_merge(const MergeProblem& problem, const ExecutionContext& context);
void run_append(const AppendProblem& problem, const ExecutionContext& context);
// `append`, when given, runs first; both have a backend before either writes.
void run_cached(const AppendProblem* append, const CachedProblem& problem, const ExecutionContext& context);

}  // namespace onepass
