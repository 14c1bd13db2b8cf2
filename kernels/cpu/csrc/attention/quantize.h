// Rows of queries, keys or values to int8 codes and scales, kLanes rows at a time: what is one
// number a row (a magnitude, a scale) is one lane of a vector.
#pragma once

#include <cfloat>
#include <cmath>  // NAN

#include "common/rows.h"
#include "common/vec.h"

namespace qnn {
namespace {

inline vint largest(vint a, vint b) { return a > b ? a : b; }
inline vint added(vint a, vint b) { return a + b; }

// Lane i: `op` over the lanes of row i.
template <class M, class Op>
QNN_INLINE vint fold(const vint* rows, const Op& op) {
  alignas(64) vint columns[kLanes];
  M::transpose(rows, sizeof(vint), columns, sizeof(vint));
  vint all = columns[0];
  for (int i = 1; i < kLanes; ++i) all = op(all, columns[i]);
  return all;
}

// Four vectors of codes, as bytes or as halves.
inline void write_four(int8_t* to, const vint* codes) {
#if defined(__AVX512BW__) && QNN_LANES == 16
  const __m512i first = _mm512_packs_epi32((__m512i)codes[0], (__m512i)codes[1]),
                second = _mm512_packs_epi32((__m512i)codes[2], (__m512i)codes[3]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  write(to, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(first, second)));
#else
  for (int i = 0; i < 4; ++i) write_codes(to + i * kLanes, codes[i]);
#endif
}
inline void write_four(int16_t* to, const vint* codes) {
  for (int i = 0; i < 4; ++i) write_codes(to + i * kLanes, codes[i]);
}

// kLanes codes, without their signs, to words. GCC 12 takes vectors of bytes apart one by one.
inline vuint unsigned_codes(const int8_t* codes) {
#if defined(__AVX512F__) && QNN_LANES == 16
  return (vuint)_mm512_cvtepu8_epi32(read<__m128i>(codes));
#elif defined(__AVX2__) && QNN_LANES == 8
  return (vuint)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
#else
  return __builtin_convertvector(read<vubyte>(codes), vuint);
#endif
}
inline vuint unsigned_codes(const int16_t* codes) {
#if defined(__AVX2__) && QNN_LANES == 8
  return (vuint)_mm256_cvtepu16_epi32(read<__m128i>(codes));
#else
  return __builtin_convertvector(read<vhalf>(codes), vuint);
#endif
}

// round(x · inverse), by a conversion that rounds where there is one.
inline vint rounded_codes(vfloat x, vfloat inverse) {
#if defined(__AVX512F__) && QNN_LANES == 16
  return (vint)_mm512_cvtps_epi32((__m512)(x * inverse));
#else
  const vfloat round = splat(0x1.8p23f);
  return bits(x * inverse + round) - bits(round);
#endif
}

// `count` rows of so many columns, `stride` values apart, to rows of codes, which are padded with
// zeros to a multiple of four vectors. Scales: NaN for a row with a NaN or inf, and 0 for one of
// zeros and for those after the last; the codes of all of these are zeros.
template <class M, class Format, class Code>
QNN_KERNEL void quantize_rows(const typename Format::Value* x, int64_t stride, int64_t count,
                              int64_t columns, Code* to, int64_t to_stride, float* scales) {
  const int64_t whole = columns / kLanes * kLanes, padded = round_up(columns, 4 * kLanes);
  alignas(64) vint most[kLanes] = {};
  for (int64_t r = 0; r < count; ++r) {
    const auto* row = x + r * stride;
    // The rows of the next call, which lie too far apart for the CPU to guess them.
    for (int64_t i = 0; i < columns; i += kLine / static_cast<int64_t>(sizeof *x))
      __builtin_prefetch(row + kLanes * stride + i);
    vint here{};
    for (int64_t i = 0; i < whole; i += kLanes)
      here = largest(here, bits(Format::load(row + i)) & 0x7fffffff);
    if (whole < columns)
      here = largest(here, bits(load_some<Format>(row + whole, columns - whole)) & 0x7fffffff);
    most[r] = here;
  }
  const auto amax = (vfloat)fold<M>(most, largest);
  const vint finite = amax <= splat(FLT_MAX), some = finite & (vint)(amax > 0.0f);
  const vfloat scale = at_least(splat(FLT_MIN), amax / 127.0f);
  write(scales, finite ? (some ? scale : vfloat{}) : splat(NAN));
  alignas(64) float inverses[kLanes];
  write(inverses, some ? 1.0f / scale : vfloat{});
  for (int64_t r = 0; r < kLanes; ++r) {
    Code* codes = to + r * to_stride;
    if (inverses[r] == 0.0f) {
      std::memset(codes, 0, padded * sizeof *codes);
      continue;
    }
    const auto* row = x + r * stride;
    const vfloat inverse = splat(inverses[r]);
    int64_t i = 0;
    for (; i + 4 * kLanes <= columns; i += 4 * kLanes) {
      vint four[4];
      for (int j = 0; j < 4; ++j)
        four[j] = rounded_codes(Format::load(row + i + j * kLanes), inverse);
      write_four(codes + i, four);
    }
    for (; i < padded; i += kLanes) {
      const vfloat values = i < columns ? load_some<Format>(row + i, columns - i) : vfloat{};
      write_codes(codes + i, rounded_codes(values, inverse));
    }
  }
}

}  // namespace
}  // namespace qnn
