#include "core/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <map>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace onepass {
namespace {

// One parallel region. Workers take indices from `next` until none is left.
struct Job {
  Job(std::int64_t count_, const std::function<void(std::int64_t)>& task_) : count(count_), task(task_) {}

  const std::int64_t count;
  const std::function<void(std::int64_t)>& task;
  std::atomic<std::int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void work() {
    for (std::int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      try {
        task(i);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  }
};

void run_serially(std::int64_t count, const std::function<void(std::int64_t)>& task) {
  Job job(count, task);
  job.work();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace

struct ThreadPool::State {
  std::vector<std::thread> workers;
  std::mutex region;  // held by the caller whose job the workers run
  std::mutex mutex;
  std::condition_variable wake, done;
  Job* job = nullptr;
  std::uint64_t generation = 0;  // of `job`: tells a sleeping worker that there is a new one
  int active = 0;                // workers inside `job`
  bool stop = false;

  void worker() {
    std::uint64_t seen = 0;
    std::unique_lock lock(mutex);
    for (;;) {
      wake.wait(lock, [&] { return stop || (job != nullptr && generation != seen); });
      if (stop) return;
      seen = generation;
      Job* const mine = job;
      ++active;
      lock.unlock();
      mine->work();
      lock.lock();
      if (--active == 0) done.notify_one();
    }
  }
};

ThreadPool::ThreadPool(int num_threads) : state_(std::make_unique<State>()) {
  state_->workers.reserve(std::max(0, num_threads - 1));
  try {
    for (int i = 1; i < num_threads; ++i) state_->workers.emplace_back([this] { state_->worker(); });
  } catch (const std::system_error&) {
    // The system gives no more threads: those made so far do the work.
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->wake.notify_all();
  for (std::thread& worker : state_->workers) worker.join();
}

int ThreadPool::concurrency() const { return static_cast<int>(state_->workers.size()) + 1; }

void ThreadPool::run(std::int64_t count, const std::function<void(std::int64_t)>& task) {
  // A nested call from a task runs on the thread that holds `region`, where try_lock would be undefined: the flag
  // below comes first.
  static thread_local bool inside = false;
  if (count <= 1 || inside || state_->workers.empty()) return run_serially(count, task);
  const std::unique_lock region(state_->region, std::try_to_lock);
  if (!region.owns_lock()) return run_serially(count, task);

  const std::function<void(std::int64_t)> guarded = [&task](std::int64_t index) {
    struct Flag {
      Flag() { inside = true; }
      ~Flag() { inside = false; }
    } flag;
    task(index);
  };
  Job job(count, guarded);
  {
    const std::lock_guard lock(state_->mutex);
    state_->job = &job;
    ++state_->generation;
  }
  state_->wake.notify_all();
  job.work();
  {
    std::unique_lock lock(state_->mutex);
    state_->job = nullptr;  // no worker enters from here on
    state_->done.wait(lock, [&] { return state_->active == 0; });
  }
  if (job.error) std::rethrow_exception(job.error);
}

namespace {

std::mutex pool_mutex;
std::atomic<int> wanted_threads{0};  // 0: of the hardware

// By thread count, so that switching back and forth makes no new threads, and none that another caller uses goes away.
// Leaked on purpose: joining threads in static destructors can deadlock at exit.
using Pools = std::map<int, ThreadPool*>;
Pools* pools = nullptr;

int hardware_threads() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

void after_fork_in_child() {
  new (&pool_mutex) std::mutex;  // whoever held it does not exist here
  pools = nullptr;
}

}  // namespace

Executor& default_executor() {
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
  static_cast<void>(registered);
  const std::lock_guard lock(pool_mutex);
  if (pools == nullptr) pools = new Pools;
  ThreadPool*& pool = (*pools)[num_threads()];
  if (pool == nullptr) pool = new ThreadPool(num_threads());
  return *pool;
}

void set_num_threads(int count) { wanted_threads.store(std::max(0, count)); }

int num_threads() {
  const int count = wanted_threads.load();
  return count > 0 ? count : hardware_threads();
}

}  // namespace onepass
