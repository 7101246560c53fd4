// The peak rates of this machine: multiply-adds, and reading from each level of memory, on several
// threads at once. Prints JSON. Usage: probe THREADS [flops]
// With "flops", only the multiply-adds, which takes a fifth of a second.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

volatile float g_sink;
alignas(64) float g_factors[2] = {0.999f, 1e-7f};

// A loop over independent chains of multiply-adds, enough of them to hide the latency.
template <class V, int kChains>
[[gnu::always_inline]] inline double multiply_adds(int64_t rounds) {
  V sum[kChains];
  // The compiler would compute chains with equal initial values only once.
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) sum[c] = V{} + 1e-3f * c;
  for (int64_t i = 0; i < rounds; ++i) {
    // The factors are read in each round, or the compiler would merge the rounds.
    asm volatile("" : : : "memory");
    const V a = V{} + g_factors[0], b = V{} + g_factors[1];
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sum[c] = sum[c] * a + b;
  }
  float total = 0;
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) total += sum[c][0];
  g_sink = total;
  return 2.0 * rounds * kChains * (sizeof(V) / sizeof(float));
}

// Sums a buffer, read in order.
template <class V>
[[gnu::always_inline]] inline double read_all(const float* p, int64_t count, int64_t rounds) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  typedef V Unaligned __attribute__((aligned(4), may_alias));
  V sum[8] = {};
  for (int64_t r = 0; r < rounds; ++r) {
    for (int64_t i = 0; i + 8 * kLanes <= count; i += 8 * kLanes) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        sum[k] += *reinterpret_cast<const Unaligned*>(p + i + k * kLanes);
      }
    }
  }
  float total = 0;
  for (V& s : sum) total += s[0];
  g_sink = total;
  return 4.0 * rounds * count;
}

#define KERNELS(NAME, BYTES)                                                        \
  typedef float NAME##_v __attribute__((vector_size(BYTES)));                       \
  double NAME##_fma(int64_t rounds) { return multiply_adds<NAME##_v, 12>(rounds); } \
  double NAME##_read(const float* p, int64_t n, int64_t r) { return read_all<NAME##_v>(p, n, r); }

#if defined(__clang__)
#define BEGIN_TARGET(FEATURES) \
  PRAGMA(clang attribute push(__attribute__((target(FEATURES))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#define WIDEST
#else
#define BEGIN_TARGET(FEATURES) PRAGMA(GCC push_options) PRAGMA(GCC target(FEATURES))
#define END_TARGET PRAGMA(GCC pop_options)
#define WIDEST ",prefer-vector-width=512"
#endif
#define PRAGMA(...) _Pragma(#__VA_ARGS__)

#if defined(__x86_64__)
BEGIN_TARGET("avx2,fma,avx512f" WIDEST)
KERNELS(avx512, 64)
END_TARGET
BEGIN_TARGET("avx2,fma")
KERNELS(avx2, 32)
END_TARGET
#endif
KERNELS(generic, 16)

struct Kernels {
  const char* name;
  double (*fma)(int64_t);
  double (*read)(const float*, int64_t, int64_t);
};

Kernels best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {"avx512", avx512_fma, avx512_read};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {"avx2", avx2_fma, avx2_read};
  }
#endif
  return {"generic", generic_fma, generic_read};
}

// Units per second of all threads together: the best of several trials in which all run at once.
template <class Work>
double rate(int threads, const Work& work) {
  double best = 0;
  for (int trial = 0; trial < 7; ++trial) {
    std::atomic<int> ready{0};
    std::vector<double> rates(threads);
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t) {
      team.emplace_back([&, t] {
        work(t, 1);
        ++ready;
        while (ready < threads) std::this_thread::yield();
        const auto start = Clock::now();
        double done = 0, elapsed = 0;
        while ((elapsed = seconds_since(start)) < 0.03) done += work(t, 4);
        rates[t] = done / elapsed;
      });
    }
    for (std::thread& t : team) t.join();
    double sum = 0;
    for (double r : rates) sum += r;
    best = std::max(best, sum);
  }
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  const Kernels kernels = best();
  const double flops =
      rate(threads, [&](int, int64_t repeats) { return kernels.fma(repeats * 100000); });
  std::printf("{\"isa\": \"%s\", \"threads\": %d, \"flops\": %.4g, \"read\": [", kernels.name,
              threads, flops);
  const char* separator = "";
  const bool read = argc < 3 || std::strcmp(argv[2], "flops") != 0;
  // Each thread reads its own part of one buffer, as it would read a weight matrix.
  for (int64_t bytes = 32 << 10; read && bytes <= int64_t{128} << 20; bytes *= 2) {
    std::vector<float> buffer(bytes / sizeof(float), 1.0f);
    const int64_t part = static_cast<int64_t>(buffer.size()) / threads;
    const int64_t rounds = std::max<int64_t>(1, (int64_t{1} << 20) / bytes);
    const double speed = rate(threads, [&](int t, int64_t repeats) {
      return kernels.read(buffer.data() + t * part, part, rounds * repeats);
    });
    std::printf("%s[%lld, %.4g]", separator, static_cast<long long>(bytes), speed);
    separator = ", ";
  }
  std::printf("]}\n");
}
