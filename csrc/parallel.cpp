// The barrier, the OpenMP team, its threads' handling of subnormal numbers, and fork.
#include "parallel.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __x86_64__
#include <xmmintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define FASTRNN_POSIX 1
#endif
#ifdef __linux__
#include <sched.h>
#define FASTRNN_LINUX 1
#endif

#include "contention.h"

namespace fastrnn {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::nanoseconds;

// Some microseconds; a step that is worth sharing takes about as long.
constexpr int kSpins = 200;
// A thread that yields may be given the rest of its slice again, with its partner behind it on the
// same core: so it yields for a while only, and then sleeps.
constexpr auto kYield = std::chrono::microseconds(50);
constexpr auto kNap = std::chrono::microseconds(20);
// A longer wait has no other explanation than the scheduler.
constexpr auto kLongWait = std::chrono::microseconds(200);

bool g_forked = false;

#ifdef FASTRNN_POSIX
// libgomp's threads do not survive fork and the child would wait for them for ever.
const int g_fork_handler = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });
#endif

// The floating-point control register of this thread, and its bits that make subnormals zero.
#if defined(__x86_64__)
constexpr uint64_t kFlush = 0x8040;  // MXCSR: flush to zero, denormals are zero
uint64_t control() { return _mm_getcsr(); }
void set_control(uint64_t bits) { _mm_setcsr(static_cast<unsigned>(bits)); }
#elif defined(__aarch64__)
constexpr uint64_t kFlush = uint64_t{1} << 24;  // FPCR.FZ
uint64_t control() {
  uint64_t bits;
  asm volatile("mrs %0, fpcr" : "=r"(bits));
  return bits;
}
void set_control(uint64_t bits) { asm volatile("msr fpcr, %0" : : "r"(bits)); }
#else
constexpr uint64_t kFlush = 0;
uint64_t control() { return 0; }
void set_control(uint64_t) {}
#endif

}  // namespace

SubnormalsAreZero::SubnormalsAreZero() : before_(control()) {
  if ((before_ & kFlush) != kFlush) set_control(before_ | kFlush);
}

SubnormalsAreZero::~SubnormalsAreZero() {
  if ((before_ & kFlush) != kFlush) set_control(before_);
}

// Whether this thread is the last of `count`; the counter then begins again.
bool Barrier::Counter::last(int count) {
  if (arrived.fetch_add(1, std::memory_order_acq_rel) < count - 1) return false;
  arrived.store(0, std::memory_order_relaxed);
  return true;
}

void Barrier::wait(int thread, int count) {
  if (count == 1) return;
  const int phase = phase_.load(std::memory_order_relaxed);
  bool last;
  if (count <= kFewThreads) {
    last = root_.last(count);
  } else {
    const int size = std::max(4, (count + kBranches - 1) / kBranches), branch = thread / size;
    last = branches_[branch].last(std::min(size, count - branch * size)) &&
           root_.last((count + size - 1) / size);
  }
  if (last) {
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

double barrier_seconds(int threads) {
  static std::atomic<Clock::rep> measured_at{0};
  static std::atomic<double> seconds{kBarrierSeconds};
  constexpr Clock::rep kValidFor = Clock::duration(std::chrono::milliseconds(100)).count();
  const Clock::rep now = Clock::now().time_since_epoch().count();
  const Clock::rep before = measured_at.load(std::memory_order_relaxed);
  if (before && now - before < kValidFor) return seconds.load(std::memory_order_relaxed);
  measured_at.store(now);
  struct Measurement {
    double best = 1;
    bool stop = false;
  } measurement;
  parallel(
      threads, 0,
      [](void* context, int thread, int team, Barrier* barrier) {
        Measurement& shared = *static_cast<Measurement*>(context);
        barrier->wait(thread, team);
        for (int trial = 0; trial < 12 && !shared.stop; ++trial) {
          const auto start = Clock::now();
          barrier->wait(thread, team);
          barrier->wait(thread, team);
          const std::chrono::duration<double> took = Clock::now() - start;
          if (thread == 0) {
            shared.best = std::min(shared.best, took.count() / 2);
            shared.stop = took > kLongWait;  // busy cores: a scheduler's slice for every wait
          }
          barrier->wait(thread, team);
        }
      },
      &measurement);
  seconds.store(measurement.best);
  return measurement.best;
}

#ifdef _OPENMP
namespace {

// After a pause of this length the threads of the pool were asleep.
constexpr auto kRest = std::chrono::milliseconds(1);
std::atomic<Clock::time_point> g_last_end{};

int current_core() {
#ifdef FASTRNN_LINUX
  return sched_getcpu();
#else
  return -1;
#endif
}

// Threads that slept may wake on one core, and a scheduler takes milliseconds to move them apart.
// The thread's affinity is the same afterwards, unless another program changes it at this moment.
void leave_core(int core) {
#ifdef FASTRNN_LINUX
  cpu_set_t allowed, others;
  if (core < 0 || core >= CPU_SETSIZE || sched_getaffinity(0, sizeof allowed, &allowed)) return;
  others = allowed;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others)) return;
  // Fails only if the process may use none of these cores any more: the kernel has then widened it.
  (void)!sched_setaffinity(0, sizeof allowed, &allowed);
#else
  (void)core;
#endif
}

}  // namespace
#endif

void parallel(int threads, int groups, Job job, void* context) {
#ifdef _OPENMP
  if (threads > 1) {
    Barrier few[3];  // the usual case allocates nothing
    std::vector<Barrier> many(groups < 3 ? 0 : 1 + groups);
    Barrier* const barriers = groups < 3 ? few : many.data();
    std::atomic<int64_t> busy{0};  // total over the threads that have work, from start to their end
    int working = 1;
    const int core = current_core();
    const auto start = Clock::now();
#pragma omp parallel
    {
      const int thread = omp_get_thread_num(), team = omp_get_num_threads();
      if (thread && current_core() == core) leave_core(core);
      const SubnormalsAreZero mode;
      job(context, thread, team, barriers);
      if (thread < threads) busy += nanoseconds(Clock::now() - start).count();
      if (thread == 0) working = std::min(team, threads);
    }
    const auto end = Clock::now();
    const bool rested = start - g_last_end.exchange(end) > kRest;
    if (working < 2 || rested) return;
    const nanoseconds took = end - start;
    nanoseconds lost = (working * took - nanoseconds(busy)) / (working - 1);
    if (lost < kLongWait) lost = nanoseconds::zero();
    nanoseconds waited{};
    for (int k = 0; k <= groups; ++k) waited += barriers[k].lost();
    lost += waited / (working - 1);
    update_contention(working, took, std::min(lost, took));
    return;
  }
#endif
  (void)threads, (void)groups;
  const SubnormalsAreZero mode;
  Barrier barrier;  // of one thread: it waits for no one
  job(context, 0, 1, &barrier);
}

bool in_forked_child() { return g_forked; }

const char* threading() {
#ifdef _OPENMP
  return "OpenMP";
#else
  return nullptr;
#endif
}

int set_threads(int threads) {
#ifdef _OPENMP
  // The OpenMP runtime ends the process when it cannot start the requested number.
  constexpr int kMaxThreads = 4096;
  if (threads > kMaxThreads) {
    throw std::invalid_argument("expected at most " + std::to_string(kMaxThreads) +
                                " threads, got " + std::to_string(threads));
  }
  if (threads > 0 && omp_get_max_threads() != threads) omp_set_num_threads(threads);
  return omp_get_max_threads();
#else
  (void)threads;
  return 1;
#endif
}

}  // namespace fastrnn
