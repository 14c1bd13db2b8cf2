// Threads, which are torch's own, and the memory of each.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "ops/arguments.h"

namespace qnn {

struct NoMemory : std::bad_alloc {
  explicit NoMemory(size_t bytes) : bytes(bytes) {}
  size_t bytes;
};

// `work()`, where the call's arguments say what there was no memory for.
template <class Work>
void with_memory(const Arguments& args, const Work& work) {
  try {
    work();
  } catch (const NoMemory& error) {
    args.no_memory(static_cast<double>(error.bytes), "the memory of a thread");
  }
}

// Memory of a thread, kept between its calls up to kKept bytes.
inline char* scratch_of_this_thread(size_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local size_t size = 0;
  constexpr size_t kKept = size_t{8} << 20;
  if (size < bytes || (size > kKept && bytes <= kKept)) {
    memory.reset();
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, size)));
    if (memory == nullptr) {
      const size_t wanted = std::exchange(size, 0);
      throw NoMemory(wanted);
    }
  }
  return memory.get();
}

// All of torch's threads at most, and no more than the work is worth.
inline int parts_of(int64_t worth) {
  if (worth <= 1) return 1;
  const int64_t threads = torch::stable::get_num_threads();
  return static_cast<int>(std::clamp<int64_t>(threads, 1, worth));
}

// `work(part, parts)` on torch's threads.
template <class Work>
void share(int64_t worth, const Work& work) {
  const int parts = parts_of(worth);
  if (parts == 1) return work(0, 1);
  // An exception would lose its type and words on its way through torch's interface.
  std::exception_ptr failed;
  std::once_flag first;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t part = begin; part < end; ++part) work(static_cast<int>(part), parts);
    } catch (...) {
      std::call_once(first, [&] { failed = std::current_exception(); });
    }
  });
  if (failed) std::rethrow_exception(failed);
}

// `work(begin, end, parts, scratch)`, all at the same time, with one memory for all of
// `bytes(parts)`. Torch may give a thread several parts; it does so inside of another parallel
// region, where one thread gets them all.
template <class Bytes, class Work>
void share_memory(int64_t worth, const Bytes& bytes, const Work& work) {
  const int parts = parts_of(worth);
  char* scratch = scratch_of_this_thread(bytes(parts));
  if (parts == 1) return work(0, 1, 1, scratch);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    work(static_cast<int>(begin), static_cast<int>(end), parts, scratch);
  });
}

}  // namespace qnn
