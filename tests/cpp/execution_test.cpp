// Threads, executors and processes. Numbers in comments are rows of the reliability checklist.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "core/thread_pool.h"
#include "support/allocator.h"
#include "support/target_test.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

namespace onepass::test {
namespace {

TEST(ThreadPoolTest, RunsEveryIndexOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.concurrency(), threads);
    for (std::int64_t count : {0, 1, 2, 3, 100, 5000}) {
      std::vector<std::atomic<int>> calls(count);
      pool.run(count, [&](std::int64_t index) { ++calls[index]; });
      EXPECT_TRUE(std::all_of(calls.begin(), calls.end(), [](const auto& n) { return n == 1; })) << count;
    }
  }
}

TEST(ThreadPoolTest, UsesSeveralThreads) {
  ThreadPool pool(3);
  std::mutex mutex;
  std::map<std::thread::id, int> seen;
  std::atomic<int> inside{0};
  pool.run(3, [&](std::int64_t) {
    ++inside;
    while (inside < 3) std::this_thread::yield();  // returns only if three threads are in tasks at once
    const std::lock_guard lock(mutex);
    ++seen[std::this_thread::get_id()];
  });
  EXPECT_EQ(seen.size(), 3u);
}

TEST(ThreadPoolTest, NestedRunsFinish) {
  ThreadPool pool(4);
  std::atomic<int> count{0};
  pool.run(8, [&](std::int64_t) { pool.run(8, [&](std::int64_t) { pool.run(2, [&](std::int64_t) { ++count; }); }); });
  EXPECT_EQ(count, 128);
}

TEST(ThreadPoolTest, RethrowsAfterAllTasksEnded) {
  ThreadPool pool(4);
  std::atomic<int> ended{0};
  const auto task = [&](std::int64_t index) {
    ++ended;
    if (index % 10 == 3) throw std::runtime_error("task failed");
  };
  EXPECT_THROW(pool.run(200, task), std::runtime_error);
  EXPECT_EQ(ended, 200);
  pool.run(200, [&](std::int64_t) { ++ended; });  // and the pool still works
  EXPECT_EQ(ended, 400);
}

TEST(ThreadPoolTest, ManyCallersAtOnce) {  // 43
  ThreadPool pool(3);
  std::vector<std::thread> callers;
  std::vector<std::int64_t> sums(8, 0);
  for (std::size_t caller = 0; caller < sums.size(); ++caller) {
    callers.emplace_back([&, caller] {
      for (int round = 0; round < 200; ++round) {
        std::atomic<std::int64_t> sum{0};
        pool.run(50, [&](std::int64_t index) { sum += index; });
        sums[caller] += sum;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (std::int64_t sum : sums) EXPECT_EQ(sum, 200 * 50 * 49 / 2);
}

TEST(ThreadPoolTest, ThreadCountsCanAlternateWithoutNewThreads) {
  const auto threads_of_process = [] {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
      if (line.rfind("Threads:", 0) == 0) return std::stoi(line.substr(8));
    }
    return 0;
  };
  const auto alternate = [] {
    for (int count : {3, 2, 1, 4}) {
      set_num_threads(count);
      EXPECT_EQ(num_threads(), count);
      EXPECT_EQ(default_executor().concurrency(), count);
    }
  };
  alternate();
  const int before = threads_of_process();
  for (int i = 0; i < 20; ++i) alternate();
  EXPECT_EQ(threads_of_process(), before);
  set_num_threads(0);
  EXPECT_GE(num_threads(), 1);
}

class CountingExecutor final : public Executor {
 public:
  int concurrency() const override { return 2; }
  void run(std::int64_t count, const std::function<void(std::int64_t)>& task) override {
    if (throws) throw std::runtime_error("executor refused");
    ++runs;
    for (std::int64_t index = count - 1; index >= 0; --index) task(index);  // any order is allowed
  }
  int runs = 0;
  bool throws = false;
};

class Execution : public TargetTest {};
ONEPASS_FOR_EVERY_TARGET(Execution);

TEST_P(Execution, ResultsDoNotDependOnTheExecutor) {
  if (GetParam().device().type != DeviceType::kCpu) GTEST_SKIP() << "no threads on the host";
  Case piecewise = kBusy, split{.batch = 1, .num_heads = 2, .seqlen_q = 600, .seqlen_k = 600, .dist_threshold = 200};
  piecewise.dist_threshold = 60;
  // One dbias for all heads and sequences: with groups of one, with groups, and with a row for all queries.
  const Case shared{.num_heads = 2, .seqlen_q = 530, .seqlen_k = 600, .head_dim = 16, .causal = true, .bias = "qk"};
  Case grouped = shared, row = shared, of_piecewise = shared;
  grouped.num_heads = 4;
  row.bias = "k";
  of_piecewise.dist_threshold = 90;
  for (const Case& definition : {kBusy, piecewise, split, shared, grouped, row, of_piecewise}) {
    if (!has_forward(GetParam(), definition) || !has_backward(GetParam(), definition)) continue;
    const Instance made = instance(definition);
    Call call(made, dtype());
    const auto run_with = [&](Executor& executor) {
      ExecutionContext with = context();
      with.executor = &executor;
      call.forward(with);
      call.backward(with);
      return call.results();
    };
    ThreadPool one(1);
    const Results want = run_with(one);
    for (int threads : {2, 7}) {
      ThreadPool pool(threads);
      expect_identical(run_with(pool), want);
    }
    CountingExecutor counting;
    expect_identical(run_with(counting), want);
    EXPECT_GE(counting.runs, 1);
  }
}

TEST_P(Execution, WhatTheExecutorThrowsReachesTheCaller) {  // 47
  if (GetParam().device().type != DeviceType::kCpu) GTEST_SKIP() << "no threads on the host";
  const Instance made = instance(kBusy);
  StrictAllocator allocator;
  CountingExecutor executor;
  executor.throws = true;
  ExecutionContext with = context();
  with.executor = &executor;
  with.allocator = &allocator;
  EXPECT_THROW(run(made, dtype(), with), std::runtime_error);
  EXPECT_TRUE(allocator.balanced());
}

TEST_P(Execution, ConcurrentCallersGetTheirOwnResults) {  // 43
  std::vector<Instance> instances;
  for (std::uint64_t seed = 1; seed <= 4; ++seed) instances.push_back(instance(kBusy, seed));
  std::vector<Results> want, got(instances.size());
  for (const Instance& made : instances) want.push_back(run_here(made));
  std::vector<std::thread> callers;
  for (std::size_t i = 0; i < instances.size(); ++i) {
    callers.emplace_back([&, i] {
      for (int round = 0; round < 3; ++round) got[i] = run_here(instances[i]);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (std::size_t i = 0; i < instances.size(); ++i) {
    EXPECT_TRUE(identical(got[i].out, want[i].out));
    EXPECT_TRUE(close(got[i].dk, want[i].dk, 4 * epsilon_of(dtype())));
  }
}

TEST_P(Execution, WorksInAForkedChild) {  // 45
  if (GetParam().device().type != DeviceType::kCpu) GTEST_SKIP() << "CUDA does not survive fork";
  set_num_threads(3);
  const Instance made = instance(kBusy);
  const Results want = run_here(made);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);
    const Results got = run_here(made);
    _exit(identical(got.out, want.out) && got.dq.size() == want.dq.size() ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  EXPECT_TRUE(identical(run_here(made).out, want.out));  // and the parent still works
  set_num_threads(0);
}

TEST_P(Execution, ManyCallsKeepMemoryFlat) {  // 46
  if (kSanitized) GTEST_SKIP() << "the sanitizer's own memory grows; it finds leaks by itself";
  const auto resident_bytes = [] {
    std::ifstream statm("/proc/self/statm");
    std::int64_t size = 0, resident = 0;
    statm >> size >> resident;
    return resident * sysconf(_SC_PAGESIZE);
  };
  Instance made = instance({.batch = 1, .num_heads = 2, .seqlen_q = 2, .seqlen_k = 3, .head_dim = 8});
  Call call(made, dtype());
  const auto repeat = [&](int count) {
    for (int i = 0; i < count; ++i) {
      call.forward(context());
      call.backward(context());
    }
    synchronize(made.device);
  };
  repeat(1000);
  const std::int64_t before = resident_bytes();
  repeat(GetParam().backend == "reference" ? 3000 : 50'000);
  EXPECT_LT(resident_bytes() - before, 256 * 1024);
}

}  // namespace
}  // namespace onepass::test
