// driver/options.h: the command line.
#pragma once

#include <string>
#include <vector>

#include "cases.h"

namespace onepass::bench {

struct Settings {
  Device device;
  std::string backend;  // empty: the first that can
  int threads = 0;      // 0: as many as the hardware has
  int warmup = 3, iterations = 10;
  bool check = false;
  double rotate = 0.0;  // bytes that copies of the keys and values fill
};

struct Command {
  Settings settings;
  std::vector<Case> cases;
};

// Prints and exits on --help and on what cannot be parsed; throws Error for combinations that make no sense.
Command parse(int argc, char** argv);

// "bfloat16", "int8", …
const char* type_name(DType dtype);

}  // namespace onepass::bench
