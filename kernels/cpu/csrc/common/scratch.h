// Memory of a thread, and the sessions of tiers that need none.
#pragma once

#include "common/types.h"

namespace qnn {
namespace {

constexpr int64_t kLine = 64;

// A bump allocator; with no memory it only counts.
class Scratch {
 public:
  explicit Scratch(char* base) : base_(base) {}
  template <class V>
  V* take(int64_t count) {
    char* here = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(V)), kLine);
    return reinterpret_cast<V*>(here);
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

// A tier whose registers need no setting up.
struct NoSession {
  NoSession() {}
};

}  // namespace
}  // namespace qnn
