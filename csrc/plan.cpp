// Cost model of sharing a layer among threads, and the division itself.
#include "plan.h"

#include <algorithm>
#include <cmath>

#include "contention.h"
#include "parallel.h"

namespace fastrnn {

namespace {

// Below this much arithmetic, waking the pool costs more than a second thread saves.
constexpr double kSerialFlops = 5e5;
// Work that takes longer than a scheduler's slice gains by sharing even on contended cores.
constexpr double kShortFlops = 5e8;
// Flops per second of one thread, in steps so small that a barrier may not pay.
constexpr double kStepRate = 1e11;
// Sharing a step is worth it if it saves this many times the cost of a barrier, since every thread
// then waits for the other threads' h too. Above the second factor the barrier is not measured.
constexpr double kMinGain = 3;
constexpr double kMinGainUnmeasured = 60;
constexpr double kFirstCache = 32 << 10;
// The cache of one core. Larger weights come over a path shared by all cores again at every step.
constexpr double kCoreCache = 1 << 20;
// This many rows per thread hide the time their weights take to arrive.
constexpr int64_t kRowsThatHideWeights = 8;

}  // namespace

int threads_for(double flops, int threads, bool deterministic) {
  if (flops < kSerialFlops || in_forked_child() || threads < 2) return 1;
  if (flops < kShortFlops && !deterministic && cores_are_contended()) return 1;
  return threads;
}

Plan::Plan(const Rows& rows, int D, int max_threads, bool may_split_units, bool deterministic,
           double flops, double bytes) {
  threads = threads_for(flops * static_cast<double>(rows.N) * D, max_threads, deterministic);
  units = threads > 1 && may_split_units &&
          worth_splitting_units(rows.B, D, deterministic, flops, bytes);
  if (units) {
    for (int d = 0; d < D; ++d) tasks.push_back({0, d, 0, rows.B});
    max_rows = rows.B;
  } else {
    cut_sequences(rows, D);
  }
}

bool Plan::worth_splitting_units(int64_t B, int D, bool deterministic, double flops,
                                 double bytes) const {
  // The time of a step, in rows at the tile's full speed: weights larger than the first cache take
  // as long to arrive as four rows.
  const double arrival = bytes > kFirstCache ? 4 : 1;
  const auto cost = [&](double rows) { return std::max(arrival, rows); };
  const double by_units = D * cost(static_cast<double>(B)) / threads;
  const double by_sequences = cost(std::ceil(static_cast<double>(B * D) / threads));
  const bool starved = bytes > kCoreCache && B < kRowsThatHideWeights * threads && D < threads;
  // The time that sharing a step saves must exceed the cost of the barrier after it.
  const double gain = flops * static_cast<double>(B) / kStepRate * (1 - 1.0 / threads);
  if (!(by_units < 0.9 * by_sequences || starved) || gain <= kMinGain * kBarrierSeconds) {
    return false;
  }
  // A bias gradient is summed in another order if units are split, so a deterministic layer decides
  // by its sizes alone.
  if (deterministic) return true;
  if (cores_are_contended()) return false;
  if (gain <= kMinGainUnmeasured * kBarrierSeconds && gain <= kMinGain * barrier_seconds(threads)) {
    return false;
  }
  return !cores_are_contended();  // the measurement may have found that they are
}

// Cuts the sequences, one direction after the other, into shares with equal numbers of rows.
void Plan::cut_sequences(const Rows& rows, int D) {
  const int64_t B = rows.B, total = rows.N * D;
  threads = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(B * D, 1)));
  int64_t row = 0, done = 0;
  int d = 0;
  for (int k = 1; k <= threads; ++k) {
    const int64_t target = total / threads * k + total % threads * k / threads;
    while (d < D && (done < target || k == threads)) {
      const int64_t first = row;
      while (row < B && (k == threads || done + rows.length(row) / 2 < target)) {
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
