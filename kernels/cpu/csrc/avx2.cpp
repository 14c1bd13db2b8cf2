// AVX2 without VNNI. Its byte product adds pairs in saturating 16 bits, and so gives wrong sums;
// here both operands are widened to 16 bits, and vpmaddwd adds pairs of exact products.
#define QNN_LANES 8
#include "avx2.h"

#include "tiers.h"

namespace qnn {
namespace {

struct Madd : Avx2 {
  using Code = int16_t;
  static constexpr bool kQuantizes = true;
  using Panel = int16_t;
  using Acc = int32_t;
  using Sum = vint;
  static constexpr int64_t kGroup = 2, kOffset = 0, kDepth = 512, kWordStep = 1;

  static void fill_panel(Panel* to, const int8_t* w, int64_t depth) {
    for (int64_t i = 0; i < depth; i += 16)
      write(to + i, _mm256_cvtepi8_epi16(read_some<__m128i>(w + i, depth - i)));
  }

  template <int R, int G>
  QNN_KERNEL static void block(const Product<Madd>& p) {
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
        const __m256i column =
            _mm256_set1_epi32(read<int32_t>(p.panel + r * Blocked<Madd>::kPanelStride + word * 2));
#pragma GCC unroll 3
        for (int g = 0; g < G; ++g) {
          sums[r][g] = _mm256_add_epi32(sums[r][g], _mm256_madd_epi16(column, rows[g]));
        }
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
    for (int64_t i = 0; i < k; i += 16) {
#pragma GCC unroll 4
      for (int c = 0; c < kDotColumns; ++c) {
        const __m256i column = _mm256_cvtepi8_epi16(read_some<__m128i>(w[c] + i, k - i));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m256i row = read<__m256i>(x + r * stride + i);
          sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(column, row));
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kDotColumns; ++c) acc[r * kChunk + c] = sum(sums[r][c]);
    }
  }
};

bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

extern const Tier avx2 = {"avx2", runs_here, kernel<Madd>(), kernel<Avx2Float>(), quantize};

}  // namespace qnn
