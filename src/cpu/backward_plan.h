// cpu/backward_plan.h: how a backward pass is cut into tasks, and the memory that they share.
#pragma once

#include <cstdint>
#include <vector>

#include "core/piecewise.h"
#include "cpu/backward_task.h"
#include "cpu/grid_schedule.h"

namespace onepass::cpu {

// All query heads of one key head of one sequence: they add to the same dK and dV.
struct BackwardUnit {
  std::int64_t batch = 0, head_kv = 0;
  Sequence sequence;
  // Offsets, in floats, of the unit's sums in the shared workspace (split plans only); dk and dq of each part.
  std::int64_t dk[kMaxParts] = {}, dv = 0, dq[kMaxParts] = {};
};

// A unit is one task when there are enough of them. Otherwise it is cut into a grid, rows of (head, chunk of queries)
// and columns of chunks of keys, whose cells run in the order that keeps every sum's addends in sequence: neither the
// cut nor the number of threads shows in the result. The parts of piecewise attention take turns within a cell: of all
// queries that a key meets the near ones come first, so dV too is added up in the order of the queries.
class BackwardPlan {
 public:
  BackwardPlan(const BackwardProblem& problem, std::int64_t parts, int concurrency);

  const std::vector<BackwardUnit>& units() const { return units_; }
  std::vector<Grid> grids() const;
  std::int64_t workers() const { return workers_; }

  // Floats: sums that all workers share, and those that one worker needs for itself.
  std::int64_t shared_floats() const { return shared_floats_; }
  std::int64_t worker_floats() const;

  // Calls run(task) for the tasks of one cell, in order. `shared` holds shared_floats(), `own` worker_floats().
  template <class Run>
  void for_each_task(const Cell& cell, float* shared, float* own, const Run& run) const {
    const BackwardUnit& unit = units_[cell.grid];
    for (std::int64_t i = 0; i < heads_of_cell(); ++i) {
      for (std::int64_t part = 0; part < parts_; ++part) {
        run(split_ ? cell_task(unit, cell, i, part, shared) : head_task(unit, i, part, own));
      }
    }
  }

 private:
  // Heads of a group that one cell takes one after the other, and that the rows of a grid are for.
  std::int64_t heads_of_cell() const { return split_ && !all_heads_ ? 1 : problem_.forward.group_size(); }
  std::int64_t heads_of_grid() const { return all_heads_ ? 1 : problem_.forward.group_size(); }
  std::int64_t query_chunks(const BackwardUnit& unit) const;
  std::int64_t key_chunks(const BackwardUnit& unit) const;
  void choose_split(int concurrency);
  void place_sums();
  BackwardTask head_task(const BackwardUnit& unit, std::int64_t head_in_group, std::int64_t part, float* own) const;
  BackwardTask cell_task(const BackwardUnit& unit, const Cell& cell, std::int64_t head_in_cell, std::int64_t part,
                         float* shared) const;

  const BackwardProblem& problem_;
  std::int64_t parts_;
  std::vector<BackwardUnit> units_;
  std::int64_t workers_ = 1;
  bool split_ = false, all_heads_ = false;
  std::int64_t query_chunk_ = 0, key_chunk_ = 0;
  std::int64_t shared_floats_ = 0;
};

}  // namespace onepass::cpu
