// AVX-512 with VNNI: vpdpbusd adds four products of an unsigned and a signed byte to each of 16
// sums, without saturation. x is the signed operand and w the unsigned one, as w + 128; the sums
// start at -128 times the sum of x's codes.
#pragma once

#include "avx512.h"

namespace qnn {
namespace {

struct Vnni : Avx512 {
  using Code = int8_t;
  static constexpr bool kQuantizes = true;
  using Panel = uint8_t;
  using Acc = int32_t;
  using Sum = vint;
  // TOPS at 512x768x768 and 512x4096x4096: a depth of 256 0.395 0.392, 512 0.400 0.405, 1024 0.409
  // 0.414, 2048 0.407 0.412.
  static constexpr int64_t kGroup = 4, kOffset = 128, kDepth = 1024, kWordStep = 16;

  static void fill_panel(Panel* to, const int8_t* w, int64_t depth) {
    const __m512i high = _mm512_set1_epi8(-128);
    int64_t i = 0;
    for (; i + 64 <= depth; i += 64) write(to + i, _mm512_xor_si512(read<__m512i>(w + i), high));
    if (i < depth)
      write(to + i, _mm512_xor_si512(_mm512_maskz_loadu_epi8(first(depth - i), w + i), high));
  }

  template <int R, int G>
  QNN_KERNEL static void block(const Product<Vnni>& p) {
    __m512i sums[R][G];
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
        sums[r][g] = _mm512_loadu_si512(p.acc + r * p.acc_stride + g * 16);
    }
    for (int64_t begin = 0; begin < p.words; begin += kWordStep) {
      if (p.next != nullptr) {
        for (int r = 0; r < R; ++r) __builtin_prefetch(p.next + r * p.next_stride + begin * kGroup);
      }
      for (int64_t word = begin; word < begin + kWordStep; ++word) {
        __m512i rows[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
          rows[g] = _mm512_loadu_si512(p.x + g * p.x_stride + word * kGroup * 16);
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) {
          const __m512i column = _mm512_set1_epi32(
              read<int32_t>(p.panel + r * Blocked<Vnni>::kPanelStride + word * 4));
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) sums[r][g] = _mm512_dpbusd_epi32(sums[r][g], column, rows[g]);
        }
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g)
        _mm512_storeu_si512(p.acc + r * p.acc_stride + g * 16, sums[r][g]);
    }
  }

  template <int R>
  QNN_KERNEL static void dot(const Code* x, int64_t stride, const int8_t* const* w, int64_t k,
                             Acc* acc) {
    const __m512i high = _mm512_set1_epi8(-128);
    if constexpr (R == 1) {
      // Row after row of w, which lie behind each other: memory gives one stream faster than
      // several.
      for (int c = 0; c < kDotColumns; ++c) {
        __m512i parts[4];
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) parts[u] = _mm512_setzero_si512();
        int64_t i = 0;
        for (; i + 256 <= k; i += 256) {
#pragma GCC unroll 4
          for (int u = 0; u < 4; ++u) {
            const __m512i column = _mm512_xor_si512(_mm512_loadu_si512(w[c] + i + u * 64), high);
            parts[u] = _mm512_dpbusd_epi32(parts[u], column, _mm512_loadu_si512(x + i + u * 64));
          }
        }
        for (; i < k; i += 64) {
          const __mmask64 mask = k - i < 64 ? first(k - i) : ~__mmask64{0};
          const __m512i column = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w[c] + i), high);
          parts[0] = _mm512_dpbusd_epi32(parts[0], column, _mm512_loadu_si512(x + i));
        }
        acc[c] = sum(_mm512_add_epi32(_mm512_add_epi32(parts[0], parts[1]),
                                      _mm512_add_epi32(parts[2], parts[3])));
      }
      return;
    }
    __m512i sums[R][kDotColumns];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kDotColumns; ++c) sums[r][c] = _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < k; i += 64) {
      const __mmask64 mask = k - i < 64 ? first(k - i) : ~__mmask64{0};
      __m512i rows[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) rows[r] = _mm512_loadu_si512(x + r * stride + i);
#pragma GCC unroll 8
      for (int c = 0; c < kDotColumns; ++c) {
        const __m512i column = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, w[c] + i), high);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], column, rows[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kDotColumns; ++c) acc[r * kChunk + c] = sum(sums[r][c]);
    }
  }
};

inline bool vnni512_runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace
}  // namespace qnn
