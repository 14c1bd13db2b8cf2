// AVX-VNNI: vpdpbusd on 256 bits, for CPUs without AVX-512 (Alder Lake, Sierra Forest, …). The
// arithmetic is avx512_vnni.cpp's. With AVX-512-VNNI's own 256-bit form (QNN_EVEX) the same source
// runs where a test has no such CPU.
#define QNN_LANES 8
#include <cpuid.h>

#include "avx2.h"
#include "tiers.h"

namespace qnn {
namespace {

#ifdef QNN_EVEX
inline __m256i dpbusd(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(sum, w, x); }
#else
inline __m256i dpbusd(__m256i sum, __m256i w, __m256i x) {
  return _mm256_dpbusd_avx_epi32(sum, w, x);
}
#endif

struct Vnni256 : Avx2 {
  using Code = int8_t;
  static constexpr bool kQuantizes = true;
  using Panel = uint8_t;
  using Acc = int32_t;
  using Sum = vint;
  static constexpr int64_t kGroup = 4, kOffset = 128, kDepth = 1024, kWordStep = 1;

  static __m256i unsign(__m256i w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }

  static void fill_panel(Panel* to, const int8_t* w, int64_t depth) {
    for (int64_t i = 0; i < depth; i += 32)
      write(to + i, unsign(read_some<__m256i>(w + i, depth - i)));
  }

  template <int R, int G>
  QNN_KERNEL static void block(const Product<Vnni256>& p) {
    __m256i sums[R][G];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int g = 0; g < G; ++g) sums[r][g] = read<__m256i>(p.acc + r * p.acc_stride + g * 8);
    }
    for (int64_t word = 0; word < p.words; ++word) {
      __m256i rows[G];
#pragma GCC unroll 3
      for (int g = 0; g < G; ++g) rows[g] = read<__m256i>(p.x + g * p.x_stride + word * kGroup * 8);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m256i column = _mm256_set1_epi32(
            read<int32_t>(p.panel + r * Blocked<Vnni256>::kPanelStride + word * 4));
#pragma GCC unroll 3
        for (int g = 0; g < G; ++g) sums[r][g] = dpbusd(sums[r][g], column, rows[g]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int g = 0; g < G; ++g) write(p.acc + r * p.acc_stride + g * 8, sums[r][g]);
    }
  }

  template <int R>
  QNN_KERNEL static void dot(const Code* x, int64_t stride, const int8_t* const* w, int64_t k,
                             Acc* acc) {
    __m256i sums[R][kDotColumns];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kDotColumns; ++c) sums[r][c] = _mm256_setzero_si256();
    }
    for (int64_t i = 0; i < k; i += 32) {
#pragma GCC unroll 4
      for (int c = 0; c < kDotColumns; ++c) {
        const __m256i column = unsign(read_some<__m256i>(w[c] + i, k - i));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sums[r][c] = dpbusd(sums[r][c], column, read<__m256i>(x + r * stride + i));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kDotColumns; ++c) acc[r * kChunk + c] = sum(sums[r][c]);
    }
  }
};

bool runs_here() {
#ifdef QNN_EVEX
  return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
#endif
}

}  // namespace

extern const Tier avx_vnni = {"avx_vnni", runs_here, kernel<Vnni256>(), kernel<Avx2Float>(),
                              quantize};

}  // namespace qnn
