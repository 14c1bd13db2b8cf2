// What the AVX-512 tiers share: 16 lanes, the turn of 16 × 16 words, sums over lanes.
#pragma once

#include <immintrin.h>

#include "common/scratch.h"
#include "common/vec.h"

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
  using Turns = Avx512;
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

}  // namespace
}  // namespace qnn
