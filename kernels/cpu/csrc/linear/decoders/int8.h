// int8: a code is its value.
#pragma once

#include "linear/decoders/decoder.h"

namespace qnn {
namespace {

struct Int8Codes : InOrder<Int8Codes> {
  static constexpr Decoder kDecoder = Decoder::int8;

#if defined(__AVX512F__) && QNN_LANES == 16
  template <class Use>
  static void decode(const WeightRow& w, int64_t i, int64_t left, State, const Use& use) {
    const __mmask16 there = static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : 0xffff);
    const __m512i codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, w.codes + i));
    use(0, (vfloat)_mm512_cvtepi32_ps(codes));
  }
#elif defined(__AVX2__) && QNN_LANES == 8
  template <class Use>
  static void decode(const WeightRow& w, int64_t i, int64_t left, State, const Use& use) {
    const __m128i bytes = _mm_cvtsi64_si128(bytes_of<int64_t>(w.codes + i, left));
    use(0, (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
  }
#else
  template <class Use>
  static void decode(const WeightRow& w, int64_t i, int64_t left, State, const Use& use) {
    vfloat v = {};
    for (int64_t j = 0; j < kLanes && j < left; ++j) v[j] = static_cast<int8_t>(w.codes[i + j]);
    use(0, v);
  }
#endif
};

}  // namespace
}  // namespace qnn
