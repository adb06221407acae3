// onepass-bench: see --help.
#include <cstdio>
#include <functional>

#include "device.h"
#include "measure.h"
#include "options.h"
#include "report.h"
#include "workload.h"

namespace onepass::bench {
namespace {

// Largest difference to the float64 reference, over the largest value: a few roundings of the output's type.
double tolerance(DType dtype) { return dtype == DType::kFloat32 ? 1e-5 : dtype == DType::kFloat16 ? 2e-3 : 1.6e-2; }

Outcome run(const Case& c, const Settings& settings) {
  ExecutionContext context;
  if (!settings.backend.empty()) context.backend = settings.backend.c_str();
  Workload workload(c, settings.device, settings.rotate);
  std::vector<std::function<void()>> calls{[&] { workload.run(context); }};
  if (workload.has_parts()) calls.push_back([&] { workload.run_apart(context); });
  const std::vector<Timing> timings = interleave(calls, settings.device, settings.warmup, settings.iterations);
  Outcome outcome{.whole = timings[0], .apart = {}, .error = {}, .tolerance = tolerance(c.query_dtype)};
  if (workload.has_parts()) outcome.apart = timings[1];
  if (settings.check) {
    workload.run(context);
    outcome.error = workload.error();
  }
  return outcome;
}

int run_all(const Command& command) {
  require_device(command.settings.device);
  set_num_threads(command.settings.threads);
  bool accepted = true;
  for (const Case& c : command.cases) {
    const Outcome outcome = run(c, command.settings);
    std::printf("%s\n", line(c, command.settings, outcome).c_str());
    std::fflush(stdout);
    accepted = accepted && outcome.accepted();
  }
  return accepted ? 0 : 1;
}

}  // namespace
}  // namespace onepass::bench

int main(int argc, char** argv) {
  try {
    return onepass::bench::run_all(onepass::bench::parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
