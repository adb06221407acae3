#include "cpu/grid_schedule.h"

#include <condition_variable>
#include <deque>
#include <mutex>

namespace onepass::cpu {
namespace {

class Schedule {
 public:
  explicit Schedule(const std::vector<Grid>& grids) : grids_(grids), followers_(grids.size(), -1) {
    std::int64_t cells = 0;
    for (std::size_t g = 0; g < grids.size(); ++g) {
      first_.push_back(cells);
      cells += grids[g].rows * grids[g].columns;
      if (grids[g].after >= 0) followers_[grids[g].after] = static_cast<std::int64_t>(g);
    }
    unfinished_ = cells;
    missing_.reserve(cells);
    for (std::size_t g = 0; g < grids.size(); ++g) {
      for (std::int64_t row = 0; row < grids[g].rows; ++row) {
        for (std::int64_t column = 0; column < grids[g].columns; ++column) {
          const int missing = (row > 0) + (column > 0) + (grids[g].after >= 0);
          missing_.push_back(missing);
          if (missing == 0) ready_.push_back({static_cast<std::int64_t>(g), row, column});
        }
      }
    }
  }

  // The next cell, or false when all have been handed out and no more can come. Waits only while another worker runs a
  // cell, so any number of workers, one included, gets to the end.
  bool take(Cell& cell) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !ready_.empty() || unfinished_ == 0 || failed_; });
    if (unfinished_ == 0 || failed_) return false;
    cell = ready_.front();
    ready_.pop_front();
    return true;
  }

  void finish(const Cell& cell) {
    const Grid& grid = grids_[cell.grid];
    const std::scoped_lock lock(mutex_);
    --unfinished_;
    if (cell.row + 1 < grid.rows) release({cell.grid, cell.row + 1, cell.column});
    if (cell.column + 1 < grid.columns) release({cell.grid, cell.row, cell.column + 1});
    if (followers_[cell.grid] >= 0) release({followers_[cell.grid], cell.row, cell.column});
    changed_.notify_all();
  }

  // Lets the others leave instead of waiting for cells that will never become ready.
  void fail() {
    const std::scoped_lock lock(mutex_);
    failed_ = true;
    changed_.notify_all();
  }

 private:
  void release(const Cell& cell) {
    int& missing = missing_[first_[cell.grid] + cell.row * grids_[cell.grid].columns + cell.column];
    if (--missing == 0) ready_.push_back(cell);
  }

  const std::vector<Grid>& grids_;
  std::vector<std::int64_t> first_, followers_;
  std::vector<int> missing_;  // neighbours that have not finished
  std::deque<Cell> ready_;
  std::int64_t unfinished_ = 0;
  bool failed_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace

void run_grids(const std::vector<Grid>& grids, std::int64_t workers, Executor& executor,
               const std::function<void(const Cell& cell, std::int64_t worker)>& task) {
  Schedule schedule(grids);
  const auto work = [&](std::int64_t worker) {
    try {
      for (Cell cell; schedule.take(cell); schedule.finish(cell)) task(cell, worker);
    } catch (...) {
      schedule.fail();
      throw;
    }
  };
  if (workers == 1) return work(0);
  executor.run(workers, work);
}

}  // namespace onepass::cpu
