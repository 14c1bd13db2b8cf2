// A row of scores to its weights: 32640 · 2^(−d / 1024) of what each lies below the largest.
#pragma once

#include "common/rows.h"
#include "common/vec.h"

namespace qnn {
namespace {

// Scores: numbers stay within ±kLimit; a NaN is above, what is hidden is below all of them.
constexpr int32_t kLimit = 1 << 29, kNanScore = 1 << 30, kHidden = -(1 << 30);
constexpr int32_t kOne = 32640, kFraction = 10;

// To whole numbers, ties to even, within 32 bits.
inline vint rounded(vfloat x) {
#if defined(__AVX512F__) && QNN_LANES == 16
  return (vint)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__) && QNN_LANES == 8
  return (vint)_mm256_cvtps_epi32((__m256)x);
#else
  return __builtin_convertvector(nearest(x), vint);
#endif
}

// What weights are computed in: as 16-bit integers where there are instructions for them.
#if defined(__AVX512BW__) && QNN_LANES == 16
struct Shorts {
  using V = __m512i;
  static constexpr int64_t kCount = 32;
  static V splat(int value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }
  static V load(const int16_t* p) { return read<V>(p); }
  // min(most - u, 16384)
  static V below(vint most, const int32_t* u) {
    const V d = _mm512_packs_epi32((__m512i)(most - read<vint>(u)),
                                   (__m512i)(most - read<vint>(u + kLanes)));
    const V order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_min_epi16(_mm512_permutexvar_epi64(order, d), splat(1 << 14));
  }
  static V whole(V d) { return _mm512_srli_epi16(d, kFraction); }
  static V fraction(V d) {
    return _mm512_and_si512(_mm512_slli_epi16(d, 15 - kFraction), splat(0x7fe0));
  }
  static V add(V a, V b) { return _mm512_add_epi16(a, b); }
  static V mulhrs(V a, V b) { return _mm512_mulhrs_epi16(a, b); }
  // (2e >> n) + 1 >> 1
  static V shifted(V e, V n) {
    return _mm512_avg_epu16(_mm512_srlv_epi16(add(e, e), n), _mm512_setzero_si512());
  }
  static vint sum(vint total, V a) {
    return total + (vint)_mm512_madd_epi16(a, _mm512_set1_epi16(1));
  }
  static void store(int16_t* to, V w) { write(to, w); }
  static void store(uint8_t* high, uint8_t* low, V w) {
    write(high, _mm512_cvtepi16_epi8(_mm512_srli_epi16(w, 8)));
    write(low, _mm512_cvtepi16_epi8(w));
  }
};
#elif defined(__AVX2__) && QNN_LANES == 8
struct Shorts {
  using V = __m256i;
  static constexpr int64_t kCount = 16;
  static V splat(int value) { return _mm256_set1_epi16(static_cast<int16_t>(value)); }
  static V load(const int16_t* p) { return read<V>(p); }
  static V below(vint most, const int32_t* u) {
    const V d = _mm256_packs_epi32((__m256i)(most - read<vint>(u)),
                                   (__m256i)(most - read<vint>(u + kLanes)));
    return _mm256_min_epi16(_mm256_permute4x64_epi64(d, 0xd8), splat(1 << 14));
  }
  static V whole(V d) { return _mm256_srli_epi16(d, kFraction); }
  static V fraction(V d) {
    return _mm256_and_si256(_mm256_slli_epi16(d, 15 - kFraction), splat(0x7fe0));
  }
  static V add(V a, V b) { return _mm256_add_epi16(a, b); }
  static V mulhrs(V a, V b) { return _mm256_mulhrs_epi16(a, b); }
  // There is no shift of each 16 bits by a number of its own: the upper half of the product with
  // 2^(16 - n), for n from 1 to 16, whose bytes come from two tables.
  static V shifted(V e, V n) {
    const V low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 0, -128, 64, 32, 16, 8, 4, 2));
    const V high = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -128, 64, 32, 16, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0, 0));
    const V zero = _mm256_setzero_si256(), twice = add(e, e);
    const V power = _mm256_or_si256(_mm256_shuffle_epi8(low, n),
                                    _mm256_shuffle_epi8(high, _mm256_slli_epi16(n, 8)));
    const V none = _mm256_and_si256(_mm256_cmpeq_epi16(n, zero), twice);
    return _mm256_avg_epu16(_mm256_or_si256(_mm256_mulhi_epu16(twice, power), none), zero);
  }
  static vint sum(vint total, V a) {
    return total + (vint)_mm256_madd_epi16(a, _mm256_set1_epi16(1));
  }
  static void store(int16_t* to, V w) { write(to, w); }
  static void store(uint8_t* high, uint8_t* low, V w) {
    const auto bytes = [](V v) {
      return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi16(v, v), 0x08));
    };
    write(high, bytes(_mm256_srli_epi16(w, 8)));
    write(low, bytes(_mm256_and_si256(w, splat(255))));
  }
};
#else
struct Shorts {
  using V = vint;
  static constexpr int64_t kCount = kLanes;
  static V splat(int value) { return qnn::splat(value); }
  static V load(const int16_t* p) { return __builtin_convertvector(read<vshort>(p), vint); }
  static V below(vint most, const int32_t* u) {
    const vint d = most - read<vint>(u), last = splat(1 << 14);
    return d < last ? d : last;
  }
  static V whole(V d) { return d >> kFraction; }
  static V fraction(V d) { return (d << (15 - kFraction)) & 0x7fe0; }
  static V add(V a, V b) { return a + b; }
  static V mulhrs(V a, V b) { return (a * b + (1 << 14)) >> 15; }
  static V shifted(V e, V n) { return (((e + e) >> n) + 1) >> 1; }
  static vint sum(vint total, V a) { return total + a; }
  static void store(int16_t* to, V w) { write_codes(to, w); }
  static void store(uint8_t* high, uint8_t* low, V w) {
    write_codes(high, w >> 8), write_codes(low, w);
  }
};
#endif

// Of `keys` scores, a multiple of Shorts::kCount, below `most`: each weight times the gain of its
// key, by `put(key, weights)`. Returns the sum of the weights before that.
template <class Put>
QNN_INLINE int64_t weigh(const int32_t* u, int32_t most, const int16_t* gain, int64_t keys,
                         const Put& put) {
  using S = Shorts;
  // A lane's sums stay in 32 bits for so many keys.
  constexpr int64_t kKeys = int64_t{65536};
  const vint top = splat(most);
  const S::V c0 = S::splat(kOne), c1 = S::splat(-22571), c2 = S::splat(7537), c3 = S::splat(-1287);
  int64_t total = 0;
  for (int64_t begin = 0; begin < keys; begin += kKeys) {
    const int64_t end = smaller(keys, begin + kKeys);
    vint sums{};
    for (int64_t key = begin; key < end; key += S::kCount) {
      const S::V d = S::below(top, u + key), x = S::fraction(d);
      const S::V e =
          S::add(S::mulhrs(S::add(S::mulhrs(S::add(S::mulhrs(c3, x), c2), x), c1), x), c0);
      const S::V a = S::shifted(e, S::whole(d));
      sums = S::sum(sums, a);
      put(key, S::mulhrs(a, S::load(gain + key)));
    }
    for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
  }
  return total;
}

}  // namespace
}  // namespace qnn
