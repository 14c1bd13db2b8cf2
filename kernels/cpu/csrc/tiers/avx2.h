// What the AVX2 tiers share: 8 lanes, the turn of 8 × 8 words, and the float32 kernel,
// for a weight in any format.
#pragma once

#include <immintrin.h>

#include "linear/loops.h"

namespace qnn {
namespace {

template <class V>
inline V read_some(const int8_t* p, int64_t left) {
  return bytes_of<V>(reinterpret_cast<const uint8_t*>(p), left);
}

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

struct Avx2Machine : Avx2 {
  // Two columns: four times four sums leave no register to decode in.
  static constexpr int64_t kDepth = 256, kWordStep = 8, kDotColumns = 2;
  static float sum(vfloat s) { return qnn::sum((__m256)s); }
};

struct Int8Codes : InOrder {
  static void decode(const WeightRow& w, int64_t i, int64_t left, vfloat* v, State) {
    const __m128i bytes = _mm_cvtsi64_si128(bytes_of<int64_t>(w.codes + i, left));
    v[0] = (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
};

struct E4m3Codes : E4m3Pairs {
  // Between neighbours side by side and neighbours in two vectors, in each half of a vector.
  static __m256 quarters(__m256 v) { return (__m256)_mm256_permute4x64_epi64((__m256i)v, 0xd8); }
  static void arrange(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
      const __m256 a = read<__m256>(x + i), b = read<__m256>(x + i + 8);
      write(x + i, quarters(_mm256_shuffle_ps(a, b, 0x88)));
      write(x + i + 8, quarters(_mm256_shuffle_ps(a, b, 0xdd)));
    }
  }
  static void natural(vfloat* v) {
    const __m256 even = quarters((__m256)v[0]), odd = quarters((__m256)v[1]);
    v[0] = (vfloat)_mm256_unpacklo_ps(even, odd);
    v[1] = (vfloat)_mm256_unpackhi_ps(even, odd);
  }
};

// Half a block is four bytes, sent to all lanes; each lane moves its code to the low bits, of which
// the permutation looks at three, and its sign to the top.
struct E2m1Codes : InOrder {
  static void decode(const WeightRow& w, int64_t i, int64_t, vfloat* v, State) {
    const __m256i shifts = _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    const __m256i codes =
        _mm256_srlv_epi32(_mm256_set1_epi32(read<int32_t>(w.codes + i / 2)), shifts);
    const __m256 magnitudes = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kE2m1), codes);
    const __m256i signs = _mm256_slli_epi32(_mm256_srli_epi32(codes, 3), 31);
    v[0] = (vfloat)_mm256_xor_ps(magnitudes, (__m256)signs) *
           splat(kE4m3.values[w.scales[i / kBlock]]);
  }
};

using Avx2Float = FloatTier<Avx2Machine, Int8Codes, E4m3Codes, E2m1Codes>;

}  // namespace
}  // namespace qnn
