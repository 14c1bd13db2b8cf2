// The tiers in int16: x in 16 bits, w in 8.
#pragma once

#include "common/rows.h"
#include "linear/inner.h"

namespace qnn {
namespace {

// Of a machine M that multiplies 16-bit codes in pairs, with sums in 32 bits. A sum of 256 pairs is
// below 2^31; it goes on in double, which holds every sum here exactly. Two planes of bytes would
// take twice as many products where bytes are widened to 16 bits, and as many where they are
// multiplied as they are.
template <class M>
struct Int16Tier : M {
  using Code = typename M::Code;
  using Acc = double;
  using Sum = vdouble;
  static constexpr int64_t kPairs = 256;
  static_assert(kPairs * 2 * 32767 * 128 < int64_t{1} << 31);
  static_assert(sizeof(Code) == 2 && M::kOffset == 0 && M::kDepth <= 2 * kPairs);

  // The machine's own kernel, over one panel.
  template <int R, int G>
  static void block(const Product<Int16Tier>& p) {
    alignas(64) int32_t some[R * G * kLanes] = {};
    M::template block<R, G>({p.x, p.x_stride, p.words, p.panel, some, G * kLanes, p.next,
                             p.next_stride, p.next_shift, p.group});
    for (int r = 0; r < R; ++r)
      add_sums(some + r * G * kLanes, G * kLanes, true, p.acc + r * p.acc_stride);
  }

  // R rows of x, `stride` codes apart, times kDotColumns rows of w: [R][kChunk] sums.
  template <int R>
  QNN_KERNEL static void dot(const Code* x, int64_t stride, const int8_t* const* w, int64_t k,
                             Acc* acc) {
    constexpr int64_t kStep = 2 * kLanes;
    for (int64_t begin = 0; begin == 0 || begin < k; begin += kPairs * kStep) {
      vint sums[R][M::kDotColumns];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < M::kDotColumns; ++c) sums[r][c] = vint{};
      }
      const int64_t end = smaller(k, begin + kPairs * kStep);
      for (int64_t i = begin; i < end; i += kStep) {
        vint rows[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) rows[r] = read<vint>(x + r * stride + i);
#pragma GCC unroll 4
        for (int c = 0; c < M::kDotColumns; ++c) {
          const vint column = M::column(w[c] + i, k - i);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sums[r][c] = M::multiply_add(sums[r][c], column, rows[r]);
        }
      }
      alignas(64) vint all[R * M::kDotColumns];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < M::kDotColumns; ++c) all[r * M::kDotColumns + c] = sums[r][c];
      }
#pragma GCC unroll 1
      for (int i = 0; i < R * M::kDotColumns; ++i) {
        Acc& to = acc[i / M::kDotColumns * M::kChunk + i % M::kDotColumns];
        to = (begin == 0 ? 0 : to) + total(all[i]);
      }
    }
  }

  // Over the lanes, whose sum 32 bits may not hold, but those of their halves.
  static double total(vint sums) { return 65536.0 * M::sum(sums >> 16) + M::sum(sums & 0xffff); }
};

}  // namespace
}  // namespace qnn
