// The tiers in float32, whose weight comes in any format: see linear/decoders/decoder.h.
#pragma once

#include "linear/decoders.h"
#include "linear/inner.h"

namespace qnn {
namespace {

// R rows of x, arranged, `stride` floats apart, times C rows of w: [R][kChunk] sums.
template <class T, class D, int R, int C>
QNN_KERNEL void dot_floats(const float* x, int64_t stride, const WeightRow* w, int64_t k,
                           float* acc) {
  vfloat sums[R][C];
  typename D::State states[C] = {};
  WeightRow rows[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) rows[c] = w[c];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = vfloat{};
  }
  const auto step = [&](int64_t i, int64_t left) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      D::template step<R>(rows[c], i, left, x, stride, states[c],
                          [&](int r, vfloat a, vfloat b) __attribute__((always_inline)) {
                            sums[r][c] = fma(a, b, sums[r][c]);
                          });
    }
  };
  int64_t i = 0;
  for (; i + D::kStep <= k; i += D::kStep) step(i, D::kStep);
  if (i < k) step(i, k - i);
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    const float unit = D::unit(states[c]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r * T::kChunk + c] = T::sum(sums[r][c]) * unit;
  }
}

// What a tier in float32 has beside its machine's part, over the weights that `Decoders` read.
template <class Machine, class Decoders = AllDecoders>
struct FloatTier : Machine, Inner<FloatTier<Machine, Decoders>> {
  using Code = float;
  using Panel = float;
  using Acc = float;
  using Sum = vfloat;
  using Row = WeightRow;
  static constexpr bool kQuantizes = false;
  static constexpr int64_t kGroup = 1, kOffset = 0, kRowStep = larger(kLine, Decoders::kStep);

  static vfloat multiply_add(vfloat sum, vfloat column, vfloat row) {
    return fma(column, row, sum);
  }

  static Row row(const Linear& p, int64_t n) { return weight_row(p, n); }

  static void arrange(Decoder which, float* x, int64_t count) {
    Decoders::with(which, [&](auto decoder) { decltype(decoder)::arrange(x, count); });
  }
  static void fill_panel(Panel* to, const Row& w, int64_t k, int64_t depth) {
    Decoders::with(w.decoder, [&](auto decoder) { decltype(decoder)::panel(to, w, k, depth); });
  }
  template <int R>
  static void dot(const float* x, int64_t stride, const Row* w, int64_t k, float* acc) {
    Decoders::with(w->decoder, [&](auto decoder) {
      using D = decltype(decoder);
      constexpr int kColumns = D::kInTurn ? 1 : Machine::kDotColumns;
      for (int c = 0; c < Machine::kDotColumns; c += kColumns)
        dot_floats<FloatTier, D, R, kColumns>(x, stride, w + c, k, acc + c);
    });
  }
};

}  // namespace
}  // namespace qnn
