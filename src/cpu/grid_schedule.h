// cpu/grid_schedule.h: tasks with a fixed order where it matters. Sums that several tasks add to are reproducible bit
// for bit when every addend has its place in the order; everything else runs as threads become free.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "onepass/execution.h"

namespace onepass::cpu {

// rows × columns cells. A cell runs after its left and upper neighbours, so that the cells of a row, and those of a
// column, run in ascending order; anti-diagonals run in parallel. `after`: index of an earlier grid of the same size,
// each of whose cells runs before the same cell of this one; −1: none.
struct Grid {
  std::int64_t rows = 1;
  std::int64_t columns = 1;
  std::int64_t after = -1;
};

struct Cell {
  std::int64_t grid, row, column;
};

// Runs every cell of every grid once on up to `workers` threads; a worker calls task(cell, worker) with its own number.
void run_grids(const std::vector<Grid>& grids, std::int64_t workers, Executor& executor,
               const std::function<void(const Cell& cell, std::int64_t worker)>& task);

}  // namespace onepass::cpu
