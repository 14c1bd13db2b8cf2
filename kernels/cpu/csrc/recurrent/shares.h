// The shares of a call that threads do, which wait for each other between its steps.
#pragma once

#include <sched.h>

#include "recurrent/recurrent_call.h"

namespace qnn {
namespace {

inline void meet(const Members& m) {
  const int mine = m.end - m.begin;
  if (mine == m.shares) return;
  Meeting& at = *m.meeting;
  const unsigned round = __atomic_load_n(&at.round, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&at.arrived, mine, __ATOMIC_ACQ_REL) == m.shares) {
    __atomic_store_n(&at.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&at.round, round + 1, __ATOMIC_RELEASE);
    return;
  }
  // Some 10 µs; then another process may want the core that the last share waits for.
  constexpr int kSpins = 500;
  for (int spin = 0; __atomic_load_n(&at.round, __ATOMIC_ACQUIRE) == round; ++spin) {
    if (spin > kSpins) {
      sched_yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  }
}

// A run of blocks, or of rows, of all that there are.
struct Run {
  int64_t begin, end;
};

// What of `all` each share is, where a unit of work is `group` of them, the last perhaps fewer.
struct Shares {
  int64_t all, group;
  int count;
  Run of(int share) const {
    const int64_t groups = div_up(all, group);
    const auto at = [&](int64_t i) { return smaller(groups * i / count * group, all); };
    return {at(share), at(share + 1)};
  }
};

}  // namespace
}  // namespace qnn
