// Running a job on several threads: the barrier at which they wait for each other, the team, and
// the team's memory.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "scratch.h"

namespace fastrnn {

// Spins for a bounded time and then gives its core away, because a thread that was descheduled
// may not run for milliseconds. In a large team the threads of a branch meet first, and the last of
// them goes on, since a counter is passed from core to core.
class Barrier {
 public:
  // Waits until `count` threads have arrived, with the indices 0 to count - 1.
  void wait(int thread, int count);
  // The total over all threads of waits so long that only a scheduler explains them.
  std::chrono::nanoseconds lost() const { return std::chrono::nanoseconds(lost_.load()); }

 private:
  static constexpr int kBranches = 16, kFewThreads = 8;

  struct alignas(128) Counter {
    std::atomic<int> arrived{0};

    bool last(int count);
  };

  void wait_long(int phase);

  Counter root_, branches_[kBranches];
  alignas(128) std::atomic<int> phase_{0};
  std::atomic<int64_t> lost_{0};
};

// While it lives, subnormal numbers are zero in this thread, as operands and as results. A
// processor takes some hundred cycles for one that is not, and gradients that fade consist of them.
class SubnormalsAreZero {
 public:
  SubnormalsAreZero();
  ~SubnormalsAreZero();
  SubnormalsAreZero(const SubnormalsAreZero&) = delete;
  SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

 private:
  const uint64_t before_;  // the control register
};

// Calls job(context, thread, team, barriers) on `threads` threads of the OpenMP pool, in which
// subnormal numbers are zero meanwhile. The team may be smaller, or larger, with no work for the
// threads beyond: a job must be right for any team size, and must not throw. The first barrier is
// for the team, and one more for each of `groups` groups of threads. Updates the contention
// budget, on which threads_for and Plan depend.
using Job = void (*)(void* context, int thread, int team, Barrier* barriers);
void parallel(int threads, int groups, Job job, void* context);

// The memory of each thread of a job.
struct ThreadMemory {
  char* base = nullptr;
  size_t bytes = 0;  // of one thread

  BumpAllocator of(int thread) const { return BumpAllocator(base + bytes * thread); }
};

// Runs job.thread(thread, team, barriers) on such a team. job.layout_shared lays out the memory
// that all threads use, and job.layout_local that of one thread, which is then
// job.memory.of(thread).
template <class J>
void run_job(J& job, int threads, int groups = 0) {
  constexpr size_t page = 4096;
  BumpAllocator shared, local;
  job.layout_shared(shared);
  job.layout_local(local);
  const size_t start = (shared.used() + page - 1) / page * page;
  // Not a multiple of a page: equal offsets in all threads' parts would compete for the same sets.
  job.memory.bytes = (local.used() + page - 1) / page * page + 128;
  Scratch scratch(start + job.memory.bytes * static_cast<size_t>(threads));
  BumpAllocator placed(scratch.data());
  job.layout_shared(placed);
  job.memory.base = static_cast<char*>(scratch.data()) + start;
  parallel(
      threads, groups,
      [](void* context, int thread, int team, Barrier* barriers) {
        static_cast<J*>(context)->thread(thread, team, barriers);
      },
      &job);
}

// The seconds of a barrier of two threads where the cores are near each other.
constexpr double kBarrierSeconds = 5e-8;

// The seconds of a barrier now. A host may move its guests' cores away from each other, and a cache
// line then takes five times as long from one to the other, so it is measured now and then.
double barrier_seconds(int threads);

// Whether this process is a forked child, in which the pool's threads no longer exist.
bool in_forked_child();

// The name of the threading library that was compiled in, or null.
const char* threading();

// Applies torch.set_num_threads even if torch has an OpenMP runtime of its own. Returns the number
// of threads that may be used.
int set_threads(int threads);

}  // namespace fastrnn
