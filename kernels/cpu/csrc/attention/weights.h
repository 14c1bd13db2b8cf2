// A row of scores to its weights: 32640 · 2^(−d / 1024) of what each lies below the largest.
#pragma once

#include "attention/quantize.h"
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

// What scores and weights are kept and computed in: 16-bit integers where there are instructions
// for them. A V has the scores of kVectors vectors, those beyond 16 bits cut off. Mixed, and where
// that costs nothing it is how a tier keeps them, they stand in the order that key_at says.
#if defined(__AVX512BW__) && QNN_LANES == 16
struct Shorts {
  using V = __m512i;
  using Score = int16_t;
  static constexpr int64_t kCount = 32, kVectors = 2;
  static V splat(int value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }
  static V load(const int16_t* p) { return read<V>(p); }
  static void store(int16_t* to, V w) { write(to, w); }
  template <bool kMixed>
  static V pack(const vint* u) {
    const V d = _mm512_packs_epi32((__m512i)u[0], (__m512i)u[1]);
    if constexpr (kMixed) return d;
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), d);
  }
  // Of the key whose weight is number `i` of 64: 16 bits of two keys are in a word of one of two
  // vectors, and bytes of the two take turns.
  template <bool kMixed>
  static int64_t key_at(int64_t i) {
    if constexpr (!kMixed) return i;
    const int64_t lane = i / 2, four = lane / 4;
    return i % 2 * 32 + four % 2 * 16 + four / 2 * 4 + lane % 4;
  }
  static V most(V a, V b) { return _mm512_max_epi16(a, b); }
  static vint widened(V a) { return largest((vint)a << 16 >> 16, (vint)a >> 16); }
  static V below(V most, V u) { return _mm512_subs_epi16(most, u); }
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
#if defined(__AVX512VNNI__)
    return (vint)_mm512_dpwssd_epi32((__m512i)total, a, splat(1));
#else
    return total + (vint)_mm512_madd_epi16(a, splat(1));
#endif
  }
  template <bool kMixed>
  static void store(uint8_t* high, uint8_t* low, V first, V second) {
    if constexpr (kMixed) {
      constexpr __mmask64 kOdd = 0xaaaaaaaaaaaaaaaa;
      write(high, _mm512_mask_blend_epi8(kOdd, _mm512_srli_epi16(first, 8), second));
      write(low, _mm512_mask_blend_epi8(kOdd, first, _mm512_slli_epi16(second, 8)));
      return;
    }
    const auto bytes = [](V a, V b) {
      const V order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
      return _mm512_permutexvar_epi64(order, _mm512_packus_epi16(a, b));
    };
    const V byte = splat(255);
    write(high, bytes(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8)));
    write(low, bytes(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte)));
  }
};
#elif defined(__AVX2__) && QNN_LANES == 8
struct Shorts {
  using V = __m256i;
  using Score = int16_t;
  static constexpr int64_t kCount = 16, kVectors = 2;
  static V splat(int value) { return _mm256_set1_epi16(static_cast<int16_t>(value)); }
  static V load(const int16_t* p) { return read<V>(p); }
  static void store(int16_t* to, V w) { write(to, w); }
  template <bool kMixed>
  static V pack(const vint* u) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)u[0], (__m256i)u[1]), 0xd8);
  }
  template <bool kMixed>
  static int64_t key_at(int64_t i) {
    return i;
  }
  static V most(V a, V b) { return _mm256_max_epi16(a, b); }
  static vint widened(V a) { return largest((vint)a << 16 >> 16, (vint)a >> 16); }
  static V below(V most, V u) {
    return _mm256_min_epi16(_mm256_subs_epi16(most, u), splat(1 << 14));
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
  static vint sum(vint total, V a) { return total + (vint)_mm256_madd_epi16(a, splat(1)); }
  template <bool kMixed>
  static void store(uint8_t* high, uint8_t* low, V first, V second) {
    const auto bytes = [](V a, V b) {
      return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8);
    };
    const V byte = splat(255);
    write(high, bytes(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8)));
    write(low, bytes(_mm256_and_si256(first, byte), _mm256_and_si256(second, byte)));
  }
};
#else
struct Shorts {
  using V = vint;
  using Score = int32_t;
  static constexpr int64_t kCount = kLanes, kVectors = 1;
  static V splat(int value) { return qnn::splat(value); }
  static V load(const int16_t* p) { return __builtin_convertvector(read<vshort>(p), vint); }
  static V load(const int32_t* p) { return read<vint>(p); }
  static void store(int16_t* to, V w) { write_codes(to, w); }
  static void store(int32_t* to, V w) { write(to, w); }
  template <bool kMixed>
  static V pack(const vint* u) {
    const vint least = splat(-32768), top = splat(32767);
    const vint score = largest(*u, least);
    return score < top ? score : top;
  }
  template <bool kMixed>
  static int64_t key_at(int64_t i) {
    return i;
  }
  static V most(V a, V b) { return largest(a, b); }
  static vint widened(V a) { return a; }
  static V below(V most, V u) {
    const vint d = most - u, last = splat(1 << 14);
    return d < last ? d : last;
  }
  static V whole(V d) { return d >> kFraction; }
  static V fraction(V d) { return (d << (15 - kFraction)) & 0x7fe0; }
  static V add(V a, V b) { return a + b; }
  static V mulhrs(V a, V b) { return (a * b + (1 << 14)) >> 15; }
  static V shifted(V e, V n) { return (((e + e) >> n) + 1) >> 1; }
  static vint sum(vint total, V a) { return total + a; }
  template <bool kMixed>
  static void store(uint8_t* high, uint8_t* low, V first, V second) {
    write_codes(high, first >> 8), write_codes(high + kLanes, second >> 8);
    write_codes(low, first), write_codes(low + kLanes, second);
  }
};
#endif

// Of `keys` scores, a multiple of twice Shorts::kCount, below `most`: each weight times the gain of
// its key, by `put(key, weights, the next weights)`. Returns the lanes' sums of the weights before
// that, which stay in 32 bits for 65,536 keys.
template <class Put>
QNN_INLINE vint weigh(const Shorts::Score* u, int32_t most, const int16_t* gain, int64_t keys,
                      const Put& put) {
  using S = Shorts;
  const S::V top = S::splat(most);
  const S::V c0 = S::splat(kOne), c1 = S::splat(-22571), c2 = S::splat(7537), c3 = S::splat(-1287);
  vint sums{};
  const auto weights = [&](int64_t key) {
    const S::V d = S::below(top, S::load(u + key)), x = S::fraction(d);
    const S::V e = S::add(S::mulhrs(S::add(S::mulhrs(S::add(S::mulhrs(c3, x), c2), x), c1), x), c0);
    const S::V a = S::shifted(e, S::whole(d));
    sums = S::sum(sums, a);
    return S::mulhrs(a, S::load(gain + key));
  };
  for (int64_t key = 0; key < keys; key += 2 * S::kCount)
    put(key, weights(key), weights(key + S::kCount));
  return sums;
}

}  // namespace
}  // namespace qnn
