// What the AVX2 tiers share: 8 lanes, the turn of 8 × 8 words, sums over lanes.
#pragma once

#include <immintrin.h>

#include "common/scratch.h"
#include "common/vec.h"

namespace qnn {
namespace {

inline int32_t sum(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

inline float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

struct Avx2 {
  using Turns = Avx2;
  using Session = NoSession;
  static constexpr int64_t kTileGroups = 16, kTileBytes = 1 << 18, kChunk = 96, kDotRows = 4,
                           kDotColumns = 4;
  // 12 sums; with the rows of x, a word of w and a product at most 16 registers.
  static constexpr int kPanelRows[2] = {12, 6};

  static void transpose(const void* from, int64_t in_stride, void* to, int64_t out_stride) {
    const char* in = static_cast<const char*>(from);
    char* out = static_cast<char*>(to);
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = read<__m256>(in + i * in_stride);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      write(out + j * out_stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
      write(out + (4 + j) * out_stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
    }
  }
};

// Both operands widened to 16 bits; a product adds pairs.
struct Avx2Words : Avx2 {
  using Code = int16_t;
  using Panel = int16_t;
  static constexpr bool kQuantizes = true;
  static constexpr int64_t kGroup = 2, kOffset = 0, kDepth = 512, kWordStep = 8;

  static void fill_panel(Panel* to, const int8_t* w, int64_t depth) {
    for (int64_t i = 0; i < depth; i += 16)
      write(to + i, _mm256_cvtepi8_epi16(bytes_of<__m128i>(w + i, depth - i)));
  }
  static vint column(const int8_t* w, int64_t left) {
    return (vint)_mm256_cvtepi8_epi16(bytes_of<__m128i>(w, left));
  }
  static int32_t sum(vint s) { return qnn::sum((__m256i)s); }
};

struct Avx2Machine : Avx2 {
  // Two columns: four times four sums leave no register to decode in.
  static constexpr int64_t kDepth = 256, kWordStep = 8, kDotColumns = 2;
  static float sum(vfloat s) { return qnn::sum((__m256)s); }
};

}  // namespace
}  // namespace qnn
