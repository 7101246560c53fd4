// What every instruction set shares: the arguments of a layer, the plan that divides it among
// threads, scratch memory, and the barrier. Everything that does arithmetic is in the .inc files,
// which isa.h includes once per instruction set.
//
// Sizes: T steps, N rows in all, B rows at the widest step, D directions, I inputs, H hidden units,
// P size of h (H unless projected), G gates, S slots (see src/fastrnn/cells.py).
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastrnn {

constexpr int kMaxStates = 4;
constexpr int kMaxDirections = 2;

// Which rows belong to which step. Rows are in time-major order; a packed batch is sorted by
// length, so that row r of a step is always sequence r.
struct Rows {
  int64_t T = 0;
  int64_t B = 0;
  int64_t N = 0;
  std::vector<int64_t> offsets;  // [T + 1] first row of each step; empty if dense
  std::vector<int64_t> lengths;  // [B] steps of each sequence; empty if dense

  // batch_sizes [T] int64, or null for a dense batch of N / B steps. Throws std::invalid_argument.
  Rows(int64_t N, int64_t B, const int64_t* batch_sizes, int64_t T);

  int64_t offset(int64_t t) const { return offsets.empty() ? t * B : offsets[t]; }
  int64_t size(int64_t t) const { return offsets.empty() ? B : offsets[t + 1] - offsets[t]; }
  int64_t length(int64_t r) const { return lengths.empty() ? T : lengths[r]; }
};

// One direction's weights, row-major, and null where there are none.
template <class T>
struct Weights {
  const T* ih = nullptr;       // [G*H, I]
  const T* hh = nullptr;       // [G*H, P]
  const T* bias_ih = nullptr;  // [G*H]
  const T* bias_hh = nullptr;  // [G*H]
  const T* hr = nullptr;       // [P, H]
};

template <class T>
struct Layer {
  const Rows* rows = nullptr;
  int64_t I = 0, H = 0, P = 0;
  int D = 1;
  int threads = 1;
  bool deterministic = false;  // the same sums, whatever else the cores have to do, and however
                               // few rows there are
  Weights<T> weights[kMaxDirections];
  const T* state[kMaxStates] = {};  // h [D, B, P], others [D, B, H]; null is zero

  bool projected() const { return weights[0].hr != nullptr; }
};

template <class T>
struct Forward : Layer<T> {
  const T* x = nullptr;       // [N, I]
  T* out = nullptr;           // [N, D*P]
  T* final[kMaxStates] = {};  // as state
  T* saved = nullptr;         // [D, N, kept, H]: v, s[1:], m if projected; null: keep nothing
};

template <class T>
struct WeightGradients {
  T *ih = nullptr, *hh = nullptr, *bias_ih = nullptr, *bias_hh = nullptr, *hr = nullptr;
};

template <class T>
struct Backward : Layer<T> {
  const T* x = nullptr;              // [N, I]
  const T* out = nullptr;            // [N, D*P]
  const T* saved = nullptr;          // [D, N, kept, H]
  const T* dout = nullptr;           // [N, D*P]; null is zero
  const T* dfinal[kMaxStates] = {};  // as state; null is zero
  // The gradients, each like what it is the gradient of; null where it is not wanted.
  T* dx = nullptr;
  WeightGradients<T> dweights[kMaxDirections];
  T* dstate[kMaxStates] = {};
};

// What the drivers and the argument checks must know of a cell.
struct CellInfo {
  const char* mode;
  int gates, shared, states, saved;
  bool projectable;

  constexpr int slots() const { return 2 * gates - shared; }
  constexpr int kept(bool projected) const { return saved + states - 1 + (projected ? 1 : 0); }
};

// The engine compiled for one instruction set.
struct Engine {
  const char* name;
  bool (*runs_here)();
  int cells;
  const CellInfo* cell;  // [cells]
  void (*forward_f32)(int cell, const Forward<float>&);
  void (*forward_f64)(int cell, const Forward<double>&);
  void (*backward_f32)(int cell, const Backward<float>&);
  void (*backward_f64)(int cell, const Backward<double>&);

  void forward(int c, const Forward<float>& a) const { forward_f32(c, a); }
  void forward(int c, const Forward<double>& a) const { forward_f64(c, a); }
  void backward(int c, const Backward<float>& a) const { backward_f32(c, a); }
  void backward(int c, const Backward<double>& a) const { backward_f64(c, a); }
};

// How many of the threads that may be used are worth waking for so much arithmetic; if
// `deterministic`, whatever else the cores have to do.
int threads_for(double flops, int threads, bool deterministic);

// A part of a layer that one thread runs from the first step to the last.
struct Task {
  int thread = 0;
  int direction = 0;
  int64_t row0 = 0, row1 = 0;  // sequences
};

// How a layer is divided. `rows`: each thread takes whole sequences of one direction or both, and
// nobody waits for anybody. `units`: all threads share every step, each with its own hidden units,
// and meet at a barrier; for batches too small to give every thread a sequence, or to hide the time
// in which weights beyond one core's cache arrive.
struct Plan {
  bool units = false;
  int threads = 1;
  std::vector<Task> tasks;
  int64_t most_rows = 0;  // of any task

  // flops of one row at one step, and bytes of the weights that such a row reads.
  Plan(const Rows& rows, int D, int threads, bool may_split_units, bool deterministic, double flops,
       double bytes);
};

// Memory that is kept from call to call, so that a warm call maps no pages: mapping a fresh buffer
// of tens of MB costs as much as the arithmetic that fills it. Aligned and advised for huge pages.
// With `poison` it is filled with NaN, so that a read of something never written shows in the
// results.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }
  size_t size() const { return size_; }
  static void poison(bool on);
  // Gives back what is kept and not in use.
  static void release();

 private:
  void* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

// Hands out aligned parts of one block: first add up, then take.
class Carver {
 public:
  explicit Carver(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 127) / 128 * 128;
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Where threads meet. Spins for a bounded time and then gives its core away, because a partner that
// the scheduler has put aside may be gone for milliseconds.
class Barrier {
 public:
  void wait(int team);
  // What all threads together lost in waits that only a scheduler explains.
  std::chrono::nanoseconds lost() const { return std::chrono::nanoseconds(lost_.load()); }

 private:
  void wait_long(int phase);

  alignas(128) std::atomic<int> arrived_{0};
  alignas(128) std::atomic<int> phase_{0};
  std::atomic<int64_t> lost_{0};
};

// Calls job(context, thread, team, barrier) on `threads` threads of the OpenMP pool, or on fewer,
// or on more, of which those beyond have no work: a job must be right for any team size, and must
// not throw. Where waiting for each other costs the threads more than sharing saves, other programs
// want the cores, and for a while threads_for and Plan hold back.
using Job = void (*)(void* context, int thread, int team, Barrier& barrier);
void parallel(int threads, Job job, void* context);

// Runs job.thread(thread, team, barrier) on such a team, with memory laid out by job.carve_shared
// and, for each thread, by job.carve_local; job.thread_base and job.thread_bytes say where the
// latter is.
template <class J>
void run_job(J& job, int threads) {
  constexpr size_t page = 4096;
  Carver shared, local;
  job.carve_shared(shared);
  job.carve_local(local);
  const size_t start = (shared.used() + page - 1) / page * page;
  // Not a multiple of a page: equal offsets in all threads' parts would fight for the same sets.
  job.thread_bytes = (local.used() + page - 1) / page * page + 128;
  Scratch scratch(start + job.thread_bytes * static_cast<size_t>(threads));
  Carver there(scratch.data());
  job.carve_shared(there);
  job.thread_base = static_cast<char*>(scratch.data()) + start;
  parallel(
      threads,
      [](void* context, int thread, int team, Barrier& barrier) {
        static_cast<J*>(context)->thread(thread, team, barrier);
      },
      &job);
}

// Name of the threading library that was compiled in, or null.
const char* threading();

// Obey torch.set_num_threads even if torch has an OpenMP runtime of its own.
int set_threads(int threads);

// The engines this build has, best first.
const std::vector<const Engine*>& engines();

}  // namespace fastrnn
