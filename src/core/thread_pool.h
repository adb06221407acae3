// core/thread_pool.h: the library's own executor, used when the context brings none.
#pragma once

#include <memory>

#include "onepass/execution.h"

namespace onepass {

// A fixed set of workers. One `run` at a time uses them; a `run` that finds them busy, or that is called from a task,
// runs its tasks on the calling thread, so nesting and concurrent callers are safe and nothing is shared between them.
class ThreadPool final : public Executor {
 public:
  explicit ThreadPool(int num_threads);  // ≥ 1, the calling thread included
  ~ThreadPool() override;

  int concurrency() const override;
  void run(std::int64_t count, const std::function<void(std::int64_t)>& task) override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The process-wide pool, made on first use. A forked child starts with a fresh one: the parent's threads do not exist
// there.
Executor& default_executor();

}  // namespace onepass
