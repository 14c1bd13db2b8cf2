// Plain C++ for any CPU, in vectors that the compiler lowers to what there is (SSE2, NEON, …): w
// and x as 16-bit values, products in 32 bits.
#ifndef QNN_LANES  // a test has more
#define QNN_LANES 4
#endif
#include "attention/cache_loops.h"
#include "attention/loops.h"
#include "conv/loops.h"
#include "embedding/embedding.h"
#include "linear/loops.h"
#include "norm/rows.h"
#include "recurrent/recurrent.h"
#include "tiers/tiers.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace qnn {
namespace {

struct PlainMachine {
  using Turns = PlainMachine;
  using Session = NoSession;
  static constexpr int64_t kDepth = 512, kWordStep = 1;
  static constexpr int64_t kTileGroups = 32, kTileBytes = 1 << 18, kChunk = 32, kDotRows = 4,
                           kDotColumns = 2;
  static constexpr int kPanelRows[2] = {8, 4};

  static void transpose(const void* from, int64_t in_stride, void* to, int64_t out_stride) {
    const char* in = static_cast<const char*>(from);
    char* out = static_cast<char*>(to);
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < kLanes; ++j)
        write(out + j * out_stride + i * 4, read<int32_t>(in + i * in_stride + j * 4));
    }
  }

  static float sum(vfloat s) {
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += s[lane];
    return total;
  }
};

struct Plain : PlainMachine, Inner<Plain> {
  using Code = int16_t;
  using Panel = int16_t;
  using Acc = int32_t;
  using Sum = vint;
  static constexpr bool kQuantizes = true;
  static constexpr int64_t kGroup = 2, kOffset = 0;

  static void fill_panel(Panel* to, const int8_t* w, int64_t depth) {
    for (int64_t i = 0; i < depth; ++i) to[i] = w[i];
    for (int64_t i = depth; i % kGroup != 0; ++i) to[i] = 0;
  }

  static vint multiply_add(vint sum, vint column, vint row) {
#if defined(__SSE2__) && QNN_LANES == 4
    return sum + (vint)_mm_madd_epi16((__m128i)column, (__m128i)row);
#else
    return sum + ((column << 16) >> 16) * ((row << 16) >> 16) + (column >> 16) * (row >> 16);
#endif
  }

  static vint column(const int8_t* w, int64_t left) {
    Code codes[kGroup * kLanes] = {};
    for (int64_t i = 0; i < kGroup * kLanes && i < left; ++i) codes[i] = w[i];
    return read<vint>(codes);
  }

  static int32_t sum(vint s) {
    int32_t total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += s[lane];
    return total;
  }
};

bool runs_here() { return true; }

}  // namespace

constexpr Tier portable = [] {
  Tier t{};
  t.name = "portable";
  t.runs_here = runs_here;
  t.int8 = kernel<Plain>();
  t.int16 = kernel<Int16Tier<Plain>>();
  t.int8_int4 = int8_int4<PlainMachine>();
  t.weight_only = kernel<FloatTier<PlainMachine>>();
  t.quantize = quantize;
  t.look_up = look_up<FloatTier<PlainMachine>>;
  t.norm = norm_rows;
  t.recurrent = recurrent<IntegerProduct<Plain, 2, 3>>();
  t.recurrent_int16 = recurrent<IntegerProduct<Plain, 2, 3, double>>();
  t.recurrent_weight = recurrent<FloatProduct<PlainMachine, 2, 3>>();
  t.conv = conv<IntegerConv<Plain>>();
  t.conv_int16 = conv<Int16Conv<Plain>>();
  t.conv_weight = conv<FloatConv<PlainMachine>>();
  t.attention = attention<AttentionProduct<Plain>>();
  t.cache = cached<Plain>();
  return t;
}();

}  // namespace qnn
