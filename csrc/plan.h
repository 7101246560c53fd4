// How a layer is divided among threads.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace fastrnn {

// The number of threads, at most `threads`, that are worth waking for `flops` of arithmetic. If
// `deterministic`, it does not depend on the load of the cores.
int threads_for(double flops, int threads, bool deterministic);

// What a thread does at a step.
struct StepWork {
  double flops = 0;      // for one row
  double bytes = 0;      // of the weights that it reads, whatever the number of rows
  double shared = 0;     // bytes of one row that the other threads need, if they share it
  double rate = 1;       // flops per second of one core at its peak
  int64_t panels = 1;    // into which the hidden units can be divided
  bool sharable = true;  // whether threads may share them
};

// A part of a layer that a group of threads runs from the first step to the last.
struct Task {
  int group = 0;
  int direction = 0;
  int64_t row0 = 0, row1 = 0;  // sequences
};

// Threads form groups of equal size. Each group has whole sequences, of one direction or both. In a
// group of several threads, each has its own hidden units at every step, and they wait for each
// other at a barrier: for batches too small to give every thread a sequence, or to hide the time in
// which the weights arrive.
struct Plan {
  int threads = 1;  // that have work
  int sharing = 1;  // threads of a group
  std::vector<Task> tasks;
  int64_t max_rows = 0;  // of any task

  Plan(const Rows& rows, int D, int max_threads, bool deterministic, const StepWork& work);

  int groups() const { return threads / sharing; }

 private:
  void cut_sequences(const Rows& rows, int D);
};

}  // namespace fastrnn
