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

// Bytes as they are, in fours. vpmaddubsw adds pairs of products of an unsigned and a signed byte
// in 16 bits, where it saturates. Times codes up to 255 the weights of a lane are exact where those
// above 0 sum up to 128 at most, and so those below it: 128 · 255 = 32,640.
struct Avx2Bytes : Avx2 {
  static constexpr int64_t kGroup = 4, kMost = 128;

  static vint add_pairs(vint sum, __m256i pairs) {
    return (vint)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static vint multiply_add(vint sum, vint codes, vint weights) {
    return add_pairs(sum, _mm256_maddubs_epi16((__m256i)codes, (__m256i)weights));
  }
  static vint add_couple(vint sum, const vint* codes, const vint* weights) {
    const __m256i first = _mm256_maddubs_epi16((__m256i)codes[0], (__m256i)weights[0]),
                  second = _mm256_maddubs_epi16((__m256i)codes[1], (__m256i)weights[1]);
    return add_pairs(sum, _mm256_add_epi16(first, second));
  }

  // Of each pair the sum of the weights above 0, and of those below: bytes, in any order.
  static vint load(vint word) {
    const __m256i ones = _mm256_set1_epi8(1), zero = _mm256_setzero_si256(), w = (__m256i)word;
    // -128 is 128 here, unsigned.
    const __m256i above = _mm256_max_epi8(w, zero),
                  below = _mm256_sub_epi8(zero, _mm256_min_epi8(w, zero));
    return (vint)_mm256_packus_epi16(_mm256_maddubs_epi16(above, ones),
                                     _mm256_maddubs_epi16(below, ones));
  }
  static vint both(vint a, vint b) { return (vint)_mm256_adds_epu8((__m256i)a, (__m256i)b); }
  static bool fits(vint load) {
    const __m256i most = _mm256_set1_epi8(static_cast<char>(kMost));
    const __m256i over = _mm256_subs_epu8((__m256i)load, most);
    return _mm256_testz_si256(over, over) != 0;
  }

  // In 16 bits all ones: the pairs that are not exact.
  static __m256i saturating(__m256i w) {
    const __m256i ones = _mm256_set1_epi8(1);
    const __m256i sum = _mm256_abs_epi16(_mm256_maddubs_epi16(ones, w)),
                  magnitudes = _mm256_maddubs_epi16(_mm256_abs_epi8(w), ones);
    // Twice the larger of the sums of either sign.
    return _mm256_cmpgt_epi16(_mm256_add_epi16(magnitudes, sum), _mm256_set1_epi16(2 * kMost));
  }
  // Halves are 64 at most, a pair of them 128.
  static vint halve(vint& word) {
    const auto w = (__m256i)word;
    // A byte has no arithmetic shift: that of the byte + 128.
    const __m256i high = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    const __m256i shifted = _mm256_and_si256(_mm256_srli_epi16(high, 1), _mm256_set1_epi8(127));
    const __m256i half = _mm256_sub_epi8(shifted, _mm256_set1_epi8(64));
    const __m256i rest = _mm256_and_si256(_mm256_sub_epi8(w, half), saturating(w));
    word = (vint)_mm256_sub_epi8(w, rest);
    return (vint)rest;
  }

  // Whether bytes pay, by a sample of the weights: where more pairs are halved than one of so many,
  // words of 16 bits are as fast.
  static bool pays(const int8_t* w, int64_t count) {
#if defined(QNN_ALWAYS_BYTES)
    return true;
#endif
    constexpr int64_t kOneOf = 320, kSamples = 128, kBytes = 32;
    const int64_t samples = smaller(kSamples, count / kBytes);
    int64_t halved = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const auto some = read<__m256i>(w + (count - kBytes) / samples * i);
      halved += __builtin_popcount(_mm256_movemask_epi8(saturating(some))) / 2;
    }
    return halved * kOneOf <= samples * kBytes / 2;
  }
};

struct Avx2Machine : Avx2 {
  // Two columns: four times four sums leave no register to decode in.
  static constexpr int64_t kDepth = 256, kWordStep = 8, kDotColumns = 2;
  static float sum(vfloat s) { return qnn::sum((__m256)s); }
};

}  // namespace
}  // namespace qnn
