#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#define FASTRNN_POSIX 1
#endif
#ifdef __linux__
#include <sched.h>
#define FASTRNN_LINUX 1
#endif

#include "isa.h"

namespace fastrnn {

Rows::Rows(int64_t N_, int64_t B_, const int64_t* batch_sizes, int64_t T_) : B(B_), N(N_) {
  if (N < 0 || B < 0) {
    throw std::invalid_argument("expected N >= 0 and B >= 0, got N=" + std::to_string(N) +
                                ", B=" + std::to_string(B));
  }
  if (!batch_sizes) {
    T = B ? N / B : 0;
    if (T * B != N) {
      throw std::invalid_argument("expected N to be a multiple of B, got N=" + std::to_string(N) +
                                  ", B=" + std::to_string(B));
    }
    return;
  }
  T = T_;
  // Before B decides how much memory to take.
  if (T > 0 && (batch_sizes[0] != B || B > N)) {
    throw std::invalid_argument("expected batch_sizes that start with B=" + std::to_string(B) +
                                " and add up to N=" + std::to_string(N) + ", got " +
                                std::to_string(batch_sizes[0]) + " at step 0");
  }
  if (T == 0 && (B != 0 || N != 0)) {
    throw std::invalid_argument("expected batch_sizes of at least one step, got none");
  }
  offsets.resize(T + 1);
  lengths.assign(B, 0);
  int64_t before = B, sum = 0;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t n = batch_sizes[t];
    if (n <= 0 || n > before || n > N - sum) {
      throw std::invalid_argument(
          "expected batch_sizes that never increase, stay above 0 and add up to N=" +
          std::to_string(N) + ", got " + std::to_string(n) + " at step " + std::to_string(t));
    }
    offsets[t] = sum;
    sum += n;
    for (int64_t r = n; r < before; ++r) lengths[r] = t;
    before = n;
  }
  offsets[T] = sum;
  for (int64_t r = 0; r < before; ++r) lengths[r] = T;
  if (sum != N) {
    throw std::invalid_argument("expected batch_sizes that add up to N=" + std::to_string(N) +
                                ", got " + std::to_string(sum));
  }
}

namespace {

// Below this much arithmetic, waking the pool costs more than a second thread saves.
constexpr double kSerialFlops = 5e5;
// Flops per second of one thread in the small steps for which a barrier is a matter of doubt.
constexpr double kStepRate = 1e11;
// Seconds of a barrier where the cores are near each other. A step that saves so many times as much
// is worth sharing, since every thread then waits for the others' h too; one that saves so very
// many times as much, whatever a barrier costs.
constexpr double kBarrierSeconds = 5e-8;
constexpr double kWorth = 3;
constexpr double kWorthAnything = 60;
constexpr double kFirstCache = 32 << 10;
// What one core keeps to itself; weights beyond it come over a shared path again at every step.
constexpr double kCoreCache = 1 << 20;
// So many rows per thread hide the time their weights take to arrive.
constexpr int64_t kRowsThatHideWeights = 8;

using Clock = std::chrono::steady_clock;

// Some microseconds; a step that is worth sharing takes about as long.
constexpr int kSpins = 200;
// A thread that yields may be let go on for the rest of its slice, with its partner behind it on
// the same core: so it yields for a while only, and then sleeps.
constexpr auto kYield = std::chrono::microseconds(50);
constexpr auto kNap = std::chrono::microseconds(20);
// A wait that only a scheduler explains; or, after a rest of so long, that threads were asleep.
constexpr auto kLongWait = std::chrono::microseconds(200);
constexpr auto kRest = std::chrono::milliseconds(1);

// Work of other programs shows in such waits: what they cost is owed, and what threads save by
// sharing the work pays it back, some of it in advance. Nothing short is shared for a while if too
// much is owed: for twice as long each time, and less long again after as much time undisturbed.
using std::chrono::nanoseconds;
constexpr nanoseconds kMostOwed = std::chrono::milliseconds(2);
constexpr nanoseconds kMostPaid = std::chrono::milliseconds(20);
constexpr nanoseconds kShortestPause = std::chrono::milliseconds(4);
constexpr nanoseconds kLongestPause = std::chrono::milliseconds(512);
std::atomic<nanoseconds> g_owed{}, g_pause{kShortestPause};
std::atomic<Clock::time_point> g_shared_until{}, g_last{};
// What takes longer than a scheduler's slice gains by sharing even then.
constexpr double kShortFlops = 5e8;

bool cores_are_shared() {
  const Clock::time_point until = g_shared_until.load(std::memory_order_relaxed);
  return until != Clock::time_point() && Clock::now() < until;
}

// So many threads shared work for so long, and each lost so much of it to waiting.
[[maybe_unused]] void settle(int threads, nanoseconds took, nanoseconds lost) {
  const nanoseconds pause = g_pause.load(std::memory_order_relaxed);
  nanoseconds owed = g_owed.load(std::memory_order_relaxed) + lost - (threads - 1) * (took - lost);
  owed = std::max(owed, -kMostPaid);
  if (owed > kMostOwed) {
    owed = nanoseconds::zero();
    g_shared_until.store(Clock::now() + pause);
    g_pause.store(std::min(2 * pause, kLongestPause));
  } else if (lost == nanoseconds::zero() && pause > kShortestPause) {
    g_pause.store(std::max(pause - took, kShortestPause));
  }
  g_owed.store(owed, std::memory_order_relaxed);
}

bool g_forked = false;

#ifdef FASTRNN_POSIX
// libgomp's threads do not survive fork and the child would wait for them for ever.
const int g_fork_handler = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });
#endif

}  // namespace

int threads_for(double flops, int threads, bool deterministic) {
  if (flops < kSerialFlops || g_forked || threads < 2) return 1;
  if (flops < kShortFlops && !deterministic && cores_are_shared()) return 1;
  return threads;
}

namespace {

// The seconds of a barrier now. A host may move its guests' cores away from each other, and a line
// of memory then takes five times as long from one to the other: so it is measured, once in a
// while.
double barrier_seconds(int threads) {
  static std::atomic<Clock::rep> measured_at{0};
  static std::atomic<double> seconds{kBarrierSeconds};
  constexpr Clock::rep kValidFor = Clock::duration(std::chrono::milliseconds(100)).count();
  const Clock::rep now = Clock::now().time_since_epoch().count();
  const Clock::rep before = measured_at.load(std::memory_order_relaxed);
  if (before && now - before < kValidFor) return seconds.load(std::memory_order_relaxed);
  measured_at.store(now);
  struct Found {
    double best = 1;
    bool stop = false;
  } found;
  parallel(
      threads,
      [](void* context, int thread, int team, Barrier& barrier) {
        Found& found = *static_cast<Found*>(context);
        barrier.wait(team);
        for (int trial = 0; trial < 12 && !found.stop; ++trial) {
          const auto start = Clock::now();
          barrier.wait(team);
          barrier.wait(team);
          const std::chrono::duration<double> took = Clock::now() - start;
          if (thread == 0) {
            found.best = std::min(found.best, took.count() / 2);
            found.stop = took > kLongWait;  // busy cores: a scheduler's slice for every wait
          }
          barrier.wait(team);
        }
      },
      &found);
  seconds.store(found.best);
  return found.best;
}

}  // namespace

Plan::Plan(const Rows& rows, int D, int wanted, bool may_split_units, bool deterministic,
           double flops, double bytes) {
  const int64_t B = rows.B;
  threads = threads_for(flops * static_cast<double>(rows.N) * D, wanted, deterministic);
  const int64_t sequences = B * D;
  if (threads > 1 && may_split_units) {
    // Time of a step, in rows at the tile's full speed: weights beyond the first cache take as long
    // to arrive as four rows.
    const double arrival = bytes > kFirstCache ? 4 : 1;
    const auto cost = [&](double rows) { return std::max(arrival, rows); };
    const double shared = D * cost(static_cast<double>(B)) / threads;
    const double alone = cost(std::ceil(static_cast<double>(sequences) / threads));
    const bool starved = bytes > kCoreCache && B < kRowsThatHideWeights * threads && D < threads;
    // What sharing a step saves must be more than the barrier after it.
    const double saved = flops * static_cast<double>(B) / kStepRate * (1 - 1.0 / threads);
    units = (shared < 0.9 * alone || starved) && saved > kWorth * kBarrierSeconds;
    // A bias gradient's sum has another order in the other plan.
    if (units && !deterministic) {
      units = !cores_are_shared() && (saved > kWorthAnything * kBarrierSeconds ||
                                      saved > kWorth * barrier_seconds(threads));
      units = units && !cores_are_shared();  // which that may have found out
    }
  }
  if (units) {
    for (int d = 0; d < D; ++d) tasks.push_back({0, d, 0, B});
    most_rows = B;
    return;
  }
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(sequences, 1)));
  // Cut the sequences, one direction after the other, into shares of equally many rows.
  int64_t row = 0, done = 0;
  int d = 0;
  const int64_t total = rows.N * D;
  for (int k = 1; k <= threads; ++k) {
    const int64_t target = total / threads * k + total % threads * k / threads;
    while (d < D && (done < target || k == threads)) {
      const int64_t first = row;
      while (row < B && (k == threads || done + rows.length(row) / 2 < target)) {
        done += rows.length(row++);
      }
      if (row > first) {
        tasks.push_back({k - 1, d, first, row});
        most_rows = std::max(most_rows, row - first);
      }
      if (row < B) break;
      row = 0;
      ++d;
    }
  }
}

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// Blocks kept for reuse: so many bytes in all, and none for a request that it dwarfs.
constexpr size_t kMostKept = size_t{1} << 30;
constexpr size_t kLargestWaste = 4;

struct Block {
  void* data;
  size_t capacity;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> kept;  // oldest first
  size_t bytes = 0;
};

// Never destroyed: a tensor may outlive every static object and still give its memory back.
Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

std::atomic<bool> g_poison{false};

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

void* allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, bytes >= kHugePage ? kHugePage : 4096, bytes)) throw std::bad_alloc();
#if defined(FASTRNN_POSIX) && defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return p;
}

}  // namespace

Scratch::Scratch(size_t bytes) : size_(bytes) {
  if (bytes > PTRDIFF_MAX - kHugePage) throw std::bad_alloc();
  const size_t wanted = round_up(std::max<size_t>(bytes, 1), 4096);
  // try_lock: a child forked while another thread held the mutex must not wait for it.
  Pool& p = pool();
  if (std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock); lock) {
    auto best = p.kept.end();
    for (auto it = p.kept.begin(); it != p.kept.end(); ++it) {
      if (it->capacity >= wanted && it->capacity / kLargestWaste <= wanted &&
          (best == p.kept.end() || it->capacity < best->capacity)) {
        best = it;
      }
    }
    if (best != p.kept.end()) {
      data_ = best->data;
      capacity_ = best->capacity;
      p.bytes -= capacity_;
      p.kept.erase(best);
    }
  }
  if (!data_) {
    data_ = allocate(wanted);
    capacity_ = wanted;
  }
  if (g_poison.load(std::memory_order_relaxed)) std::memset(data_, 0xff, capacity_);
}

Scratch::~Scratch() {
  Pool& p = pool();
  std::vector<Block> evicted;  // freed below, since that may take long, and others want the mutex
  if (std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
      lock && capacity_ <= kMostKept) {
    try {
      auto first = p.kept.begin();
      size_t bytes = p.bytes + capacity_;
      for (; bytes > kMostKept; ++first) bytes -= first->capacity;
      evicted.assign(p.kept.begin(), first);
      p.kept.push_back({data_, capacity_});
      p.kept.erase(p.kept.begin(), p.kept.begin() + static_cast<std::ptrdiff_t>(evicted.size()));
      p.bytes = bytes;
      data_ = nullptr;
    } catch (const std::bad_alloc&) {
      evicted.clear();
    }
  }
  for (const Block& block : evicted) std::free(block.data);
  std::free(data_);
}

void Scratch::release() {
  Pool& p = pool();
  const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
  if (!lock) return;
  for (const Block& block : p.kept) std::free(block.data);
  p.kept.clear();
  p.bytes = 0;
}

void Scratch::poison(bool on) { g_poison.store(on); }

void Barrier::wait(int team) {
  if (team == 1) return;
  const int phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == team - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; spins < kSpins; ++spins) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  wait_long(phase);
}

void Barrier::wait_long(int phase) {
  const auto start = Clock::now();
  nanoseconds waited{};
  while (phase_.load(std::memory_order_acquire) == phase) {
    if (waited < kYield) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kNap);
    }
    waited = Clock::now() - start;
  }
  if (waited > kLongWait) lost_ += waited.count();
}

#ifdef _OPENMP
namespace {

int current_core() {
#ifdef FASTRNN_LINUX
  return sched_getcpu();
#else
  return -1;
#endif
}

// Threads that slept may wake on one core, and a scheduler takes milliseconds to move them apart.
// What this thread may run on is the same afterwards, unless somebody changes it just now.
void leave_core(int core) {
#ifdef FASTRNN_LINUX
  cpu_set_t allowed, others;
  if (core < 0 || core >= CPU_SETSIZE || sched_getaffinity(0, sizeof allowed, &allowed)) return;
  others = allowed;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others)) return;
  // Refused only if none of these cores is left to the process: then the kernel has widened it.
  (void)!sched_setaffinity(0, sizeof allowed, &allowed);
#else
  (void)core;
#endif
}

}  // namespace
#endif

void parallel(int threads, Job job, void* context) {
  Barrier barrier;
#ifdef _OPENMP
  if (threads > 1) {
    std::atomic<int64_t> busy{0};  // of all that have work, from the start to their end
    int working = 1;
    const int core = current_core();
    const auto start = Clock::now();
#pragma omp parallel
    {
      const int thread = omp_get_thread_num(), team = omp_get_num_threads();
      if (thread && current_core() == core) leave_core(core);
      job(context, thread, team, barrier);
      if (thread < threads) busy += nanoseconds(Clock::now() - start).count();
      if (thread == 0) working = std::min(team, threads);
    }
    const auto end = Clock::now();
    const bool rested = start - g_last.exchange(end) > kRest;
    if (working < 2 || rested) return;
    const nanoseconds took = end - start;
    nanoseconds lost = (working * took - nanoseconds(busy)) / (working - 1);
    if (lost < kLongWait) lost = nanoseconds::zero();
    lost += barrier.lost() / (working - 1);
    settle(working, took, std::min(lost, took));
    return;
  }
#endif
  (void)threads;
  job(context, 0, 1, barrier);
}

const char* threading() {
#ifdef _OPENMP
  return "OpenMP";
#else
  return nullptr;
#endif
}

int set_threads(int threads) {
#ifdef _OPENMP
  // The OpenMP runtime ends the process when it cannot start what it was asked for.
  constexpr int kMostThreads = 4096;
  if (threads > kMostThreads) {
    throw std::invalid_argument("expected at most " + std::to_string(kMostThreads) +
                                " threads, got " + std::to_string(threads));
  }
  if (threads > 0 && omp_get_max_threads() != threads) omp_set_num_threads(threads);
  return omp_get_max_threads();
#else
  (void)threads;
  return 1;
#endif
}

const std::vector<const Engine*>& engines() {
  static const std::vector<const Engine*> all = {FASTRNN_ENGINES};
  return all;
}

}  // namespace fastrnn
