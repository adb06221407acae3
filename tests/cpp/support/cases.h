// support/cases.h: the table of named cases, and the backends that can run them.
#pragma once

#include <string>
#include <vector>

#include "support/case.h"

namespace onepass::test {

// Every option alone, and those that meet in one kernel together.
const std::vector<Case>& feature_cases();
// Plain attention, causal and not, at sizes around the edges of tiles, and every kind of head dim.
const std::vector<Case>& shape_cases();
// Piecewise attention with every option, and thresholds and sizes around the edges of tiles.
const std::vector<Case>& piecewise_cases();
const std::vector<Case>& piecewise_shape_cases();

// Several heads, tiles and options at once: for suites that are not about attention itself.
inline const Case kBusy{.num_heads = 6,
                        .num_heads_kv = 3,
                        .seqlen_q = 100,
                        .seqlen_k = 140,
                        .causal = true,
                        .bias = "hk",
                        .sinks = true,
                        .dropout = 0.1};

// One backend and one dtype; the parameter of most suites.
struct Target {
  std::string backend;
  DType dtype;
  ExecutionContext context() const { return {.backend = backend.c_str()}; }
  Device device() const;
};
std::string name_of_target(const Target& target);  // "cpu_float16"
void PrintTo(const Target& target, std::ostream* stream);

// Backends that are present, each with float32, float16 and bfloat16. The reference is one of them: what it rounds to
// halves is tested as any other's.
std::vector<Target> targets();

// Whether the backend has the case's forward and backward pass at all.
bool has_forward(const Target& target, const Case& definition = {});
bool has_backward(const Target& target, const Case& definition = {});
bool has_total_attention(const Target& target);
bool has_merge(const Target& target);
bool has_cached(const Target& target);  // and append

}  // namespace onepass::test
