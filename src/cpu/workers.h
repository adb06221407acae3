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

// What a set of tasks needs.
struct TaskSet {
  std::int64_t count = 0;
  double flops = 0.0;  // of all
  std::size_t scratch_bytes = 0;
};

// The threads of a set of tasks, with their memory, which is taken at once.
class Workers {
 public:
  Workers(const ExecutionContext& context, const TaskSet& tasks)
      : executor_(executor_of(context)),
        count_(tasks.count),
        workers_(tasks.flops < kSerialFlops ? std::min<std::int64_t>(1, count_)
                                            : std::min<std::int64_t>(count_, std::max(1, executor_.concurrency()))),
        slot_((tasks.scratch_bytes + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment),
        memory_(context, Device{}, slot_ * static_cast<std::size_t>(workers_)) {}

  // Calls task(index, scratch) for every index in [0, count), in that order as threads become free: sort the heaviest
  // first. A worker has `scratch_bytes` of its own, so a task's result cannot depend on the number of threads.
  // Not a plain loop over Executor::run because executors may hand out indices in fixed chunks.
  template <class Task>
  void run(const Task& task) const {
    std::atomic<std::int64_t> next{0};
    const auto worker = [&](std::int64_t index) {
      const FlushDenormals guard;
      std::byte* const scratch = memory_.as<std::byte>() + slot_ * static_cast<std::size_t>(index);
      for (std::int64_t i = next++; i < count_; i = next++) task(i, scratch);
    };
    if (workers_ == 1) return worker(0);
    if (workers_ > 1) executor_.run(workers_, worker);
  }

 private:
  Executor& executor_;
  std::int64_t count_, workers_;
  std::size_t slot_;
  Workspace memory_;
};

template <class Task>
void run_tasks(const ExecutionContext& context, std::int64_t count, double flops, std::size_t scratch_bytes,
               const Task& task) {
  if (count > 0) Workers(context, {count, flops, scratch_bytes}).run(task);
}

}  // namespace onepass::cpu
