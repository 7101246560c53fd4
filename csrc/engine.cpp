#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#define FASTRNN_POSIX 1
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
// A wait that only a scheduler explains; so many of them in one call say that the cores are shared.
constexpr auto kLongWait = std::chrono::microseconds(200);
constexpr int kLongWaits = 3;
// So long no steps are shared then: twice as long each time, and half as long for every call that
// shared its steps undisturbed.
constexpr Clock::rep kShortestPause = Clock::duration(std::chrono::milliseconds(4)).count();
constexpr Clock::rep kLongestPause = Clock::duration(std::chrono::milliseconds(512)).count();
std::atomic<Clock::rep> g_pause{kShortestPause}, g_shared_until{0};

bool cores_are_shared() {
  const Clock::rep until = g_shared_until.load(std::memory_order_relaxed);
  return until && Clock::now().time_since_epoch().count() < until;
}

void cores_were_shared() {
  const Clock::rep pause = g_pause.load(std::memory_order_relaxed);
  g_shared_until.store(Clock::now().time_since_epoch().count() + pause);
  g_pause.store(std::min(2 * pause, kLongestPause));
}

void cores_were_ours() {
  const Clock::rep pause = g_pause.load(std::memory_order_relaxed);
  if (pause > kShortestPause) g_pause.store(pause / 2);
}

bool g_forked = false;

#ifdef FASTRNN_POSIX
// libgomp's threads do not survive fork and the child would wait for them for ever.
const int g_fork_handler = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });
#endif

}  // namespace

int threads_for(double flops, int threads) {
  return flops < kSerialFlops || g_forked ? 1 : std::max(1, threads);
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
  threads = threads_for(flops * static_cast<double>(rows.N) * D, wanted);
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
  if (std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
      lock && capacity_ <= kMostKept) {
    try {
      p.kept.push_back({data_, capacity_});
      data_ = nullptr;
      p.bytes += capacity_;
    } catch (const std::bad_alloc&) {
    }
    while (p.bytes > kMostKept) {
      std::free(p.kept.front().data);
      p.bytes -= p.kept.front().capacity;
      p.kept.erase(p.kept.begin());
    }
  }
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
  while (phase_.load(std::memory_order_acquire) == phase) {
#ifdef FASTRNN_POSIX
    sched_yield();
#endif
  }
  if (Clock::now() - start > kLongWait && ++long_waits_ == kLongWaits) cores_were_shared();
}

void Barrier::undisturbed() const {
  if (!long_waits_) cores_were_ours();
}

void parallel(int threads, Job job, void* context) {
  Barrier barrier;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel
    job(context, omp_get_thread_num(), omp_get_num_threads(), barrier);
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
