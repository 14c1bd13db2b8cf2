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
struct Plain {
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

  // The products of one word: two 16-bit values, or one float.
  static Sum products(const Code* x, const Panel* w) {
    if constexpr (kGroup == 1) {
      return read<vfloat>(x) * w[0];
    } else {
#if defined(__SSE2__)
      return (vint)_mm_madd_epi16(read<__m128i>(x), _mm_set1_epi32(read<int32_t>(w)));
#else
      const vint pair = read<vint>(x);
      return ((pair << 16) >> 16) * static_cast<int32_t>(w[0]) +
             (pair >> 16) * static_cast<int32_t>(w[1]);
#endif
    }
  }

  template <int R, int G>
  QNN_KERNEL static void block(const Product<Plain>& p) {
    Sum sums[R][G];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) sums[r][g] = read<Sum>(p.acc + r * p.acc_stride + g * kLanes);
    }
    for (int64_t word = 0; word < p.words; ++word) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Panel* w = p.panel + r * Blocked<Plain>::kPanelStride + word * kGroup;
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g)
          sums[r][g] += products(p.x + g * p.x_stride + word * kGroup * kLanes, w);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int g = 0; g < G; ++g) write(p.acc + r * p.acc_stride + g * kLanes, sums[r][g]);
    }
  }

  template <int R>
  QNN_KERNEL static void dot(const Code* x, int64_t stride, const int8_t* const* w, int64_t k,
                             Acc* acc) {
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < kDotColumns; ++c) {
        Acc sum = 0;
        const int8_t* row = w[c];
        const Code* codes = x + r * stride;
        for (int64_t i = 0; i < k; ++i) sum += static_cast<Acc>(codes[i]) * row[i];
        acc[r * kChunk + c] = sum;
      }
    }
  }
};

}  // namespace

extern const Tier portable = {"portable", [] { return true; },
                              kernel<Plain<int16_t, int32_t, vint>>(),
                              kernel<Plain<float, float, vfloat>>(), quantize};

}  // namespace qnn
