// e2m1 in blocks of 16 with a scale in e4m3: a table of 16 values, times one of 256.
#pragma once

#include "linear/decoders/e4m3.h"

namespace qnn {
namespace {

constexpr float kE2m1Values[16] = {0,     0.5f,  1,  1.5f,  2,  3,  4,  6,
                                   -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

struct E2m1Codes : InOrder<E2m1Codes> {
  static constexpr Decoder kDecoder = Decoder::e2m1;

  static vfloat scale(const WeightRow& w, int64_t i) {
    return splat(kE4m3Values.values[static_cast<const uint8_t*>(w.scales)[i / kE2m1.group]]);
  }

#if defined(__AVX512F__) && QNN_LANES == 16
  // A block is eight bytes, sent to all pairs of lanes; each lane moves its code to the low bits,
  // and the permutation looks at no others. So the lanes hold codes 0, 8, 1, 9, … 7, 15. In order
  // it would take one instruction more: 8.4 M codes times one row 486 µs instead of 337, on one Zen
  // 4 core.
  template <class Use>
  static void decode(const WeightRow& w, int64_t i, int64_t, State, const Use& use) {
    const __m512i shifts =
        _mm512_set_epi32(28, 28, 24, 24, 20, 20, 16, 16, 12, 12, 8, 8, 4, 4, 0, 0);
    const __m512i codes =
        _mm512_srlv_epi32(_mm512_set1_epi64(read<int64_t>(w.codes + i / 2)), shifts);
    use(0, (vfloat)_mm512_permutexvar_ps(codes, _mm512_loadu_ps(kE2m1Values)) * scale(w, i));
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
#elif defined(__AVX2__) && QNN_LANES == 8
  // Half a block is four bytes, sent to all lanes; each lane moves its code to the low bits, of
  // which the permutation looks at three, and its sign to the top.
  template <class Use>
  static void decode(const WeightRow& w, int64_t i, int64_t, State, const Use& use) {
    const __m256i shifts = _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    const __m256i codes =
        _mm256_srlv_epi32(_mm256_set1_epi32(read<int32_t>(w.codes + i / 2)), shifts);
    const __m256 magnitudes = _mm256_permutevar8x32_ps(_mm256_loadu_ps(kE2m1Values), codes);
    const __m256i signs = _mm256_slli_epi32(_mm256_srli_epi32(codes, 3), 31);
    use(0, (vfloat)_mm256_xor_ps(magnitudes, (__m256)signs) * scale(w, i));
  }
#else
  template <class Use>
  static void decode(const WeightRow& w, int64_t i, int64_t, State, const Use& use) {
    const uint8_t* bytes = w.codes + i / 2;
    vfloat v;
    for (int64_t j = 0; j < kLanes; j += 2) {
      v[j] = kE2m1Values[bytes[j / 2] & 15];
      v[j + 1] = kE2m1Values[bytes[j / 2] >> 4];
    }
    use(0, v * scale(w, i));
  }
#endif
};

}  // namespace
}  // namespace qnn
