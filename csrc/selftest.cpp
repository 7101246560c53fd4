// The engine's own test, without Python: for sanitizers, emulators and machines without torch.
//
// For every instruction set that the processor supports and every cell: the backward pass against
// finite differences of the forward pass in double, the results of all instruction sets against
// each other, and bit-equal results for any number of threads, also of gradients that end. Every
// buffer has exactly the size that the engine expects, so that a sanitizer detects each access
// outside.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "engine.h"
#include "parallel.h"
#include "plan.h"
#include "scratch.h"

using namespace fastrnn;

namespace {

int g_checks = 0;

void check(bool ok, const std::string& what) {
  ++g_checks;
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

std::mt19937_64 g_random(1);

template <class T>
std::vector<T> random_values(int64_t count, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> values(static_cast<size_t>(count));
  for (T& v : values) v = static_cast<T>(normal(g_random));
  return values;
}

template <class T>
T* pointer(std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

struct Shape {
  std::vector<int64_t> batch_sizes;
  int64_t I, H, P;
  int D;
  bool dense, bias, state;
  bool last = false;  // only the output of the last step of time has a gradient
};

// A layer with its own data, and the results of running it.
template <class T>
struct Problem {
  const CellInfo& cell;
  Shape shape;
  std::unique_ptr<Rows> rows;
  int64_t N = 0, B = 0;
  bool deterministic = false;
  std::vector<T> x, out, saved, dout, dx;
  // ih, hh, bias_ih, bias_hh, hr of each direction; empty where the layer has none.
  std::vector<T> w[2][5], dw[2][5];
  std::vector<T> state[kMaxStates], final[kMaxStates], dfinal[kMaxStates], dstate[kMaxStates];

  bool projected() const { return shape.P != shape.H; }

  Problem(const CellInfo& cell_, const Shape& s) : cell(cell_), shape(s) {
    const int64_t G = cell.gates, D = s.D, H = s.H, P = s.P;
    B = s.batch_sizes[0];
    for (int64_t n : s.batch_sizes) N += n;
    rows = std::make_unique<Rows>(N, B, s.dense ? nullptr : s.batch_sizes.data(),
                                  static_cast<int64_t>(s.batch_sizes.size()));
    x = random_values<T>(N * s.I);
    dout = random_values<T>(N * D * P);
    for (int d = 0; d < D; ++d) {
      w[d][0] = random_values<T>(G * H * s.I, 0.5 / std::sqrt(double(s.I)));
      w[d][1] = random_values<T>(G * H * P, 0.5 / std::sqrt(double(P)));
      for (int k = 2; k < 4 && s.bias; ++k) w[d][k] = random_values<T>(G * H);
      if (projected()) w[d][4] = random_values<T>(P * H, 1 / std::sqrt(double(H)));
    }
    for (int k = 0; k < cell.states; ++k) {
      const int64_t size = D * B * (k ? H : P);
      if (s.state) state[k] = random_values<T>(size);
      dfinal[k] = random_values<T>(size);
      if (s.last) dfinal[k].assign(size, T(0));
    }
    if (s.last) std::fill_n(dout.begin(), (N - s.batch_sizes.back()) * D * P, T(0));
  }

  void fill(Layer<T>& a, int threads) {
    a.rows = rows.get();
    a.I = shape.I, a.H = shape.H, a.P = shape.P, a.D = shape.D, a.threads = threads;
    a.deterministic = deterministic;
    for (int d = 0; d < shape.D; ++d) {
      a.weights[d] = {pointer(w[d][0]), pointer(w[d][1]), pointer(w[d][2]), pointer(w[d][3]),
                      pointer(w[d][4])};
    }
    for (int k = 0; k < cell.states; ++k) a.state[k] = pointer(state[k]);
  }

  void forward(const Engine& engine, int index, int threads, bool save) {
    Forward<T> a;
    fill(a, threads);
    out.assign(N * shape.D * shape.P, T(NAN));
    a.x = pointer(x);
    a.out = pointer(out);
    for (int k = 0; k < cell.states; ++k) {
      final[k].assign(shape.D * B * (k ? shape.H : shape.P), T(NAN));
      a.final[k] = pointer(final[k]);
    }
    if (save) {
      saved.assign(shape.D * N * cell.num_saved(projected()) * shape.H, T(NAN));
      a.saved = pointer(saved);
    }
    engine.forward(index, a);
  }

  void backward(const Engine& engine, int index, int threads) {
    Backward<T> a;
    fill(a, threads);
    a.x = pointer(x), a.out = pointer(out), a.saved = pointer(saved), a.dout = pointer(dout);
    dx.assign(x.size(), T(NAN));
    a.dx = pointer(dx);
    for (int d = 0; d < shape.D; ++d) {
      for (int k = 0; k < 5; ++k) dw[d][k].assign(w[d][k].size(), T(NAN));
      a.dweights[d] = {pointer(dw[d][0]), pointer(dw[d][1]), pointer(dw[d][2]), pointer(dw[d][3]),
                       pointer(dw[d][4])};
    }
    for (int k = 0; k < cell.states; ++k) {
      a.dfinal[k] = pointer(dfinal[k]);
      dstate[k].assign(dfinal[k].size(), T(NAN));
      a.dstate[k] = pointer(dstate[k]);
    }
    engine.backward(index, a);
  }

  double loss() const {
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += double(out[i]) * double(dout[i]);
    for (int k = 0; k < cell.states; ++k) {
      for (size_t i = 0; i < final[k].size(); ++i)
        sum += double(final[k][i]) * double(dfinal[k][i]);
    }
    return sum;
  }

  std::vector<const std::vector<T>*> results() const {
    std::vector<const std::vector<T>*> all = {&out, &saved, &dx};
    for (int d = 0; d < shape.D; ++d) {
      for (const auto& g : dw[d]) all.push_back(&g);
    }
    for (int k = 0; k < cell.states; ++k) all.insert(all.end(), {&final[k], &dstate[k]});
    return all;
  }
};

std::string name_of(const Engine& engine, const CellInfo& cell, const Shape& s) {
  return std::string(engine.name) + " " + cell.mode + " T=" + std::to_string(s.batch_sizes.size()) +
         " B=" + std::to_string(s.batch_sizes[0]) + " I=" + std::to_string(s.I) +
         " H=" + std::to_string(s.H) + " P=" + std::to_string(s.P) + " D=" + std::to_string(s.D);
}

// Every gradient against central differences.
void check_gradients(const Engine& engine, int index, const Shape& shape, bool deterministic) {
  Problem<double> p(engine.cell[index], shape);
  p.deterministic = deterministic;
  p.forward(engine, index, 1, true);
  p.backward(engine, index, 1);
  const std::string name = name_of(engine, p.cell, shape);
  const auto slope = [&](double& value) {
    const double step = 1e-5, original = value;
    value = original + step;
    p.forward(engine, index, 1, false);
    const double above = p.loss();
    value = original - step;
    p.forward(engine, index, 1, false);
    value = original;
    return (above - p.loss()) / (2 * step);
  };
  const auto close = [&](double got, double expected, const std::string& what) {
    check(std::fabs(got - expected) <= 1e-6 * (1 + std::fabs(expected)),
          name + ": gradient of " + what + " " + std::to_string(got) + ", by differences " +
              std::to_string(expected));
  };
  const auto all_close = [&](const std::vector<double>& got, std::vector<double>& values,
                             const std::string& what) {
    for (size_t i = 0; i < values.size(); ++i) close(got[i], slope(values[i]), what);
  };
  all_close(p.dx, p.x, "x");
  const char* const names[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"};
  for (int d = 0; d < shape.D; ++d) {
    for (int k = 0; k < 5; ++k) all_close(p.dw[d][k], p.w[d][k], names[k]);
  }
  for (int k = 0; k < p.cell.states && shape.state; ++k) {
    all_close(p.dstate[k], p.state[k], "state " + std::to_string(k));
  }
}

// deterministic: threads share units wherever the sizes suggest it, whatever the cores' load.
template <class T>
void check_agreement(int index, const Shape& shape, double tolerance,
                     const std::vector<int>& teams = {1, 2, 3}, bool deterministic = false) {
  const Engine& base = *engines().back();
  const auto seed = g_random;
  Problem<T> expected(base.cell[index], shape);
  expected.forward(base, index, 1, true);
  expected.backward(base, index, 1);
  for (const Engine* engine : engines()) {
    if (!engine->runs_here()) continue;
    const std::string name = name_of(*engine, base.cell[index], shape);
    std::unique_ptr<Problem<T>> one;
    for (int threads : teams) {
      g_random = seed;
      auto p = std::make_unique<Problem<T>>(engine->cell[index], shape);
      p->deterministic = deterministic;
      set_threads(threads);
      p->forward(*engine, index, threads, true);
      p->backward(*engine, index, threads);
      const auto got = p->results(), want = expected.results();
      for (size_t k = 0; k < got.size(); ++k) {
        size_t i = 0;
        const auto close = [&] {
          const double a = (*got[k])[i], b = (*want[k])[i];
          return std::fabs(a - b) <= tolerance * (1 + std::fabs(b));
        };
        while (i < got[k]->size() && close()) ++i;
        check(i == got[k]->size(), name + ": result " + std::to_string(k) + " differs from " +
                                       base.name + "'s at " + std::to_string(i));
      }
      if (one) {
        check(p->out == one->out && p->dx == one->dx && p->dw[0][1] == one->dw[0][1],
              name + ": threads change the result");
      } else {
        one = std::move(p);
      }
    }
  }
}

bool subnormals_are_kept() {
  static volatile float tiny = 1e-39f;
  const volatile float product = tiny * 1.0f;
  return product != 0.0f;
}

// Inside a job subnormal numbers are zero, and afterwards each thread is as it was before.
void check_subnormals() {
  const auto threads_that_keep_them = [] {
    std::atomic<int> kept{0};
#pragma omp parallel
    kept += subnormals_are_kept();
    return kept.load();
  };
  set_threads(3);
  const int before = threads_that_keep_them();
  check(before == (threading() ? 3 : 1), "subnormals: the mode of all threads before a job");
  std::atomic<int> kept{0};
  parallel(
      3, 0,
      [](void* count, int, int, Barrier*) {
        *static_cast<std::atomic<int>*>(count) += subnormals_are_kept();
      },
      &kept);
#if defined(__x86_64__) || defined(__aarch64__)
  check(kept == 0, "subnormals: zero in the threads of a job");
#endif
  check(threads_that_keep_them() == before, "subnormals: the mode of all threads after a job");
}

void check_rows() {
  const auto refuses = [](int64_t N, int64_t B, std::vector<int64_t> sizes) {
    try {
      Rows(N, B, sizes.data(), static_cast<int64_t>(sizes.size()));
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  check(!refuses(5, 3, {3, 2}), "rows: good batch_sizes");
  check(refuses(5, 3, {3, 3}), "rows: too many");
  check(refuses(5, 3, {3, 1}), "rows: too few");
  check(refuses(5, 2, {2, 3}), "rows: growing");
  check(refuses(3, 3, {3, 0}), "rows: zero");
  check(refuses(3, 3, {4, -1}), "rows: negative");
  check(refuses(3, 2, {3}), "rows: first is not B");
  check(refuses(1, 1, {INT64_MAX, 2}), "rows: overflow");
}

std::vector<int64_t> dense(int64_t T, int64_t B) { return std::vector<int64_t>(T, B); }

// Every sequence of every direction belongs to one group of threads, once, and no group has many
// more rows than its share.
void check_plan(const std::vector<int64_t>& sizes, int D, int threads, int64_t panels) {
  int64_t N = 0;
  for (int64_t n : sizes) N += n;
  const Rows rows(N, sizes.front(), sizes.data(), static_cast<int64_t>(sizes.size()));
  const Plan plan(rows, D, threads, true, {1e9, 0, 0, 1e11, panels, panels > 1});
  check(plan.groups() * plan.sharing == plan.threads && plan.threads <= threads,
        "a plan of " + std::to_string(plan.threads) + " threads for " + std::to_string(threads));
  std::vector<int> visits(D * rows.B, 0);
  std::vector<int64_t> load(plan.groups(), 0);
  for (const Task& task : plan.tasks) {
    for (int64_t r = task.row0; r < task.row1; ++r) {
      ++visits[task.direction * rows.B + r];
      load[task.group] += rows.length(r);
    }
  }
  for (int count : visits) {
    check(count == 1, "a sequence belongs to " + std::to_string(count) + " tasks");
  }
  const int64_t share = N * D / plan.groups();
  for (int64_t rows_of : load) {
    check(std::abs(rows_of - share) <= rows.T,
          std::to_string(rows_of) + " rows for a group whose share is " + std::to_string(share));
  }
}

// If threads lose more time in waiting for each other than they save, short work is not shared for
// a while.
void check_contention() {
  if (!threading()) return;
  using std::chrono::milliseconds;
  constexpr double kShort = 1e6, kLong = 1e10;
  const auto shared = [](double flops, bool deterministic) {
    return threads_for(flops, 2, deterministic) == 2;
  };
  set_threads(2);
  check(shared(kShort, false), "contention: short work, at first");
  for (int k = 0; k < 9; ++k) {
    parallel(
        2, 0,
        [](void*, int thread, int, Barrier*) {
          if (thread) std::this_thread::sleep_for(milliseconds(5));
        },
        nullptr);
  }
  check(!shared(kShort, false), "contention: short work whose threads wait");
  check(shared(kShort, true), "contention: short work whose threads wait, deterministic");
  check(shared(kLong, false), "contention: long work whose threads wait");
  std::this_thread::sleep_for(milliseconds(600));
  check(shared(kShort, false), "contention: short work, later");
}

}  // namespace

int main() {
  Scratch::poison(true);
  check_rows();
  check_subnormals();
  check_contention();
  std::string names;
  for (const Engine* engine : engines()) {
    if (!engine->runs_here()) continue;
    names += std::string(names.empty() ? "" : ", ") + engine->name;
    for (int cell = 0; cell < engine->cells; ++cell) {
      for (bool deterministic : {false, true}) {
        const auto check = [&](const Shape& shape) {
          check_gradients(*engine, cell, shape, deterministic);
        };
        check({dense(3, 2), 3, 5, 5, 1, true, true, true});
        check({{3, 3, 1}, 2, 3, 3, 2, false, true, true});
        check({dense(1, 1), 1, 1, 1, 1, true, true, true});
        if (engine->cell[cell].projectable) check({{3, 2, 2}, 2, 4, 3, 2, false, true, true});
      }
    }
  }
  for (int threads : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 64}) {
    for (int D : {1, 2}) {
      for (int64_t panels : {1, 3, 16}) {
        check_plan(dense(10, 13), D, threads, panels);
        check_plan({9, 9, 8, 5, 5, 5, 2, 1, 1}, D, threads, panels);
      }
    }
  }
  for (int cell = 0; cell < engines().back()->cells; ++cell) {
    const bool projectable = engines().back()->cell[cell].projectable;
    for (const auto& sizes :
         {dense(1, 1), dense(3, 13), dense(20, 2), std::vector<int64_t>{7, 7, 4, 3, 3, 1}}) {
      for (int64_t H : {1, 17, 64, 100}) {
        const bool is_dense = sizes.front() == sizes.back();
        const int64_t I = H == 64 ? 64 : H / 2 + 3;
        for (int D : {1, 2}) {
          check_agreement<float>(cell, {sizes, I, H, H, D, is_dense, H != 17, H != 64}, 1e-4);
          check_agreement<double>(cell, {sizes, I, H, H, D, is_dense, H == 17, H == 64}, 1e-11);
          if (projectable && H > 1) {
            check_agreement<float>(cell, {sizes, I, H, H / 2, D, is_dense, true, true}, 1e-4);
          }
        }
      }
    }
    // More rows, units and inputs than one block of the products.
    check_agreement<float>(cell, {dense(31, 9), 300, 140, 140, 1, true, true, true}, 1e-4);
    // Few sequences and wide layers: the plan that shares units.
    check_agreement<float>(cell, {dense(3, 1), 8, 520, 520, 1, true, true, true}, 1e-4);
    // Gradients that end, at another step in each sequence.
    for (int D : {1, 2}) {
      check_agreement<float>(cell, {dense(250, 3), 5, 17, 17, D, true, false, true, true}, 1e-4);
    }
    // Also where a group runs one direction after the other.
    for (int D : {1, 2}) {
      check_agreement<float>(cell, {dense(190, 1), 8, 264, 264, D, true, false, true, true}, 1e-4,
                             {1, 2, 3}, true);
    }
    // Many more threads than cores: groups of several threads, and branches of the barrier.
    if (threading()) {
      const std::vector<int> teams = {1, 3, 7, 16, 64};
      check_agreement<float>(cell, {dense(3, 4), 8, 520, 520, 2, true, true, true}, 1e-4, teams,
                             true);
      check_agreement<float>(cell, {{5, 5, 4, 1}, 90, 300, 300, 1, false, true, true}, 1e-4, teams,
                             true);
    }
  }
  std::printf("%d checks passed on %s, %s\n", g_checks, names.c_str(),
              threading() ? threading() : "one thread");
}
