// Threads, which are torch's own, and the memory of each.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace qnn {

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
      size = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

// `work(part, parts)` on torch's threads: all of them at most, and no more than the work is worth.
template <class Work>
void share(int64_t worth, const Work& work) {
  const int64_t threads = torch::stable::get_num_threads();
  const int parts = static_cast<int>(std::clamp<int64_t>(worth, 1, std::max<int64_t>(threads, 1)));
  if (parts == 1) return work(0, 1);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) work(static_cast<int>(part), parts);
  });
}

}  // namespace qnn
