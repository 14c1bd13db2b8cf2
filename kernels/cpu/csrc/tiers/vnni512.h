// AVX-512 with VNNI: vpdpbusd adds four products of an unsigned and a signed byte to each of 16
// sums, without saturation. x is the signed operand and w the unsigned one, as w + 128; the sums
// start at -128 times the sum of x's codes.
#pragma once

#include "linear/inner.h"
#include "tiers/avx512.h"

namespace qnn {
namespace {

struct Vnni : Avx512, Inner<Vnni> {
  using Code = int8_t;
  static constexpr bool kQuantizes = true;
  using Panel = uint8_t;
  using Acc = int32_t;
  using Sum = vint;
  // TOPS at 512x768x768 and 512x4096x4096: a depth of 256 0.395 0.392, 512 0.400 0.405, 1024 0.409
  // 0.414, 2048 0.407 0.412.
  static constexpr int64_t kGroup = 4, kOffset = 128, kDepth = 1024, kWordStep = 16;

  static void fill_panel(Panel* to, const int8_t* w, int64_t depth) {
    const __m512i high = _mm512_set1_epi8(-128);
    int64_t i = 0;
    for (; i + 64 <= depth; i += 64) write(to + i, _mm512_xor_si512(read<__m512i>(w + i), high));
    if (i < depth)
      write(to + i, _mm512_xor_si512(_mm512_maskz_loadu_epi8(first(depth - i), w + i), high));
  }

  static vint multiply_add(vint sum, vint column, vint row) {
    return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)column, (__m512i)row);
  }
  static vint column(const int8_t* w, int64_t left) {
    const __mmask64 there = left < 64 ? first(left) : ~__mmask64{0};
    return (vint)_mm512_xor_si512(_mm512_maskz_loadu_epi8(there, w), _mm512_set1_epi8(-128));
  }
  static int32_t sum(vint s) { return qnn::sum((__m512i)s); }

  // One row of x takes the rows of w one after the other, as they lie: memory gives one stream
  // faster than several. Four sums along K hide the latency.
  template <int R>
  static void dot(const Code* x, int64_t stride, const int8_t* const* w, int64_t k, Acc* acc) {
    if constexpr (R == 1) {
      for (int c = 0; c < kDotColumns; ++c) acc[c] = stream(x, w[c], k);
    } else {
      Inner<Vnni>::dot<R>(x, stride, w, k, acc);
    }
  }

  QNN_KERNEL static int32_t stream(const Code* x, const int8_t* w, int64_t k) {
    vint sums[4] = {};
    int64_t i = 0;
    for (; i + 256 <= k; i += 256) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const int64_t at = i + u * 64;
        sums[u] = multiply_add(sums[u], column(w + at, 64), read<vint>(x + at));
      }
    }
    for (; i < k; i += 64) sums[0] = multiply_add(sums[0], column(w + i, k - i), read<vint>(x + i));
    const vuint all = ((vuint)sums[0] + (vuint)sums[1]) + ((vuint)sums[2] + (vuint)sums[3]);
    return sum((vint)all);
  }
};

// Codes of 16 bits, in pairs.
struct VnniWords : Avx512, Inner<VnniWords> {
  using Code = int16_t;
  using Panel = int16_t;
  using Acc = int32_t;
  using Sum = vint;
  static constexpr bool kQuantizes = true;
  static constexpr int64_t kGroup = 2, kOffset = 0, kDepth = 512, kWordStep = 16;

  static void fill_panel(Panel* to, const int8_t* w, int64_t depth) {
    for (int64_t i = 0; i < depth; i += 32)
      write(to + i, _mm512_cvtepi8_epi16(bytes_of<__m256i>(w + i, depth - i)));
  }
  static vint multiply_add(vint sum, vint column, vint row) {
    return (vint)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)column, (__m512i)row);
  }
  static vint column(const int8_t* w, int64_t left) {
    return (vint)_mm512_cvtepi8_epi16(bytes_of<__m256i>(w, left));
  }
  static int32_t sum(vint s) { return qnn::sum((__m512i)s); }
};

inline bool vnni512_runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

}  // namespace
}  // namespace qnn
