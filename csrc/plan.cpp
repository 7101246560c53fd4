// Cost model of sharing a layer among threads, and the division itself.
#include "plan.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#ifdef __linux__
#include <unistd.h>
#endif

#include "contention.h"
#include "parallel.h"

namespace fastrnn {

namespace {

// Below this much arithmetic, waking the pool costs more than a second thread saves. Each further
// thread that is woken adds a twentieth of it.
constexpr double kSerialFlops = 5e5;
// Work that takes longer than a scheduler's slice gains by sharing even on contended cores.
constexpr double kShortFlops = 5e8;
// The share of the peak that the register tile reaches.
constexpr double kTileRate = 0.75;
// At a barrier a thread also waits for the slowest of the others, by this share of a step and more.
constexpr double kWaits = 3, kSlowest = 0.05;
// A cache line that another core has written takes this share of a barrier of two threads.
constexpr double kLine = 0.25, kLineBytes = 64;
// A step that takes this many times as long as a barrier does not depend on what that now costs.
constexpr double kUnmeasured = 60;
// A core reads its own cache while it multiplies, but this share of the shorter time remains. What
// comes from further away it waits for.
constexpr double kNotHidden = 0.2;
// Threads share units only if a step then takes at most this share of the time: without sharing, a
// thread waits for no other.
constexpr double kMaxShareOfTime = 0.9;

// Bytes per second that one core reads from its first and second cache, a cache that it shares with
// others, and memory (bench/probe.cpp on two servers).
constexpr double kBandwidth[] = {1.5e11, 5e10, 2.2e10, 1.1e10};
// Weights that exceed a cache are walked to and fro, so this share of it is read again.
constexpr double kKept = 0.75;

// The sizes of the caches; those of a common server where the system does not tell.
struct Caches {
  double sizes[3] = {32 << 10, 1 << 20, 32 << 20};

  Caches() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    int level = 0;
    for (const int name : {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE}) {
      const long size = sysconf(name);
      if (size > 0) sizes[level] = static_cast<double>(size);
      ++level;
    }
#endif
  }
};

// The time of a step in which `sharing` threads share `rows` rows.
double step_seconds(const StepWork& work, double rows, int sharing, double barrier) {
  static const Caches caches;
  const auto& [first, second, third] = caches.sizes;
  const double part =
      static_cast<double>((work.panels + sharing - 1) / sharing) / static_cast<double>(work.panels);
  const double multiply = part * work.flops * rows / (kTileRate * work.rate);
  // The weights that a core keeps in its own caches, and the rest, which comes from further away.
  const double bytes = part * work.bytes, own = bytes > second ? kKept * second : bytes;
  const double near = own / kBandwidth[bytes > first ? 1 : 0];
  const double far = (bytes - own) / kBandwidth[bytes > third ? 3 : 2];
  const double seconds = std::max(multiply, near) + kNotHidden * std::min(multiply, near) + far;
  if (sharing == 1) return seconds;
  const double lines = rows * work.shared * (1 - 1.0 / sharing) / kLineBytes;
  return (1 + kSlowest) * seconds + barrier * (kWaits * std::log2(sharing) + kLine * lines);
}

struct Division {
  int threads, sharing;
  double seconds;
};

// The best division, given the seconds of a barrier of two threads.
Division best_division(const Rows& rows, int D, int max_threads, bool may_share,
                       const StepWork& work, double barrier) {
  const int64_t sequences = rows.B * D;
  // Rows of a step, over sequences: in a packed batch the later steps have fewer.
  const double fill =
      rows.N ? static_cast<double>(rows.N) / static_cast<double>(rows.B * rows.T) : 1;
  Division best{1, 1, HUGE_VAL}, best_shared = best;
  const int64_t most = may_share ? std::min<int64_t>(max_threads, work.panels) : 1;
  for (int sharing = 1; sharing <= most; ++sharing) {
    for (int64_t groups = std::min<int64_t>(max_threads / sharing, sequences); groups;
         groups /= 2) {
      // Where there are fewer groups than directions, each runs them one after the other.
      const int64_t turns = groups < D ? D : 1;
      const auto in_turn = static_cast<double>((sequences + groups * turns - 1) / (groups * turns));
      const double seconds =
          static_cast<double>(turns) * step_seconds(work, in_turn * fill, sharing, barrier);
      Division& to = sharing > 1 ? best_shared : best;
      if (seconds < to.seconds) to = {static_cast<int>(groups) * sharing, sharing, seconds};
    }
  }
  return best_shared.seconds < kMaxShareOfTime * best.seconds ? best_shared : best;
}

}  // namespace

int threads_for(double flops, int threads, bool deterministic) {
  if (flops < kSerialFlops * (0.9 + 0.05 * threads) || in_forked_child() || threads < 2) return 1;
  if (flops < kShortFlops && !deterministic && cores_are_contended()) return 1;
  return threads;
}

Plan::Plan(const Rows& rows, int D, int max_threads, bool deterministic, const StepWork& work) {
  max_threads =
      threads_for(work.flops * static_cast<double>(rows.N) * D, max_threads, deterministic);
  if (rows.N && max_threads > 1) {
    const auto divide = [&](bool may_share, double barrier) {
      return best_division(rows, D, max_threads, may_share, work, barrier);
    };
    Division chosen = divide(work.sharable, kBarrierSeconds);
    // A bias gradient is summed in another order if units are shared, so a deterministic layer
    // decides by its sizes and those of the caches alone.
    if (chosen.sharing > 1 && !deterministic) {
      if (chosen.seconds < kUnmeasured * kBarrierSeconds * std::log2(chosen.sharing)) {
        chosen = divide(true, barrier_seconds(max_threads) / std::log2(max_threads));
      }
      // Asked last: the measurement may have found that they are.
      if (chosen.sharing > 1 && cores_are_contended()) chosen = divide(false, 0);
    }
    threads = chosen.threads;
    sharing = chosen.sharing;
  }
  cut_sequences(rows, D);
}

// Cuts the sequences, one direction after the other, into shares with equal numbers of rows.
void Plan::cut_sequences(const Rows& rows, int D) {
  const int64_t B = rows.B, total = rows.N * D;
  const int count = groups();
  int64_t row = 0, done = 0;
  int d = 0;
  for (int k = 1; k <= count; ++k) {
    const int64_t target = total / count * k + total % count * k / count;
    while (d < D && (done < target || k == count)) {
      const int64_t first = row;
      while (row < B && (k == count || done + rows.length(row) / 2 < target)) {
        done += rows.length(row++);
      }
      if (row > first) {
        tasks.push_back({k - 1, d, first, row});
        max_rows = std::max(max_rows, row - first);
      }
      if (row < B) break;
      row = 0;
      ++d;
    }
  }
}

}  // namespace fastrnn
