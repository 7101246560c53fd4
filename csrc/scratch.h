// Scratch memory: blocks that are reused from call to call, and an allocator that lays out one
// block.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastrnn {

// A block from a pool, so that a warm call maps no pages: mapping a fresh buffer of tens of MB
// costs as much as the arithmetic that fills it. Aligned and advised for huge pages.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }
  size_t size() const { return size_; }
  // Whether to fill every block with NaN, so that reading memory that was never written shows in
  // the results.
  static void poison(bool on);
  // Frees the blocks of the pool, which are those not in use.
  static void release();

 private:
  void* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

// Hands out aligned parts of one block. The same calls are made twice: without a base, to add up
// the bytes, and then with the block.
class BumpAllocator {
 public:
  explicit BumpAllocator(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 127) / 128 * 128;
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace fastrnn
