// What this machine can do at most, for the shares and the roofline of bench_linear.py.
//
//   peaks THREADS BYTES...
//
// prints a line a figure: "int8 avx512_vnni 9.4e11", operations a second of that instruction on
// registers, and "read 400000000 4.1e10", bytes a second when all threads together read so many,
// each its own part, over and over. Built by peaks.py with -march=native: an instruction set is
// measured where both the compiler and the CPU have it. Every figure is the best of several runs.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Neither inlined nor specialised for the arguments of a call: the loop runs as it stands here.
#ifdef __clang__
#define ALONE __attribute__((noinline))
#else
#define ALONE __attribute__((noipa))
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Seconds until the last of the threads has done work(thread, rounds); all begin together, after
// prepare(thread).
template <class Prepare, class Work>
double timed(int threads, int64_t rounds, const Prepare& prepare, const Work& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      prepare(t);
      ++ready;
      while (!go) {
      }
      work(t, rounds);
    });
  }
  while (ready < threads) std::this_thread::yield();
  const auto start = Clock::now();
  go = true;
  for (auto& thread : pool) thread.join();
  return seconds_since(start);
}

// Rounds a second, each thread doing all of them: the best of kRuns runs of about kSeconds.
template <class Prepare, class Work>
double best_rate(int threads, const Prepare& prepare, const Work& work) {
  constexpr int kRuns = 7;
  constexpr double kSeconds = 0.1;
  int64_t rounds = 1;
  double seconds = timed(threads, rounds, prepare, work);
  while (seconds < kSeconds / 5) {
    rounds *= 4;
    seconds = timed(threads, rounds, prepare, work);
  }
  rounds = std::max<int64_t>(1, static_cast<int64_t>(rounds * kSeconds / seconds));
  double best = 0;
  for (int run = 0; run < kRuns; ++run) {
    best = std::max(best, rounds / timed(threads, rounds, prepare, work));
  }
  return best;
}

// -- int8 products on registers
// --------------------------------------------------------------------

// An instruction set: kOperations of one `step`, multiplications and additions alike, on one of
// kSums accumulators. There are more of those than an instruction takes cycles, times the
// instructions that start in a cycle. Each begins with another value, since the compiler merges
// equal ones, and an empty asm statement that may have changed an operand keeps each step apart.
template <class Set>
ALONE void multiply(int64_t rounds) {
  typename Set::Vector sums[Set::kSums], left = Set::filled(1), right = Set::filled(2);
#pragma GCC unroll 16
  for (int i = 0; i < Set::kSums; ++i) sums[i] = Set::filled(i);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < Set::kSums; ++i) {
      asm volatile("" : "+v"(left));
      sums[i] = Set::step(sums[i], left, right);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Set::kSums; ++i) asm volatile("" : : "v"(sums[i]));
}

template <class Set>
void measure_products(int threads) {
  const auto nothing = [](int) {};
  const double rate =
      best_rate(threads, nothing, [](int, int64_t rounds) { multiply<Set>(rounds); });
  std::printf("int8 %s %.6g\n", Set::kName, rate * threads * Set::kSums * Set::kOperations);
}

#ifdef __AVX512VNNI__
struct Avx512Vnni {  // 64 products, each added
  using Vector = __m512i;
  static constexpr const char* kName = "avx512_vnni";
  static constexpr int kSums = 16, kOperations = 2 * 64;
  static Vector filled(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static Vector step(Vector sum, Vector left, Vector right) {
    return _mm512_dpbusd_epi32(sum, left, right);
  }
};
#endif

#ifdef __AVXVNNI__
struct AvxVnni {  // 32 products, each added; the 16 registers hold 12 sums and the operands
  using Vector = __m256i;
  static constexpr const char* kName = "avx_vnni";
  static constexpr int kSums = 12, kOperations = 2 * 32;
  static Vector filled(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static Vector step(Vector sum, Vector left, Vector right) {
    return _mm256_dpbusd_avx_epi32(sum, left, right);
  }
};
#endif

#ifdef __AVX2__
struct Avx2 {  // 16 products of bytes widened to 16 bits, each added: vpmaddwd and vpaddd
  using Vector = __m256i;
  static constexpr const char* kName = "avx2";
  static constexpr int kSums = 12, kOperations = 2 * 16;
  static Vector filled(int value) { return _mm256_set1_epi16(static_cast<short>(value)); }
  static Vector step(Vector sum, Vector left, Vector right) {
    Vector product = _mm256_madd_epi16(left, right);
    asm volatile("" : "+v"(product));  // no fusing to vpdpwssd, which AVX2 does not have
    return _mm256_add_epi32(sum, product);
  }
};
#endif

#ifdef __AMX_INT8__
// Six sums and two operands fill the eight tiles; a product of tiles is 16 x 16 x 64.
ALONE void multiply_tiles(int64_t rounds) {
  alignas(64) uint8_t config[64] = {1};
  for (int tile = 0; tile < 8; ++tile) {
    config[16 + 2 * tile] = 64;  // bytes of a row
    config[48 + tile] = 16;      // rows
  }
  _tile_loadconfig(config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbssd(0, 6, 7);
    _tile_dpbssd(1, 6, 7);
    _tile_dpbssd(2, 6, 7);
    _tile_dpbssd(3, 6, 7);
    _tile_dpbssd(4, 6, 7);
    _tile_dpbssd(5, 6, 7);
  }
  _tile_release();
}

void measure_tiles(int threads) {
  // Linux lets a process use the tiles once it has asked: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return;
  constexpr double kOperations = 6 * 2.0 * 16 * 16 * 64;
  const auto nothing = [](int) {};
  const double rate =
      best_rate(threads, nothing, [](int, int64_t rounds) { multiply_tiles(rounds); });
  std::printf("int8 amx %.6g\n", rate * threads * kOperations);
}
#endif

// -- reading memory
// --------------------------------------------------------------------------------

typedef uint64_t Line __attribute__((vector_size(64), aligned(64)));

// All `lines`, in `kStreams` places at once: how many places the prefetchers like differs.
template <int kStreams>
ALONE void read_once(const Line* lines, size_t count) {
  const size_t part = count / kStreams;
  Line sums[kStreams] = {};
  for (size_t i = 0; i < part; ++i) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
      __builtin_prefetch(lines + s * part + i + 16);
      sums[s] += lines[s * part + i];
    }
  }
  for (size_t i = part * kStreams; i < count; ++i) sums[0] += lines[i];
#pragma GCC unroll 8
  for (int s = 1; s < kStreams; ++s) sums[0] += sums[s];
  // Volatile, not in a register: without AVX-512 a line has no register of its own.
  volatile uint64_t kept = 0;
  for (int i = 0; i < 8; ++i) kept = kept + sums[0][i];
}

using Read = void (*)(const Line*, size_t);

double read_rate(int threads, size_t bytes) {
  const size_t part = bytes / threads / sizeof(Line) * sizeof(Line);
  std::vector<void*> parts(threads, nullptr);
  // Each thread touches its own part first, which decides whose memory that is.
  const auto touch = [&](int t) {
    if (parts[t] != nullptr) return;
    parts[t] = std::aligned_alloc(4096, (part + 4095) / 4096 * 4096);
    if (parts[t] == nullptr) std::abort();
    std::memset(parts[t], t + 1, part);
  };
  double best = 0;
  for (const Read read : {Read{read_once<1>}, Read{read_once<2>}, Read{read_once<4>}}) {
    best = std::max(best, best_rate(threads, touch, [&](int t, int64_t rounds) {
                      const Line* lines = static_cast<const Line*>(parts[t]);
                      for (int64_t i = 0; i < rounds; ++i) read(lines, part / sizeof(Line));
                    }));
  }
  for (void* memory : parts) std::free(memory);
  return best * static_cast<double>(part) * threads;
}

}  // namespace

int main(int count, char** words) {
  if (count < 2 || std::atoi(words[1]) < 1) return 2;
  const int threads = std::atoi(words[1]);
#ifdef __AMX_INT8__
  measure_tiles(threads);
#endif
#ifdef __AVX512VNNI__
  measure_products<Avx512Vnni>(threads);
#endif
#ifdef __AVXVNNI__
  measure_products<AvxVnni>(threads);
#endif
#ifdef __AVX2__
  measure_products<Avx2>(threads);
#endif
  for (int i = 2; i < count; ++i) {
    std::printf("read %s %.6g\n", words[i],
                read_rate(threads, std::strtoull(words[i], nullptr, 10)));
  }
}
