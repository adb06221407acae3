#include "measure.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>

#include "device.h"

namespace onepass::bench {
namespace {

constexpr double kTurn = 0.5;  // milliseconds

double quantile(const std::vector<double>& sorted, double q) {
  const double position = q * static_cast<double>(sorted.size() - 1);
  const auto index = static_cast<std::size_t>(position);
  const std::size_t next = std::min(index + 1, sorted.size() - 1);
  return sorted[index] + (position - static_cast<double>(index)) * (sorted[next] - sorted[index]);
}

}  // namespace

std::vector<Timing> interleave(const std::vector<std::function<void()>>& calls, Device device, int warmup,
                               int iterations) {
  std::vector<int> repeats;
  for (const auto& call : calls) {
    double last = 0.0;
    for (int i = 0; i < std::max(1, warmup); ++i) last = milliseconds(device, 1, call);
    repeats.push_back(static_cast<int>(std::clamp(std::ceil(kTurn / std::max(last, 1e-3)), 1.0, 500.0)));
  }
  std::vector<std::vector<double>> samples(calls.size());
  for (int i = 0; i < iterations; ++i) {
    for (std::size_t turn = 0; turn < calls.size(); ++turn) {
      const std::size_t c = i % 2 == 0 ? turn : calls.size() - 1 - turn;
      samples[c].push_back(milliseconds(device, repeats[c], calls[c]) / repeats[c]);
    }
  }
  std::vector<Timing> timings;
  for (std::vector<double>& times : samples) {
    std::sort(times.begin(), times.end());
    timings.push_back({quantile(times, 0.5), quantile(times, 0.25), quantile(times, 0.75)});
  }
  return timings;
}

double host_milliseconds(int repeats, const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; ++i) call();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

std::shared_ptr<std::byte[]> allocate_host(std::size_t bytes) {
  constexpr std::align_val_t kAlignment{64};
  return {new (kAlignment) std::byte[bytes], [](std::byte* p) { ::operator delete[](p, kAlignment); }};
}

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "a CPU";
}

}  // namespace onepass::bench
