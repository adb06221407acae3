#include "cases.h"

#include <algorithm>

namespace onepass::bench {
namespace {

// Visible pairs of one head of one sequence.
double visible_pairs(const Case& c, std::int64_t queries) {
  double pairs = 0.0;
  for (std::int64_t i = 0; i < queries; ++i) {
    std::int64_t visible = c.causal ? i + 1 + c.seqlen_k - queries : c.seqlen_k;
    if (c.window) visible = std::min(visible, *c.window);
    pairs += static_cast<double>(visible);
  }
  return pairs;
}

}  // namespace

const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kPrefill: return "prefill";
    case Kind::kDecode: return "decode";
    case Kind::kHybrid: return "hybrid";
  }
  return "";
}

double scale_bytes(const Case& c) {
  switch (c.scale) {
    case ScaleGranularity::kHead: return 8.0;
    case ScaleGranularity::kToken: return 8.0 / static_cast<double>(c.num_heads_kv);
    case ScaleGranularity::kGroup: return 8.0 * static_cast<double>(c.head_dim / c.scale_group);
    case ScaleGranularity::kNone:
    case ScaleGranularity::kTensor: return 0.0;
  }
  return 0.0;
}

double Case::kv_bytes() const {
  const double per_head = 2.0 * static_cast<double>(head_dim * size_of(dtype)) + scale_bytes(*this);
  return static_cast<double>(batch * num_heads_kv * seqlen_k) * per_head;
}

double Case::flops() const {
  const double pairs = static_cast<double>(prefills()) * visible_pairs(*this, seqlen_q) +
                       static_cast<double>(decodes()) * visible_pairs(*this, 1);
  return 4.0 * static_cast<double>(num_heads * head_dim) * pairs;
}

}  // namespace onepass::bench
