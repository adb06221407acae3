// What a C++ program with an installed onepass does: attention with its own executor, an error caught.
#include <onepass/onepass.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

struct InlineExecutor final : onepass::Executor {
  int concurrency() const override { return 1; }
  void run(std::int64_t count, const std::function<void(std::int64_t)>& task) override {
    for (std::int64_t index = 0; index < count; ++index) task(index);
  }
};

}  // namespace

int main() {
  constexpr std::int64_t kBatch = 2, kHeads = 4, kTokens = 50, kDim = 32;
  std::vector<float> q(kBatch * kHeads * kTokens * kDim, 0.1f), k = q, v(q.size(), 1.0f), out(q.size());
  std::vector<float> lse(kBatch * kHeads * kTokens);
  const auto view = [](std::vector<float>& values) {
    return onepass::TensorView(values.data(), onepass::DType::kFloat32, {kBatch, kHeads, kTokens, kDim});
  };
  const onepass::TensorView lse_view(lse.data(), onepass::DType::kFloat32, {kBatch, kHeads, kTokens});
  InlineExecutor executor;
  onepass::attention(view(q), view(k), view(v), {.out = view(out), .lse = lse_view}, {.causal = true},
                     {.executor = &executor});
  for (float x : out) {
    if (std::abs(x - 1.0f) > 1e-5f) return std::puts("out of equal values differs from them"), 1;
  }
  try {
    onepass::attention(view(q), view(k), view(v), {.out = view(q)});
    return std::puts("overlapping output accepted"), 1;
  } catch (const onepass::Error& error) {
    if (std::strstr(error.what(), "attention: out: got memory that overlaps q") == nullptr) {
      return std::puts(error.what()), 1;
    }
  }
  std::printf("%s", onepass::info().c_str());
  return 0;
}
