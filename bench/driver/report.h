// driver/report.h: one line of JSON for a case. Field names are those of `onepass bench`.
#pragma once

#include <optional>
#include <string>

#include "cases.h"
#include "measure.h"
#include "options.h"

namespace onepass::bench {

struct Outcome {
  Timing whole;
  std::optional<Timing> apart;  // of a hybrid case
  std::optional<double> error;  // relative to the reference, when checked
  double tolerance = 0.0;
  bool accepted() const { return !error || *error <= tolerance; }
};

// `{"onepass_bench":1,…}` without a line break.
std::string line(const Case& c, const Settings& settings, const Outcome& outcome);

}  // namespace onepass::bench
