// onepass: exact, IO-aware attention. Include this; link onepass::onepass.
#pragma once

#include <string>

#include "onepass/attention.h"
#include "onepass/error.h"
#include "onepass/execution.h"
#include "onepass/export.h"
#include "onepass/kv_cache.h"
#include "onepass/piecewise.h"
#include "onepass/tensor.h"

namespace onepass {

ONEPASS_API const char* version();

// Human-readable lines: version, backends with the reason when one is absent, instruction set or GPU, build flags.
ONEPASS_API std::string info();

}  // namespace onepass
