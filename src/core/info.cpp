#include <bit>
#include <cmath>
#include <string>

#include "core/backend.h"
#include "onepass/onepass.h"

namespace onepass {

const char* version() { return ONEPASS_VERSION; }

std::string info() {
  std::string text = std::string("onepass ") + version() + "\n";
  for (const Backend* backend : backends()) {
    const Unsupported absent = backend->available();
    text += std::string(backend->name) + ": " + (absent ? "absent: " + *absent : backend->describe()) + "\n";
  }
  text += "threads: " + std::to_string(num_threads()) + "\n";
  text += "build: C++ compiler " __VERSION__ ", " ONEPASS_BUILD_TYPE "\n";
  return text;
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return "float64";
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kInt8: return "int8";
    case DType::kFloat8E4M3: return "float8_e4m3";
    case DType::kFloat8E5M2: return "float8_e5m2";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
  }
  return "unknown dtype";
}

double alibi_slope(std::int64_t head, std::int64_t num_heads, bool geometric) {
  if (num_heads < 1) {
    throw Error(ErrorCode::kInvalidArgument,
                "alibi_slope: num_heads: got " + std::to_string(num_heads) + "; need at least 1");
  }
  if (head < 0 || head >= num_heads) {
    throw Error(ErrorCode::kInvalidArgument, "alibi_slope: head: got " + std::to_string(head) + "; need 0 to " +
                                                 std::to_string(num_heads - 1) + " (num_heads − 1)");
  }
  const auto nth = [](std::int64_t n, std::int64_t of) { return std::exp2(-8.0 * double(n) / double(of)); };
  if (geometric) return nth(head + 1, num_heads);
  // Other counts: the slopes of the next lower power of two, then every other one of twice as many heads.
  const auto power = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(num_heads)));
  return head < power ? nth(head + 1, power) : nth(2 * (head - power) + 1, 2 * power);
}

}  // namespace onepass
