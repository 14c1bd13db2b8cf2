// The tiers in float32, whose weight comes in any format: see linear/decoders/decoder.h.
#pragma once

#include "linear/decoders.h"
#include "linear/inner.h"

namespace qnn {
namespace {

// R rows of x, arranged, `stride` floats apart, times kDotColumns rows of w: [R][kChunk] sums.
template <class T, class D, int R>
QNN_KERNEL void dot_floats(const float* x, int64_t stride, const WeightRow* w, int64_t k,
                           float* acc) {
  constexpr int kColumns = D::kInTurn ? 1 : T::kDotColumns;
  for (int first = 0; first < T::kDotColumns; first += kColumns) {
    vfloat sums[R][kColumns];
    typename D::State states[kColumns] = {};
    WeightRow rows[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) rows[c] = w[first + c];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[r][c] = vfloat{};
    }
    const auto step = [&](int64_t i, int64_t left) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const auto sum = [&](int r)
                             __attribute__((always_inline)) -> vfloat& { return sums[r][c]; };
        D::template step<R>(rows[c], i, left, x, stride, states[c], sum);
      }
    };
    int64_t i = 0;
    for (; i + D::kStep <= k; i += D::kStep) step(i, D::kStep);
    if (i < k) step(i, k - i);
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const float unit = D::unit(states[c]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r * T::kChunk + first + c] = T::sum(sums[r][c]) * unit;
    }
  }
}

// What a tier in float32 has beside its machine's part.
template <class Machine>
struct FloatTier : Machine, Inner<FloatTier<Machine>> {
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

  static Row row(const Linear& p, int64_t n) {
    const int64_t groups = p.weight.groups(p.k), at = n * groups;
    Row row{p.weight.decoder, reinterpret_cast<const uint8_t*>(p.w) + n * p.weight.row_bytes(p.k),
            nullptr, p.zero_points == nullptr ? nullptr : p.zero_points + at,
            p.weight.grouped() ? __builtin_ctzll(p.weight.group) : 0};
    if (p.weight.grouped()) {
      row.scales = p.weight.scale == ScaleKind::float32
                       ? static_cast<const void*>(static_cast<const float*>(p.group_scale) + at)
                       : static_cast<const uint8_t*>(p.group_scale) + at;
    }
    return row;
  }

  static void arrange(Decoder which, float* x, int64_t count) {
    Decoders::with(which, [&](auto decoder) { decltype(decoder)::arrange(x, count); });
  }
  static void fill_panel(Panel* to, const Row& w, int64_t k, int64_t depth) {
    Decoders::with(w.decoder, [&](auto decoder) { decltype(decoder)::panel(to, w, k, depth); });
  }
  template <int R>
  static void dot(const float* x, int64_t stride, const Row* w, int64_t k, float* acc) {
    Decoders::with(w->decoder, [&](auto decoder) {
      dot_floats<FloatTier, decltype(decoder), R>(x, stride, w, k, acc);
    });
  }
};

}  // namespace
}  // namespace qnn
