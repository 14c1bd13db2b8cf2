// AVX-VNNI: vpdpbusd on 256 bits, for CPUs without AVX-512 (Alder Lake, Sierra Forest, …). The
// arithmetic is avx512_vnni.cpp's. With AVX-512-VNNI's own 256-bit form (QNN_EVEX) the same source
// runs where a test has no such CPU; and with AVX2 alone (QNN_EMULATE_VNNI), slowly.
#define QNN_LANES 8
#include <cpuid.h>

#include "attention/cache_loops.h"
#include "attention/loops.h"
#include "conv/loops.h"
#include "linear/loops.h"
#include "recurrent/recurrent.h"
#include "tiers/avx2.h"
#include "tiers/tiers.h"

namespace qnn {
namespace {

#if defined(QNN_EMULATE_VNNI)
inline __m256i dpbusd(__m256i sum, __m256i w, __m256i x) {
  const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
  const __m256i even_x = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, even_x));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, _mm256_srai_epi16(x, 8)));
}
inline __m256i dpwssd(__m256i sum, __m256i w, __m256i x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
}
#elif defined(QNN_EVEX)
inline __m256i dpbusd(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_epi32(sum, w, x); }
inline __m256i dpwssd(__m256i sum, __m256i w, __m256i x) { return _mm256_dpwssd_epi32(sum, w, x); }
#else
inline __m256i dpbusd(__m256i sum, __m256i w, __m256i x) {
  return _mm256_dpbusd_avx_epi32(sum, w, x);
}
inline __m256i dpwssd(__m256i sum, __m256i w, __m256i x) {
  return _mm256_dpwssd_avx_epi32(sum, w, x);
}
#endif

struct Vnni256 : Avx2, Inner<Vnni256> {
  using Code = int8_t;
  static constexpr bool kQuantizes = true;
  using Panel = uint8_t;
  using Acc = int32_t;
  using Sum = vint;
  static constexpr int64_t kGroup = 4, kOffset = 128, kDepth = 1024, kWordStep = 8;

  static __m256i unsign(__m256i w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }

  static void fill_panel(Panel* to, const int8_t* w, int64_t depth) {
    for (int64_t i = 0; i < depth; i += 32)
      write(to + i, unsign(bytes_of<__m256i>(w + i, depth - i)));
  }

  static vint multiply_add(vint sum, vint column, vint row) {
    return (vint)dpbusd((__m256i)sum, (__m256i)column, (__m256i)row);
  }
  static vint column(const int8_t* w, int64_t left) {
    return (vint)unsign(bytes_of<__m256i>(w, left));
  }
  static int32_t sum(vint s) { return qnn::sum((__m256i)s); }
};

// Codes of 16 bits, in pairs.
struct Vnni256Words : Avx2Words, Inner<Vnni256Words> {
  using Acc = int32_t;
  using Sum = vint;

  static vint multiply_add(vint sum, vint column, vint row) {
    return (vint)dpwssd((__m256i)sum, (__m256i)column, (__m256i)row);
  }
};
// Of few rows in float32 this tier has the products of int4's bytes.
using Int4Rows = Dots<FloatTier<Avx2Machine, DecoderList<Int4Codes>>>;

bool are_int4_rows(const Linear& p) {
  return p.weight.decoder == Decoder::int4 && p.m <= Avx2Machine::kDotRows;
}

size_t weight_only_bytes(const Linear& p) {
  return are_int4_rows(p) ? Int4Rows::scratch_bytes(p) : avx2.weight_only.scratch_bytes(p);
}

void weight_only_run(const Linear& p, int part, int parts, char* scratch) {
  are_int4_rows(p) ? Int4Rows::run(p, part, parts, scratch)
                   : avx2.weight_only.run(p, part, parts, scratch);
}

bool runs_here() {
#if defined(QNN_EMULATE_VNNI)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(QNN_EVEX)
  return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
  if (!avx2.runs_here()) return false;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
#endif
}

}  // namespace

constexpr Tier avx_vnni = [] {
  Tier t{};
  t.name = "avx_vnni";
  t.runs_here = runs_here;
  t.base = &avx2;
  t.int8 = kernel<Vnni256>();
  t.int16 = kernel<Int16Tier<Vnni256Words>>();
  t.int8_int4 = int8_int4<Avx2Machine>();
  t.weight_only = {weight_only_bytes, weight_only_run};
  t.recurrent = recurrent<IntegerProduct<Vnni256, 3, 3>>();
  t.recurrent_int16 = recurrent<IntegerProduct<Vnni256Words, 3, 3, double>>();
  t.conv = conv<IntegerConv<Vnni256>>();
  t.attention = attention<AttentionProduct<Vnni256>>();
  t.cache = cached<Vnni256>();
  return t;
}();

}  // namespace qnn
