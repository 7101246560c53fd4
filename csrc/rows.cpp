// The checks of batch_sizes. The engine computes addresses from them, so they are complete.
#include "rows.h"

#include <stdexcept>
#include <string>

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
  // Checked before B decides how much memory is allocated.
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

}  // namespace fastrnn
