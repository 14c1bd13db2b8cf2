// int4 in groups of 32 or more, eight codes a word: (code - zero point) · the group's scale. In the
// same source for all lanes.
#pragma once

#include "linear/decoders/decoder.h"

namespace qnn {
namespace {

// The sums of eight products to a lane, or 2^kShift times as much: of its four bytes of `even` and
// of `odd`, from 0 to 15, with signed bytes.
template <int kShift>
inline vint byte_products(vuint even, vint x_even, vuint odd, vint x_odd) {
#if defined(__AVX512VNNI__) && QNN_LANES == 16
  const __m512i sum = _mm512_dpbusd_epi32(__m512i{}, (__m512i)even, (__m512i)x_even);
  return (vint)_mm512_dpbusd_epi32(sum, (__m512i)odd, (__m512i)x_odd) << kShift;
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__) && QNN_LANES == 8
  const __m256i sum = _mm256_dpbusd_epi32(__m256i{}, (__m256i)even, (__m256i)x_even);
  return (vint)_mm256_dpbusd_epi32(sum, (__m256i)odd, (__m256i)x_odd) << kShift;
#elif defined(__AVXVNNI__) && QNN_LANES == 8
  const __m256i sum = _mm256_dpbusd_avx_epi32(__m256i{}, (__m256i)even, (__m256i)x_even);
  return (vint)_mm256_dpbusd_avx_epi32(sum, (__m256i)odd, (__m256i)x_odd) << kShift;
#elif defined(__AVX2__) && QNN_LANES == 8
  // Four products are at most 7,680: 16 bits do.
  const __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)even, (__m256i)x_even),
                                       _mm256_maddubs_epi16((__m256i)odd, (__m256i)x_odd));
  return (vint)_mm256_madd_epi16(sum, _mm256_set1_epi16(1 << kShift));
#else
  vint sum = {};
  for (int b = 0; b < 32; b += 8) {
    sum += (vint)(even >> b & 255) * (x_even << (24 - b) >> 24);
    sum += (vint)(odd >> b & 255) * (x_odd << (24 - b) >> 24);
  }
  return sum << kShift;
#endif
}

// Few rows: x in integers. Eight values of x that meet the codes of a word share a power of two, u,
// so that each is a whole number of u below 2²³, three signed bytes. Products of bytes are exact
// and far fewer instructions than a conversion and a float product for each code; their sums, less
// the zero point's share, are the sums of x · (code - zero point) of a lane, exactly. What is
// rounded is x, by at most 2⁻²³ of the largest of its eight, and the float32 sum over the lanes'
// words.
struct Int4Codes {
  static constexpr Decoder kDecoder = Decoder::int4;
  struct State {};
  static constexpr int64_t kStep = 8 * kLanes;
  static constexpr bool kInTurn = true;  // memory gives one stream faster than several
  static float unit(State) { return 1; }
  typedef uint8_t Bytes __attribute__((vector_size(4 * QNN_LANES)));

  // What groups have each, in the lanes of a step from code i on: 32 codes are four lanes.
  template <class V, class Get>
  static V spread(const WeightRow& w, int64_t i, int64_t left, const Get& get) {
    const int64_t first = i >> w.shift;
    V v = get(first);
    vint lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    for (int part = 1; part < kLanes / 4; ++part) {
      const int64_t at = i + 32 * part;
      v = lanes < 4 * part ? v : get(32 * part < left ? at >> w.shift : first);
    }
    return v;
  }

  // A step of R rows of x, `stride` floats apart, onto their sums.
  template <int R, class Add>
  static QNN_INLINE void step(const WeightRow& w, int64_t i, int64_t left, const float* x,
                              int64_t stride, State, const Add& add) {
    // Two rows of w, or half of one: alone a CPU does not see so far ahead.
    __builtin_prefetch(w.codes + i / 2 + 4096);
    const vuint words = bytes_of<vuint>(w.codes + i / 2, left / 2);
    const vuint even = words & 0x0f0f0f0f, odd = words >> 4 & 0x0f0f0f0f;
    const float* scales = static_cast<const float*>(w.scales);
    const vfloat scale =
        spread<vfloat>(w, i, left, [&](int64_t group) { return splat(scales[group]); });
    vint zero = {};
    if (w.zero_points != nullptr) {
      zero = (vint)(spread<vuint>(
                        w, i, left,
                        [&](int64_t group) { return (vuint)(Bytes{} + w.zero_points[group]); }) &
                    255);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float* at = x + r * stride + i;
      const auto vector = [&](int j) { return read<vint>(at + j * kLanes); };
      vint whole = byte_products<8>(even, vector(0), odd, vector(1));
      whole = (whole + byte_products<0>(even, vector(2), odd, vector(3))) << 8;
      whole += byte_products<0>(even, vector(4), odd, vector(5));
      whole -= w.zero_points == nullptr ? vector(6) << 3 : vector(6) * zero;
      // A sum of large values may be beyond float32 where the scale makes it small again.
      const vfloat u = read<vfloat>(at + 7 * kLanes);
      const vint large = u > splat(0x1p96f);
      add(r, floats(whole) * (large ? scale : u), large ? u : scale);
    }
  }

  // A step of x is vectors of its bytes, the highest first, those of even and those of odd codes;
  // of the sums of a word's values; and of u, which is NaN where one of the values is not finite.
  static void arrange(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kStep) {
      alignas(64) float turned[kStep];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        for (int64_t j = 0; j < 8; ++j) turned[j * kLanes + lane] = x[i + 8 * lane + j];
      }
      vuint top = {};
      for (int64_t j = 0; j < 8; ++j) {
        const vuint here = read<vuint>(turned + j * kLanes) & 0x7fffffff;
        top = here > top ? here : top;
      }
      // What is near the next power of two rounds to it, and three bytes hold the rest.
      const vint exponent = (vint)((top + 0x10400) >> 23) - 22;
      const vint normal = exponent < 1 ? vint{} + 1 : exponent;
      const vfloat inverse = (vfloat)((254 - normal) << 23);
      const vint finite = top < 0x7f800000;
      vuint packed[6] = {};
      vint sum = {};
      for (int64_t j = 0; j < 8; ++j) {
        const vfloat value = read<vfloat>(turned + j * kLanes) * inverse;
        const vint whole = __builtin_convertvector(nearest(value), vint) & finite;
        sum += whole;
        const vuint digits = ((vuint)whole + 0x808080) ^ 0x808080;
        for (int d = 0; d < 3; ++d)
          packed[2 * d + j % 2] |= (digits >> (16 - 8 * d) & 255) << (j / 2 * 8);
      }
      for (int64_t v = 0; v < 6; ++v) write(x + i + v * kLanes, packed[v]);
      write(x + i + 6 * kLanes, sum);
      write(x + i + 7 * kLanes, finite ? normal << 23 : vint{} + 0x7fc00000);
    }
  }

  template <class To, class Each = AsTheyAre>
  static void panel(To to, const WeightRow& w, int64_t k, int64_t depth, const Each& each = {}) {
    vint lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    const vuint shifts = (vuint)(lanes & 7) << 2;
    for (int64_t i = k; i < k + depth; i += kPut<To> * kLanes) {
      vfloat values[kPut<To>];
      for (int j = 0; j < kPut<To>; ++j) {
        const int64_t at = i + j * kLanes, group = at >> w.shift;
        vuint words = vuint{} + read<uint32_t>(w.codes + at / 8 * 4);
        if constexpr (kLanes == 16) {
          words = lanes < 8 ? words : vuint{} + read<uint32_t>(w.codes + at / 8 * 4 + 4);
        }
        if constexpr (kLanes == 4) words = words >> (at % 8 * 4);
        const vint zero = splat(w.zero_points == nullptr ? 8 : int32_t{w.zero_points[group]});
        values[j] = floats((vint)(words >> shifts & 15) - zero);
        if constexpr (std::is_same_v<To, float*>)
          values[j] = values[j] * static_cast<const float*>(w.scales)[group];
        values[j] = each(values[j]);
      }
      put(to + (i - k), values);
    }
  }
};

}  // namespace
}  // namespace qnn
