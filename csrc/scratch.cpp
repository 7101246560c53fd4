// The pool of scratch blocks. It takes the smallest block that fits a request, and evicts the
// oldest ones above a total size.
#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace fastrnn {

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
// The total size of the pool, and how many times larger than a request a reused block may be.
constexpr size_t kMaxPooled = size_t{1} << 30;
constexpr size_t kMaxWaste = 4;

struct Block {
  void* data;
  size_t capacity;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;  // oldest first
  size_t bytes = 0;
};

// Never destroyed: a tensor may outlive every static object and still return its memory.
Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

std::atomic<bool> g_poison{false};

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

void* allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, bytes >= kHugePage ? kHugePage : kPage, bytes)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return p;
}

}  // namespace

Scratch::Scratch(size_t bytes) : size_(bytes) {
  if (bytes > PTRDIFF_MAX - kHugePage) throw std::bad_alloc();
  const size_t needed = round_up(std::max<size_t>(bytes, 1), kPage);
  // try_lock: a child forked while another thread held the mutex must not wait for it.
  Pool& p = pool();
  if (std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock); lock) {
    auto best = p.blocks.end();
    for (auto it = p.blocks.begin(); it != p.blocks.end(); ++it) {
      if (it->capacity >= needed && it->capacity / kMaxWaste <= needed &&
          (best == p.blocks.end() || it->capacity < best->capacity)) {
        best = it;
      }
    }
    if (best != p.blocks.end()) {
      data_ = best->data;
      capacity_ = best->capacity;
      p.bytes -= capacity_;
      p.blocks.erase(best);
    }
  }
  if (!data_) {
    data_ = allocate(needed);
    capacity_ = needed;
  }
  if (g_poison.load(std::memory_order_relaxed)) std::memset(data_, 0xff, capacity_);
}

Scratch::~Scratch() {
  Pool& p = pool();
  std::vector<Block> evicted;  // freed below: that may take long, and other threads need the mutex
  if (std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
      lock && capacity_ <= kMaxPooled) {
    try {
      auto first = p.blocks.begin();
      size_t bytes = p.bytes + capacity_;
      for (; bytes > kMaxPooled; ++first) bytes -= first->capacity;
      evicted.assign(p.blocks.begin(), first);
      p.blocks.push_back({data_, capacity_});
      p.blocks.erase(p.blocks.begin(),
                     p.blocks.begin() + static_cast<std::ptrdiff_t>(evicted.size()));
      p.bytes = bytes;
      data_ = nullptr;
    } catch (const std::bad_alloc&) {
      evicted.clear();
    }
  }
  for (const Block& block : evicted) std::free(block.data);
  std::free(data_);
}

void Scratch::release() {
  Pool& p = pool();
  const std::unique_lock<std::mutex> lock(p.mutex, std::try_to_lock);
  if (!lock) return;
  for (const Block& block : p.blocks) std::free(block.data);
  p.blocks.clear();
  p.bytes = 0;
}

void Scratch::poison(bool on) { g_poison.store(on); }

}  // namespace fastrnn
