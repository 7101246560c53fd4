// Long waits add to a debt, and the time that threads save by sharing work reduces it, down to a
// limited credit. Above kMaxDebt, short calls run single-threaded for a pause. The pause doubles
// each time, and shrinks by the time that threads then work undisturbed.
#include "contention.h"

#include <algorithm>
#include <atomic>

namespace fastrnn {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::nanoseconds;

constexpr nanoseconds kMaxDebt = std::chrono::milliseconds(2);
constexpr nanoseconds kMaxCredit = std::chrono::milliseconds(20);
constexpr nanoseconds kMinPause = std::chrono::milliseconds(4);
constexpr nanoseconds kMaxPause = std::chrono::milliseconds(512);

std::atomic<nanoseconds> g_debt{}, g_pause{kMinPause};
std::atomic<Clock::time_point> g_contended_until{};

}  // namespace

bool cores_are_contended() {
  const Clock::time_point until = g_contended_until.load(std::memory_order_relaxed);
  return until != Clock::time_point() && Clock::now() < until;
}

void update_contention(int threads, nanoseconds took, nanoseconds lost) {
  const nanoseconds pause = g_pause.load(std::memory_order_relaxed);
  nanoseconds debt = g_debt.load(std::memory_order_relaxed) + lost - (threads - 1) * (took - lost);
  debt = std::max(debt, -kMaxCredit);
  if (debt > kMaxDebt) {
    debt = nanoseconds::zero();
    g_contended_until.store(Clock::now() + pause);
    g_pause.store(std::min(2 * pause, kMaxPause));
  } else if (lost == nanoseconds::zero() && pause > kMinPause) {
    g_pause.store(std::max(pause - took, kMinPause));
  }
  g_debt.store(debt, std::memory_order_relaxed);
}

}  // namespace fastrnn
