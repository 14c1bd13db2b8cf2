// What the AVX-512 tiers share: 16 lanes, the turn of 16 × 16 words, and the float32 kernel,
// for a weight in any format.
#pragma once

#include <immintrin.h>

#include "linear/loops.h"

namespace qnn {
namespace {

// A mask of the first `count` bytes or words, count < 64.
inline __mmask64 first(int64_t count) { return (uint64_t{1} << count) - 1; }

// Wraps, as long rows want it; in _mm512_reduce_add_epi32 of GCC that is undefined.
inline int32_t sum(__m512i v) {
  const __m256i h = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

struct Avx512 {
  using Session = NoSession;
  // TOPS of one Zen 4 core (peak 0.47) at 512x768x768, 512x3072x768, 512x4096x4096, bfloat16, bias:
  //   tile of 4 groups  0.391 0.396 0.401    chunk of 48   0.398 0.418 0.411
  //   8 groups          0.403 0.408 0.417    chunk of 96   0.409 0.421 0.414
  //   16 groups         0.409 0.421 0.414    chunk of 192  0.407 0.413 0.409
  static constexpr int64_t kTileGroups = 16, kChunk = 96;
  static constexpr int64_t kTileBytes = 1 << 20;  // the second-level cache
  // µs of two cores: the dot form at M = 8, 9, 12 takes 22, 25, 30 for 768x768 and 760, 852, 1038
  // for 4096x4096; the blocked form at 9 to 16 takes 36 and 1100.
  static constexpr int64_t kDotRows = 12, kDotColumns = 4;
  // 24 sums; with the rows of x and a word of w at most 29 of 32 registers.
  static constexpr int kPanelRows[4] = {24, 12, 8, 6};

  static void transpose(const void* from, int64_t in_stride, void* to, int64_t out_stride) {
    const char* in = static_cast<const char*>(from);
    char* out = static_cast<char*>(to);
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = read<__m512i>(in + i * in_stride);
    // Words, pairs of words, quarters: each step turns blocks of twice the size.
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 q + j] holds column j of each 4 × 4 block of rows 4 q … 4 q + 3.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
      b[4 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
      b[8 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
      b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      write(out + j * out_stride, _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88));
      write(out + (4 + j) * out_stride, _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0x88));
      write(out + (8 + j) * out_stride, _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd));
      write(out + (12 + j) * out_stride, _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0xdd));
    }
  }
};

struct Avx512Machine : Avx512 {
  static constexpr int64_t kDepth = 256, kWordStep = 16;
  static float sum(vfloat s) { return _mm512_reduce_add_ps((__m512)s); }
};

struct Int8Codes : InOrder {
  static void decode(const WeightRow& w, int64_t i, int64_t left, vfloat* v, State) {
    const __mmask16 there = static_cast<__mmask16>(left < 16 ? first(left) : 0xffff);
    v[0] =
        (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, w.codes + i)));
  }
};

struct E4m3Codes : E4m3Pairs {
  static void arrange(float* x, int64_t count) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int64_t i = 0; i < count; i += 32) {
      const __m512 a = read<__m512>(x + i), b = read<__m512>(x + i + 16);
      write(x + i, _mm512_permutex2var_ps(a, even, b));
      write(x + i + 16, _mm512_permutex2var_ps(a, odd, b));
    }
  }
  static void natural(vfloat* v) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 even = (__m512)v[0], odd = (__m512)v[1];
    v[0] = (vfloat)_mm512_permutex2var_ps(even, low, odd);
    v[1] = (vfloat)_mm512_permutex2var_ps(even, high, odd);
  }
};

// A block is eight bytes, sent to all pairs of lanes; each lane moves its code to the low bits, and
// the permutation looks at no others. So the lanes hold codes 0, 8, 1, 9, … 7, 15. In order it
// would take one instruction more: 8.4 M codes times one row 486 µs instead of 337, on one Zen 4
// core.
struct E2m1Codes : InOrder {
  static void decode(const WeightRow& w, int64_t i, int64_t, vfloat* v, State) {
    const __m512i shifts =
        _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
    const __m512i codes =
        _mm512_srlv_epi32(_mm512_set1_epi64(read<int64_t>(w.codes + i / 2)), shifts);
    const __m512 values = _mm512_permutexvar_ps(codes, _mm512_loadu_ps(kE2m1));
    v[0] = (vfloat)values * splat(kE4m3.values[w.scales[i / kBlock]]);
  }
  static void arrange(float* x, int64_t count) {
    const __m512i order = _mm512_set_epi32(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    for (int64_t i = 0; i < count; i += 16)
      write(x + i, _mm512_permutexvar_ps(order, read<__m512>(x + i)));
  }
  static void natural(vfloat* v) {
    const __m512i order = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    v[0] = (vfloat)_mm512_permutexvar_ps(order, (__m512)v[0]);
  }
};

using Avx512Float = FloatTier<Avx512Machine, Int8Codes, E4m3Codes, E2m1Codes>;

}  // namespace
}  // namespace qnn
