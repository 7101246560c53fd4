// How a layer is divided among threads.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace fastrnn {

// The number of threads, at most `threads`, that are worth waking for `flops` of arithmetic. If
// `deterministic`, it does not depend on the load of the cores.
int threads_for(double flops, int threads, bool deterministic);

// A part of a layer that one thread runs from the first step to the last.
struct Task {
  int thread = 0;
  int direction = 0;
  int64_t row0 = 0, row1 = 0;  // sequences
};

// Without `units`, each thread takes whole sequences of one direction or both, with no
// synchronisation between threads. With `units`, all threads share every step, each with its own
// hidden units, and wait for each other at a barrier: for batches too small to give every thread a
// sequence, or to hide the time in which weights larger than one core's cache arrive.
struct Plan {
  bool units = false;
  int threads = 1;
  std::vector<Task> tasks;
  int64_t max_rows = 0;  // of any task

  // flops of one row at one step, and bytes of the weights that such a row reads.
  Plan(const Rows& rows, int D, int max_threads, bool may_split_units, bool deterministic,
       double flops, double bytes);

 private:
  bool worth_splitting_units(int64_t B, int D, bool deterministic, double flops,
                             double bytes) const;
  void cut_sequences(const Rows& rows, int D);
};

}  // namespace fastrnn
