// The contention budget: whether other programs use the cores, estimated from the time that threads
// lost in waiting for each other.
#pragma once

#include <chrono>

namespace fastrnn {

// Whether short work should run on one thread for now.
bool cores_are_contended();

// Accounts for one parallel region: `threads` threads shared work for `took`, and each lost `lost`
// of it to waiting.
void update_contention(int threads, std::chrono::nanoseconds took, std::chrono::nanoseconds lost);

}  // namespace fastrnn
