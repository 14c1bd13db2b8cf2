// AVX2 without VNNI. Its byte product adds pairs in saturating 16 bits, and so gives wrong sums;
// here both operands are widened to 16 bits, and vpmaddwd adds pairs of exact products. Dense
// convolutions multiply bytes where few weights are large enough for that to matter: see Avx2Bytes.
#define QNN_LANES 8
#include "tiers/avx2.h"

#include "attention/cache_loops.h"
#include "attention/loops.h"
#include "conv/loops.h"
#include "embedding/embedding.h"
#include "linear/loops.h"
#include "norm/rows.h"
#include "recurrent/recurrent.h"
#include "tiers/tiers.h"

namespace qnn {
namespace {

struct Madd : Avx2Words, Inner<Madd> {
  using Acc = int32_t;
  using Sum = vint;

  static vint multiply_add(vint sum, vint column, vint row) {
    return sum + (vint)_mm256_madd_epi16((__m256i)column, (__m256i)row);
  }
};

// A convolution in bytes where that pays, else in words of 16 bits. Short windows are mostly
// epilogue, which is slower after eight channels at a time.
using ByteConv = Convolution<IntegerConv<Avx2Bytes, true>>;
using WordConv = Convolution<IntegerConv<Madd>>;

bool in_bytes(const Conv& p) {
  constexpr int64_t kLeast = 48;
  const int64_t window = p.depth() * p.taps();
#if !defined(QNN_ALWAYS_BYTES)
  if (window < kLeast) return false;
#endif
  return !p.depthwise() && Avx2Bytes::pays(p.w, p.outputs * window);
}

// Enough for either: w may be written to meanwhile.
size_t conv_bytes(const Conv& p, int parts) {
  const size_t bytes = ByteConv::scratch_bytes(p, parts), words = WordConv::scratch_bytes(p, parts);
  return bytes < words ? words : bytes;
}

void conv_run(const Conv& p, int part, int parts, char* scratch) {
  in_bytes(p) ? ByteConv::run(p, part, parts, scratch) : WordConv::run(p, part, parts, scratch);
}

bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

constexpr Tier avx2 = [] {
  Tier t{};
  t.name = "avx2";
  t.runs_here = runs_here;
  t.int8 = kernel<Madd>();
  t.int16 = kernel<Int16Tier<Madd>>();
  t.int8_int4 = int8_int4<Avx2Machine>();
  t.weight_only = kernel<FloatTier<Avx2Machine>>();
  t.quantize = quantize;
  t.look_up = look_up<FloatTier<Avx2Machine>>;
  t.norm = norm_rows;
  t.recurrent = recurrent<IntegerProduct<Madd, 2, 3>>();
  t.recurrent_int16 = recurrent<IntegerProduct<Madd, 2, 3, double>>();
  t.recurrent_weight = recurrent<FloatProduct<Avx2Machine, 2, 3>>();
  t.conv = {WordConv::magnitudes, WordConv::scale, WordConv::quantize, conv_bytes, conv_run};
  t.conv_int16 = conv<Int16Conv<Madd>>();
  t.conv_weight = conv<FloatConv<Avx2Machine>>();
  t.attention = attention<AttentionProduct<Madd>>();
  t.cache = cached<Madd>();
  return t;
}();

}  // namespace qnn
