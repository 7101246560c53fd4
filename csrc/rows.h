// Which rows belong to which step. Rows are in time-major order; a packed batch is sorted by
// length, so that row r of a step is always sequence r.
#pragma once

#include <cstdint>
#include <vector>

namespace fastrnn {

struct Rows {
  int64_t T = 0;
  int64_t B = 0;
  int64_t N = 0;
  std::vector<int64_t> offsets;  // [T + 1] first row of each step; empty if dense
  std::vector<int64_t> lengths;  // [B] steps of each sequence; empty if dense

  // batch_sizes [T] int64, or null for a dense batch of N / B steps. Throws std::invalid_argument.
  Rows(int64_t N, int64_t B, const int64_t* batch_sizes, int64_t T);

  int64_t offset(int64_t t) const { return offsets.empty() ? t * B : offsets[t]; }
  int64_t size(int64_t t) const { return offsets.empty() ? B : offsets[t + 1] - offsets[t]; }
  int64_t length(int64_t r) const { return lengths.empty() ? T : lengths[r]; }
};

}  // namespace fastrnn
