// Plain C++ for any CPU, in vectors that the compiler lowers to what there is (SSE2, NEON, …): w
// and x as 16-bit values, products in 32 bits.
#define QNN_LANES 4
#include "loops.h"
#include "tiers.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace qnn {
namespace {

template <class CodeT, class AccT, class SumT>
struct Plain : Inner<Plain<CodeT, AccT, SumT>> {
  using Code = CodeT;
  using Panel = CodeT;
  using Acc = AccT;
  using Sum = SumT;
  using Session = NoSession;
  static constexpr bool kQuantizes = sizeof(Code) < 4;
  static constexpr int64_t kGroup = 4 / sizeof(Code), kOffset = 0, kDepth = 512, kWordStep = 1;
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

  static void fill_panel(Panel* to, const int8_t* w, int64_t depth) {
    for (int64_t i = 0; i < depth; ++i) to[i] = w[i];
    for (int64_t i = depth; i % kGroup != 0; ++i) to[i] = 0;
  }

  static Sum multiply_add(Sum sum, Sum column, Sum row) {
    if constexpr (kGroup == 1) {
      return sum + column * row;
    } else {
#if defined(__SSE2__)
      return sum + (vint)_mm_madd_epi16((__m128i)column, (__m128i)row);
#else
      return sum + ((column << 16) >> 16) * ((row << 16) >> 16) + (column >> 16) * (row >> 16);
#endif
    }
  }

  static Sum column(const int8_t* w, int64_t left) {
    Code codes[kGroup * kLanes] = {};
    for (int64_t i = 0; i < kGroup * kLanes && i < left; ++i) codes[i] = w[i];
    return read<Sum>(codes);
  }

  static Acc sum(Sum s) {
    Acc total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += s[lane];
    return total;
  }
};

}  // namespace

extern const Tier portable = {"portable", [] { return true; },
                              kernel<Plain<int16_t, int32_t, vint>>(),
                              kernel<Plain<float, float, vfloat>>(), quantize};

}  // namespace qnn
