// A row of floats to integers: its scale and its codes.
#pragma once

#include <limits>

#include "common/vec.h"

namespace qnn {
namespace {

// amax over the largest code, at least the smallest normal float; 1 for a zero row. NaN and inf
// pass through.
inline float scale_of(float amax, int most = 127) {
  if (amax == 0.0f) return 1.0f;
  const float scale = amax / static_cast<float>(most), least = std::numeric_limits<float>::min();
  return scale < least ? least : scale;
}

// The largest magnitude. Compared as integers, those of NaN and inf are above every number's.
template <class Format>
inline float row_magnitude(const typename Format::Value* x, int64_t k) {
  float amax;
  if constexpr (sizeof(typename Format::Value) == 2) {
    vhalves most = {};
    for (int64_t i = 0; i < k; i += 2 * kLanes) {
      const vhalves here =
          bytes_of<vhalves>(x + i, (k - i) * static_cast<int64_t>(sizeof *x)) & 0x7fff;
      most = here > most ? here : most;
    }
    uint16_t top[kLanes] = {};
    for (int lane = 0; lane < 2 * kLanes; ++lane)
      top[0] = most[lane] > top[0] ? most[lane] : top[0];
    amax = Format::load(top)[0];
  } else {
    vint most = {};
    for (int64_t i = 0; i < k; i += kLanes) {
      const vint here = bits(load_some<Format>(x + i, k - i)) & 0x7fffffff;
      most = here > most ? here : most;
    }
    int32_t top = 0;
    for (int lane = 0; lane < kLanes; ++lane) top = most[lane] > top ? most[lane] : top;
    std::memcpy(&amax, &top, sizeof amax);
  }
  return amax;
}

template <class Format>
inline float row_scale(const typename Format::Value* x, int64_t k, int most = 127) {
  return scale_of(row_magnitude<Format>(x, k), most);
}

// The low bytes, or halves, of kLanes words. GCC 12 takes words apart one by one for AVX2.
template <class Code>
inline void write_codes(Code* p, vint q) {
#if defined(__AVX2__) && QNN_LANES == 8
  constexpr char kNo = -128;
  const __m256i bytes =
      _mm256_setr_epi8(0, 4, 8, 12, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, 0,
                       4, 8, 12, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo);
  const __m256i halves =
      _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, 0, 1, 4, 5,
                       8, 9, 12, 13, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo);
  const __m256i low = _mm256_shuffle_epi8((__m256i)q, sizeof(Code) == 1 ? bytes : halves);
  const __m128i first = _mm256_castsi256_si128(low), second = _mm256_extracti128_si256(low, 1);
  if constexpr (sizeof(Code) == 1) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(first, second));
  } else {
    write(p, _mm_unpacklo_epi64(first, second));
  }
#else
  if constexpr (sizeof(Code) == 1) {
#if defined(__AVX512F__) && QNN_LANES == 16
    write(p, _mm512_cvtepi32_epi8((__m512i)q));
#else
    write(p, __builtin_convertvector(q, vbyte));
#endif
  } else {
    write(p, __builtin_convertvector(q, vshort));
  }
#endif
}

// The bytes of twice kLanes words, which are 0 to 255.
inline void write_two(uint8_t* p, vint first, vint second) {
#if defined(__AVX2__) && QNN_LANES == 8
  const __m256i halves = _mm256_packs_epi32((__m256i)first, (__m256i)second);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0);  // of the fours of bytes
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(halves, halves), order);
  write(p, _mm256_castsi256_si128(bytes));
#else
  write_codes(p, first), write_codes(p + kLanes, second);
#endif
}

// 32-bit sums to sums in double, or onto them: of whole vectors.
inline __attribute__((noinline)) void add_sums(const int32_t* from, int64_t count, bool onto,
                                               double* to) {
  for (int64_t i = 0; i < count; i += kLanes / 2) {
    const auto more = __builtin_convertvector(read<vhalfint>(from + i), vhalfdouble);
    write(to + i, onto ? read<vhalfdouble>(to + i) + more : more);
  }
}

// round(x · inverse) of kLanes values. A product rounds to at most the largest code. Adding
// 1.5 · 2^23 rounds it to nearest, ties to even, and leaves it in the low bits.
inline vint codes_of(vfloat x, float inverse) {
  const vfloat round = splat(0x1.8p23f);
  return bits(x * inverse + round) - bits(round);
}

}  // namespace
}  // namespace qnn
