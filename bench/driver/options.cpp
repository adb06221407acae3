#include "options.h"

#include <CLI/CLI.hpp>
#include <map>

namespace onepass::bench {
namespace {

const std::vector<std::string> kFloats = {"float32", "bfloat16", "float16"};
const std::vector<std::string> kStorage = {"float32", "bfloat16", "float16", "int8", "fp8_e4m3", "fp8_e5m2"};

DType type_of(const std::string& name) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kInt8, DType::kFloat8E4M3, DType::kFloat8E5M2}) {
    if (name == type_name(dtype)) return dtype;
  }
  return DType::kFloat32;
}

[[noreturn]] void refuse(const std::string& option, const std::string& received, const std::string& required) {
  throw Error(ErrorCode::kInvalidArgument, "onepass-bench: " + option + ": got " + received + "; need " + required);
}

// What the options say, before they are multiplied out into cases.
struct Values {
  std::vector<std::int64_t> batches{1}, seqlens{1024, 2048, 4096}, fractions;
  std::vector<std::string> types{"float32"};
  std::int64_t heads = 8, heads_kv = 0, head_dim = 64, queries = 0, window = 0, page_size = 0, splits = 0;
  std::string query_type = "bfloat16", scale = "head", device = "cpu";
  bool full = false, alibi = false;
  double rotate = -1.0;
};

void add_shape(CLI::App& command, Values& values) {
  const CLI::Range at_least_one(std::int64_t{1}, std::int64_t{1} << 31);
  command.add_option("--batch", values.batches, "sequences; a case for each")->check(at_least_one);
  command.add_option("--seqlens", values.seqlens, "keys of a sequence; a case for each")->check(at_least_one);
  command.add_option("--heads", values.heads, "query heads")->check(at_least_one)->capture_default_str();
  command.add_option("--kv-heads", values.heads_kv, "key/value heads (default: as many)")->check(at_least_one);
  command.add_option("--head-dim", values.head_dim, "channels of a head")->check(at_least_one)->capture_default_str();
  command.add_flag(
      "--causal,!--full", [&values](std::int64_t count) { values.full = count < 0; },
      "causal mask (the default), or none");
  command.add_option("--window", values.window, "keys that a query sees, itself counted")->check(at_least_one);
  command.add_flag("--alibi", values.alibi, "linear biases");
}

void add_cache(CLI::App& command, Values& values) {
  command.add_option("--kv-type", values.types, "storage; a case for each")
      ->check(CLI::IsMember(kStorage))
      ->capture_default_str();
  command.add_option("--query-type", values.query_type, "queries over int8 and fp8")
      ->check(CLI::IsMember(kFloats))
      ->capture_default_str();
  command.add_option("--scale", values.scale, "what shares a scale of int8: tensor, token, head or group:N")
      ->capture_default_str();
  command.add_option("--page-size", values.page_size, "tokens of a page (default: a contiguous cache)")
      ->check(CLI::PositiveNumber);
  command.add_option("--splits", values.splits, "parts that keys are split into; 0: chosen for speed")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      .add_option("--rotate", values.rotate,
                  "MiB that copies of the cache fill, so that it comes from memory (default: 512, on a GPU 256)")
      ->check(CLI::NonNegativeNumber);
}

void add_settings(CLI::App& command, Settings& settings, Values& values) {
  command.add_option("--device", values.device, "cpu, cuda or cuda:N")->capture_default_str();
  command.add_option("--backend", settings.backend, "hopper, cuda, cpu or reference (default: the first that can)");
  command.add_option("--threads", settings.threads, "threads (default: those of the hardware)")
      ->check(CLI::PositiveNumber);
  command.add_option("--warmup", settings.warmup, "calls before the first that counts")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--iterations", settings.iterations, "calls that count")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_flag("--check", settings.check, "compare with the reference backend, which is slow; exit 1 if wrong");
}

Device device_of(const std::string& text) {
  if (text == "cpu") return {};
  Device device{DeviceType::kCuda, 0};
  if (text == "cuda") return device;
  const std::string number = text.rfind("cuda:", 0) == 0 ? text.substr(5) : "";
  if (number.empty() || number.size() > 3 || number.find_first_not_of("0123456789") != std::string::npos) {
    refuse("--device", text, "cpu, cuda or cuda:N");
  }
  device.index = std::stoi(number);
  return device;
}

void set_scale(Case& c, const std::string& text) {
  if (c.dtype != DType::kInt8) return;
  static const std::map<std::string, ScaleGranularity> kNames = {
      {"tensor", ScaleGranularity::kTensor}, {"token", ScaleGranularity::kToken}, {"head", ScaleGranularity::kHead}};
  if (const auto found = kNames.find(text); found != kNames.end()) {
    c.scale = found->second;
    return;
  }
  const std::string number = text.rfind("group:", 0) == 0 ? text.substr(6) : "";
  if (number.empty() || number.size() > 4 || number.find_first_not_of("0123456789") != std::string::npos ||
      std::stoll(number) == 0 || c.head_dim % std::stoll(number) != 0) {
    refuse("--scale", text, "tensor, token, head or group:N with a divisor of " + std::to_string(c.head_dim));
  }
  c.scale = ScaleGranularity::kGroup;
  c.scale_group = std::stoll(number);
}

std::int64_t queries_of(Kind kind, const Values& values, std::int64_t seqlen) {
  if (values.queries != 0) return values.queries;
  return kind == Kind::kPrefill ? seqlen : kind == Kind::kDecode ? 1 : std::min<std::int64_t>(256, seqlen);
}

std::vector<Case> cases_of(Kind kind, const Values& values) {
  std::vector<Case> cases;
  Case base;
  base.kind = kind;
  base.num_heads = values.heads;
  base.num_heads_kv = values.heads_kv == 0 ? values.heads : values.heads_kv;
  base.head_dim = values.head_dim;
  base.causal = !values.full;
  base.alibi = values.alibi;
  base.page_size = values.page_size;
  base.num_splits = values.splits;
  if (values.window != 0) base.window = values.window;
  if (base.num_heads % base.num_heads_kv != 0) {
    refuse("--heads", std::to_string(base.num_heads),
           "a multiple of the " + std::to_string(base.num_heads_kv) + " of --kv-heads");
  }
  const std::vector<std::int64_t> all{100};
  for (const std::string& type : values.types) {
    const DType dtype = type_of(type);
    for (std::int64_t fraction : values.fractions.empty() ? all : values.fractions) {
      for (std::int64_t batch : values.batches) {
        for (std::int64_t seqlen : values.seqlens) {
          Case c = base;
          c.dtype = dtype;
          c.query_dtype = size_of(dtype) == 1 ? type_of(values.query_type) : dtype;
          c.batch = batch;
          c.seqlen_k = seqlen;
          c.seqlen_q = queries_of(kind, values, seqlen);
          c.prefill_fraction = fraction;
          set_scale(c, values.scale);
          if (c.seqlen_q > c.seqlen_k) {
            refuse("--queries", std::to_string(c.seqlen_q), "at most the " + std::to_string(c.seqlen_k) + " keys");
          }
          cases.push_back(c);
        }
      }
    }
  }
  return cases;
}

}  // namespace

const char* type_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat8E4M3: return "fp8_e4m3";
    case DType::kFloat8E5M2: return "fp8_e5m2";
    default: return name_of(dtype);
  }
}

Command parse(int argc, char** argv) {
  CLI::App app("Times onepass without torch: one line of JSON a case; `onepass bench plot` draws them.",
               "onepass-bench");
  app.require_subcommand(1);
  Values values;
  Command command;
  const auto subcommand = [&](const char* name, const char* text) {
    CLI::App* added = app.add_subcommand(name, text);
    add_shape(*added, values);
    add_settings(*added, command.settings, values);
    return added;
  };
  CLI::App* prefill = subcommand("prefill", "attention of dense tensors");
  prefill->add_option("--type", values.types, "of the tensors; a case for each")
      ->check(CLI::IsMember(kFloats))
      ->capture_default_str();
  CLI::App* decode = subcommand("decode", "a step over a KV cache");
  CLI::App* hybrid = subcommand("hybrid", "a step that mixes prefill and decode: in one call, and apart");
  for (CLI::App* cached : {decode, hybrid}) add_cache(*cached, values);
  hybrid->add_option("--prefill-fraction", values.fractions, "percent of the sequences that prefill (default 50)")
      ->check(CLI::Range(std::int64_t{0}, std::int64_t{100}));
  const CLI::Range at_least_one(std::int64_t{1}, std::int64_t{1} << 31);
  prefill->add_option("--queries", values.queries, "the last ones (default: all)")->check(at_least_one);
  decode->add_option("--queries", values.queries, "of each sequence (default 1)")->check(at_least_one);
  hybrid->add_option("--queries", values.queries, "of a sequence that prefills (default 256)")->check(at_least_one);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::exit(app.exit(error));
  }
  const Kind kind = prefill->parsed() ? Kind::kPrefill : decode->parsed() ? Kind::kDecode : Kind::kHybrid;
  if (kind == Kind::kHybrid && values.fractions.empty()) values.fractions = {50};
  command.settings.device = device_of(values.device);
  if (values.rotate >= 0.0) {
    command.settings.rotate = values.rotate * 1048576.0;
  } else if (kind != Kind::kPrefill) {
    command.settings.rotate = (command.settings.device.type == DeviceType::kCpu ? 512 : 256) * 1048576.0;
  }
  command.cases = cases_of(kind, values);
  return command;
}

}  // namespace onepass::bench
