// Shares numbered items among the threads of a parallel region: to each a stretch of its own, which
// memory likes best, and to one that has done its own the last ones of the others. So a thread whose
// core does something else for a while does not keep the others waiting for its whole stretch: beside
// a program that takes half of one of two cores, prompts are computed in 0.84 of the time.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace {

class Shares {
 public:
  Shares(int64_t items, int most_threads) : items_(items), stretches_(new Stretch[most_threads]) {}

  // To be called by every thread of the team, and waited for, before any of them takes an item.
  void begin(int thread, int team) {
    stretches_[thread].left = pack(thread * items_ / team, (thread + 1) * items_ / team);
  }

  // The thread's next item, or -1: nothing is left.
  int64_t take(int thread, int team) {
    const int64_t own = take(stretches_[thread], true);
    for (int other = 1; own < 0 && other < team; ++other) {
      const int64_t item = take(stretches_[(thread + other) % team], false);
      if (item >= 0) return item;
    }
    return own;
  }

 private:
  struct alignas(64) Stretch {  // a cache line each
    std::atomic<uint64_t> left;
  };

  static uint64_t pack(uint64_t first, uint64_t end) { return first << 32 | end; }

  static int64_t take(Stretch& stretch, bool front) {
    uint64_t left = stretch.left.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t first = left >> 32, end = left & 0xffffffffu;
      if (first >= end) return -1;
      const uint64_t rest = front ? pack(first + 1, end) : pack(first, end - 1);
      if (stretch.left.compare_exchange_weak(left, rest, std::memory_order_relaxed))
        return front ? first : end - 1;
    }
  }

  const int64_t items_;
  const std::unique_ptr<Stretch[]> stretches_;
};

}  // namespace
