#include "report.h"

#include <iomanip>
#include <sstream>

#include "device.h"

namespace onepass::bench {
namespace {

// The fields of one JSON object, in order.
class Object {
 public:
  Object& number(const char* name, double value) {
    begin(name) << std::setprecision(6) << value;
    return *this;
  }
  Object& integer(const char* name, std::int64_t value) {
    begin(name) << value;
    return *this;
  }
  Object& optional(const char* name, bool given, std::int64_t value) {
    return given ? integer(name, value) : literal(name, "null");
  }
  Object& boolean(const char* name, bool value) { return literal(name, value ? "true" : "false"); }
  Object& literal(const char* name, const char* value) {
    begin(name) << value;
    return *this;
  }
  Object& text(const char* name, const std::string& value) {
    std::ostringstream& out = begin(name);
    out << '"';
    for (char c : value) {
      if (c == '"' || c == '\\') out << '\\';
      if (static_cast<unsigned char>(c) >= ' ') out << c;
    }
    out << '"';
    return *this;
  }
  Object& timing(const std::string& name, const Timing& timing) {
    number(name.c_str(), timing.median);
    begin((name + "_quartiles").c_str()) << '[' << timing.low << ',' << timing.high << ']';
    return *this;
  }
  std::string str() const { return '{' + out_.str() + '}'; }

 private:
  std::ostringstream& begin(const char* name) {
    if (out_.tellp() > 0) out_ << ',';
    out_ << '"' << name << "\":";
    return out_;
  }

  std::ostringstream out_;
};

const char* name_of(ScaleGranularity scale) {
  switch (scale) {
    case ScaleGranularity::kTensor: return "tensor";
    case ScaleGranularity::kToken: return "token";
    case ScaleGranularity::kHead: return "head";
    case ScaleGranularity::kGroup: return "group";
    case ScaleGranularity::kNone: break;
  }
  return "none";
}

}  // namespace

std::string line(const Case& c, const Settings& settings, const Outcome& outcome) {
  Object object;
  object.integer("onepass_bench", 1)
      .text("version", version())
      .text("machine", machine_name(settings.device))
      .text("device", settings.device.type == DeviceType::kCpu ? "cpu" : "cuda")
      .text("backend", settings.backend.empty() ? "first" : settings.backend)
      .integer("threads", num_threads())
      .text("kind", bench::name_of(c.kind))
      .integer("batch", c.batch)
      .integer("num_heads", c.num_heads)
      .integer("num_heads_kv", c.num_heads_kv)
      .integer("seqlen_q", c.seqlen_q)
      .integer("seqlen_k", c.seqlen_k)
      .integer("head_dim", c.head_dim)
      .text("dtype", type_name(c.dtype))
      .text("query_dtype", type_name(c.query_dtype))
      .text("scale", name_of(c.scale))
      .optional("scale_group", c.scale == ScaleGranularity::kGroup, c.scale_group)
      .boolean("causal", c.causal)
      .optional("window", c.window.has_value(), c.window.value_or(0))
      .boolean("alibi", c.alibi)
      .optional("page_size", c.page_size != 0, c.page_size)
      .integer("num_splits", c.num_splits)
      .integer("prefill_fraction", c.prefill_fraction)
      .integer("rounds", settings.iterations)
      .timing("ms", outcome.whole)
      .number("gflops", c.flops() / outcome.whole.median * 1e-6)
      .number("kv_bytes", c.kv_bytes())
      .number("gbps", c.kv_bytes() / outcome.whole.median * 1e-6);
  if (outcome.apart) {
    object.timing("apart_ms", *outcome.apart);
  } else {
    object.literal("apart_ms", "null").literal("apart_ms_quartiles", "null");
  }
  if (outcome.error) {
    object.number("error", *outcome.error).number("tolerance", outcome.tolerance);
    object.text("check", outcome.accepted() ? "passed" : "failed");
  }
  return object.str();
}

}  // namespace onepass::bench
