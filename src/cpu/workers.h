// cpu/workers.h: tasks over threads, each thread with its own scratch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/parallel.h"
#include "cpu/arena.h"
#include "cpu/flush_denormals.h"

namespace onepass::cpu {

// Below this much arithmetic (about 30 µs of one core) waking threads costs more than they give.
inline constexpr double kSerialFlops = 3e6;

// Calls task(index, scratch) for every index in [0, count), in that order as threads become free: sort the heaviest
// first. A worker has `scratch_bytes` of its own, so a task's result cannot depend on the number of threads.
// Not a plain loop over Executor::run because executors may hand out indices in fixed chunks.
template <class Task>
void run_tasks(const ExecutionContext& context, std::int64_t count, double flops, std::size_t scratch_bytes,
               const Task& task) {
  if (count <= 0) return;
  const std::size_t slot = (scratch_bytes + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
  Executor& executor = executor_of(context);
  const std::int64_t workers =
      flops < kSerialFlops ? 1 : std::min<std::int64_t>(count, std::max(1, executor.concurrency()));
  const Workspace workspace(context, Device{}, slot * static_cast<std::size_t>(workers));
  std::atomic<std::int64_t> next{0};
  const auto worker = [&](std::int64_t index) {
    const FlushDenormals guard;
    std::byte* const scratch = workspace.as<std::byte>() + slot * static_cast<std::size_t>(index);
    for (std::int64_t i = next++; i < count; i = next++) task(i, scratch);
  };
  if (workers == 1) return worker(0);
  executor.run(workers, worker);
}

}  // namespace onepass::cpu
