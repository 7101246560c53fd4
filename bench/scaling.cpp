// Predicts the time of a layer with more threads than the machine has cores: `make scaling`.
//
//     scaling MODE T B I H THREADS...     one JSON object a line, for each pass and number of
//     threads
//
// Linked with the engine in place of parallel.cpp: `parallel` runs the share of each thread alone,
// one after the other, and times it. The time of a region is that of its slowest share. Barriers do
// nothing but count, and their cost and that of a region are added by a formula. It does not
// predict that threads compete for caches and memory, that they read what others have written, or
// that the clock falls.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <random>
#include <vector>

#include "engine.h"
#include "parallel.h"
#include "plan.h"

namespace fastrnn {

namespace {

using Clock = std::chrono::steady_clock;

// The processor time of this thread, which other programs disturb least.
double seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// The predicted time since it was last set to zero.
double g_seconds = 0;

// The barriers that the running share has passed, by the size of the team.
std::map<int, int64_t> g_barriers;

// A region of OpenMP: threads that spin are released, and the last of them is waited for.
double region_seconds(int threads) { return threads > 1 ? 2e-6 + 1e-7 * threads : 0; }

}  // namespace

void Barrier::wait(int, int count) {
  if (count > 1) ++g_barriers[count];
}

// Two cores near each other take 50 ns (docs/experiments.md, row 22); the others join in a tree.
double barrier_seconds(int threads) { return threads > 1 ? 1e-7 + 1.5e-7 * std::log2(threads) : 0; }

void parallel(int threads, int groups, Job job, void* context) {
  std::vector<Barrier> barriers(1 + groups);
  double slowest = 0, waits = 0;
  for (int thread = 0; thread < threads; ++thread) {
    g_barriers.clear();
    const double start = seconds();
    job(context, thread, threads, barriers.data());
    slowest = std::max(slowest, seconds() - start);
    double sum = 0;
    for (const auto& [team, count] : g_barriers) sum += double(count) * barrier_seconds(team);
    waits = std::max(waits, sum);
  }
  g_seconds += slowest + waits + region_seconds(threads);
}

bool in_forked_child() { return false; }
const char* threading() { return nullptr; }
int set_threads(int threads) { return threads; }

namespace {

struct Shape {
  int64_t T, B, I, H;
};

std::vector<float> random_values(int64_t count, double scale) {
  static std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(static_cast<float>(-scale),
                                                static_cast<float>(scale));
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = uniform(random);
  return values;
}

// A layer of one direction, with buffers for both passes.
struct Problem {
  const Engine& engine;
  const int cell;
  const Shape s;
  const int64_t N = s.T * s.B, G = engine.cell[cell].gates;
  const Rows rows{N, s.B, nullptr, s.T};
  const double scale = 1 / std::sqrt(double(s.H));
  std::vector<float> x = random_values(N * s.I, 1), w_ih = random_values(G * s.H * s.I, scale),
                     w_hh = random_values(G * s.H * s.H, scale),
                     b_ih = random_values(G * s.H, scale), b_hh = random_values(G * s.H, scale),
                     dout = random_values(N * s.H, 1);
  std::vector<float> out = std::vector<float>(N * s.H),
                     saved = std::vector<float>(N * engine.cell[cell].num_saved(false) * s.H),
                     dx = x, dw_ih = w_ih, dw_hh = w_hh, db_ih = b_ih, db_hh = b_hh;
  std::vector<float> final[kMaxStates];

  Problem(const Engine& e, int c, const Shape& shape) : engine(e), cell(c), s(shape) {
    for (auto& f : final) f.resize(s.B * s.H);
  }

  void fill(Layer<float>& a, int threads) const {
    a.rows = &rows, a.I = s.I, a.H = s.H, a.P = s.H, a.threads = threads;
    a.weights[0] = {w_ih.data(), w_hh.data(), b_ih.data(), b_hh.data(), nullptr};
  }

  void forward(int threads, bool save) {
    Forward<float> a;
    fill(a, threads);
    a.x = x.data(), a.out = out.data(), a.saved = save ? saved.data() : nullptr;
    for (int k = 0; k < engine.cell[cell].states; ++k) a.final[k] = final[k].data();
    engine.forward(cell, a);
  }

  void backward(int threads) {
    Backward<float> a;
    fill(a, threads);
    a.x = x.data(), a.out = out.data(), a.saved = saved.data(), a.dout = dout.data();
    a.dx = dx.data();
    a.dweights[0] = {dw_ih.data(), dw_hh.data(), db_ih.data(), db_hh.data(), nullptr};
    engine.backward(cell, a);
  }

  // The least predicted time of several calls.
  double best(int threads, bool training) {
    double best = HUGE_VAL;
    const auto start = Clock::now();
    for (int k = 0; k < 3 || (k < 20 && Clock::now() - start < std::chrono::milliseconds(150));
         ++k) {
      // Unlike in a real call, a share that runs alone does not see what others have written: the
      // values of a whole call are restored for those that read them.
      if (training) forward(1, true);
      g_seconds = 0;
      forward(threads, training);
      if (training) backward(threads);
      best = std::min(best, g_seconds);
    }
    return best;
  }
};

}  // namespace

}  // namespace fastrnn

int main(int count, char** arguments) {
  using namespace fastrnn;
  if (count < 7) {
    std::fprintf(stderr, "usage: %s MODE T B I H THREADS...\n", arguments[0]);
    return 2;
  }
  const Engine* engine = nullptr;
  for (const Engine* e : engines()) {
    if (!engine && e->runs_here()) engine = e;
  }
  int cell = 0;
  while (cell < engine->cells && std::strcmp(engine->cell[cell].mode, arguments[1])) ++cell;
  if (cell == engine->cells) {
    std::fprintf(stderr, "unknown mode %s\n", arguments[1]);
    return 2;
  }
  int64_t sizes[4];
  for (int k = 0; k < 4; ++k) sizes[k] = std::atoll(arguments[2 + k]);
  Problem problem(*engine, cell, {sizes[0], sizes[1], sizes[2], sizes[3]});
  for (const bool training : {false, true}) {
    for (int k = 6; k < count; ++k) {
      const int threads = std::atoi(arguments[k]);
      std::printf("{\"which\": \"%s\", \"threads\": %d, \"seconds\": %.3e}\n",
                  training ? "training" : "inference", threads, problem.best(threads, training));
      std::fflush(stdout);
    }
  }
}
