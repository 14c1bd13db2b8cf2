// What the AVX2 tiers share: 8 lanes, the turn of 8 × 8 words, and the float32 kernel of
// int8_weight.
#pragma once

#include <immintrin.h>

#include "loops.h"

namespace qnn {
namespace {

// Bytes of w from `p` on, of which `left` are there; zeros behind them.
template <class V>
inline V read_some(const int8_t* p, int64_t left) {
  if (left >= static_cast<int64_t>(sizeof(V))) return read<V>(p);
  int8_t some[sizeof(V)] = {};
  std::memcpy(some, p, left);
  return read<V>(some);
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

struct Avx2Float : Avx2, Inner<Avx2Float> {
  using Code = float;
  static constexpr bool kQuantizes = false;
  using Panel = float;
  using Acc = float;
  using Sum = vfloat;
  static constexpr int64_t kGroup = 1, kOffset = 0, kDepth = 256, kWordStep = 8;

  static __m256 widen(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }
  static __m128i bytes(const int8_t* w, int64_t left) {
    return _mm_cvtsi64_si128(read_some<int64_t>(w, left));
  }

  static void fill_panel(Panel* to, const int8_t* w, int64_t depth) {
    for (int64_t i = 0; i < depth; i += 8) write(to + i, widen(bytes(w + i, depth - i)));
  }

  static vfloat multiply_add(vfloat sum, vfloat column, vfloat row) {
    return fma(column, row, sum);
  }
  static vfloat column(const int8_t* w, int64_t left) { return (vfloat)widen(bytes(w, left)); }
  static float sum(vfloat s) { return qnn::sum((__m256)s); }
};

}  // namespace
}  // namespace qnn
