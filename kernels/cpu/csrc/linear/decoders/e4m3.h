// e4m3: by way of float16 where a CPU converts that, else by a table.
#pragma once

#include "linear/decoders/decoder.h"

namespace qnn {
namespace {

// The values of all e4m3 codes: sign, four bits of exponent with bias 7, three of mantissa; no inf.
struct E4m3Table {
  float values[256] = {};
  constexpr E4m3Table() {
    for (int code = 0; code < 128; ++code) {
      const int exponent = code >> 3;
      float value = static_cast<float>(exponent == 0 ? code & 7 : (code & 7) + 8) / 512;
      for (int i = 1; i < exponent; ++i) value *= 2;
      if (code == 127) value = __builtin_nanf("");
      values[code] = value;
      values[code + 128] = -value;
    }
  }
};
constexpr E4m3Table kE4m3Values;

#if (defined(__AVX512F__) && QNN_LANES == 16) || (defined(__AVX2__) && QNN_LANES == 8)
// By way of float16, whose exponent has one bit more and a bias of 15: moved to its place, a
// code is the float16 of 1/256 of its value, subnormals included, and the CPU's conversion of
// float16 honours those whatever the mode for denormals. NaN would be ±480, and is looked for
// beside it: a NaN anywhere in a row of w makes all its outputs NaN. Two codes to a word, the even
// one in the low byte, so the even codes of 2 kLanes come first and then the odd ones. On one
// Zen 4 core 8.4 M codes times one row take 386 µs (372 if NaN is not looked for); sign-extended in
// order 419, and 616 with NaN and 256 put in place for each code.
struct E4m3Codes : ByFloats<E4m3Codes> {
  static constexpr Decoder kDecoder = Decoder::e4m3;
  typedef uint8_t State __attribute__((vector_size(2 * QNN_LANES)));
  static constexpr int64_t kStep = 2 * kLanes;
  static constexpr float kUnit = 256;

  template <class Use>
  static void decode(const WeightRow& w, int64_t i, int64_t left, State& most, const Use& use) {
    const vshort pairs = bytes_of<vshort>(w.codes + i, left);
    const State magnitude = (State)pairs & 0x7f;
    most = magnitude > most ? magnitude : most;
    // The sign comes with a copy of itself, which is masked out.
    const int16_t mask = static_cast<int16_t>(0xbf80);
    const vshort even = ((pairs << 8) >> 1) & mask, odd = (pairs >> 1) & mask;
    use(0, Float16::load(reinterpret_cast<const uint16_t*>(&even)));
    use(1, Float16::load(reinterpret_cast<const uint16_t*>(&odd)));
  }
  static bool spoilt(State most) {
    const State carry = (most + 1) & 0x80;  // from 127 only
    uint64_t words[sizeof(State) / 8], any = 0;
    std::memcpy(words, &carry, sizeof words);
    for (const uint64_t word : words) any |= word;
    return any != 0;
  }
#if defined(__AVX512F__) && QNN_LANES == 16
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
#else
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
#endif
};
#else
struct E4m3Codes : InOrder<E4m3Codes> {
  static constexpr Decoder kDecoder = Decoder::e4m3;

  template <class Use>
  static void decode(const WeightRow& w, int64_t i, int64_t left, State, const Use& use) {
    vfloat v = {};
    for (int64_t j = 0; j < kLanes && j < left; ++j) v[j] = kE4m3Values.values[w.codes[i + j]];
    use(0, v);
  }
};
#endif

}  // namespace
}  // namespace qnn
