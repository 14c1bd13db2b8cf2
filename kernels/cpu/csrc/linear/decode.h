// The tiers in float32, whose weight comes in any format: how codes of w become floats, in
// registers, and what is the same for all formats. A decoder is a struct D:
//
// clang-format off
//   kVectors            vectors of floats that a step gives
//   kUnit               a float times this is the value of its code
//   State               what a row's decoding leaves behind; zeros at first
//   decode(w, i, left, v, state)
//                       the codes from i on, of which `left` are there, to v; zeros, or floats that
//                       meet zeros of x, behind them
//   spoilt(state)       the row holds a NaN that its floats do not show
//   arrange(x, count)   a row of x to the order of the floats of `decode`; count: whole lines
//   natural(v)          those floats to the order of K
// clang-format on
#pragma once

#include "linear/inner.h"

namespace qnn {
namespace {

// The values of all e4m3 codes: sign, four bits of exponent with bias 7, three of mantissa; no inf.
struct E4m3Table {
  float values[256] = {};
  constexpr E4m3Table() {
    for (int code = 0; code < 128; ++code) {
      const int exponent = code >> 3;
      float value = static_cast<float>(exponent == 0 ? code & 7 : (code & 7) + 8) / 512;
      for (int i = 1; i < exponent; ++i) value *= 2;
      if (code == 127) value = __builtin_nanf("");
      values[code] = value;
      values[code + 128] = -value;
    }
  }
};
constexpr E4m3Table kE4m3;
constexpr float kE2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
constexpr int64_t kBlock = 16;  // codes of e2m1 that share a scale

// A row of w.
struct WeightRow {
  Weight format;
  const uint8_t* codes;
  const uint8_t* scales;  // of blocks, for e2m1
};

// A decoder whose floats lie as their codes do and show every NaN.
struct InOrder {
  struct State {};
  static constexpr int kVectors = 1;
  static constexpr float kUnit = 1;
  static bool spoilt(State) { return false; }
  static void arrange(float*, int64_t) {}
  static void natural(vfloat*) {}
};

// Bytes from `p` on, of which `left` are there; zeros behind them.
template <class V>
inline V bytes_of(const uint8_t* p, int64_t left) {
  if (left >= static_cast<int64_t>(sizeof(V))) return read<V>(p);
  uint8_t some[sizeof(V)] = {};
  std::memcpy(some, p, left);
  return read<V>(some);
}

// e4m3 by way of float16, whose exponent has one bit more and a bias of 15: moved to its place, a
// code is the float16 of 1/256 of its value, subnormals included, and the CPU's conversion of
// float16 honours those whatever the mode for denormals. NaN would be ±480, and is looked for
// beside it: a NaN anywhere in a row of w makes all its outputs NaN. Two codes to a word, the even
// one in the low byte, so the even codes of 2 kLanes come first and then the odd ones. On one
// Zen 4 core 8.4 M codes times one row take 386 µs (372 if NaN is not looked for); sign-extended in
// order 419, and 616 with NaN and 256 put in place for each code.
struct E4m3Pairs {
  typedef uint8_t State __attribute__((vector_size(2 * QNN_LANES)));
  static constexpr int kVectors = 2;
  static constexpr float kUnit = 256;

  static void decode(const WeightRow& w, int64_t i, int64_t left, vfloat* v, State& most) {
    const vshort pairs = bytes_of<vshort>(w.codes + i, left);
    const State magnitude = (State)pairs & 0x7f;
    most = magnitude > most ? magnitude : most;
    // The sign comes with a copy of itself, which is masked out.
    const int16_t mask = static_cast<int16_t>(0xbf80);
    const vshort even = ((pairs << 8) >> 1) & mask, odd = (pairs >> 1) & mask;
    v[0] = Float16::load(reinterpret_cast<const uint16_t*>(&even));
    v[1] = Float16::load(reinterpret_cast<const uint16_t*>(&odd));
  }
  static bool spoilt(State most) {
    const State carry = (most + 1) & 0x80;  // from 127 only
    uint64_t words[sizeof(State) / 8], any = 0;
    std::memcpy(words, &carry, sizeof words);
    for (const uint64_t word : words) any |= word;
    return any != 0;
  }
};

// R rows of x, arranged, `stride` floats apart, times kDotColumns rows of w: [R][kChunk] sums.
template <class T, class D, int R>
QNN_KERNEL void dot_floats(const float* x, int64_t stride, const WeightRow* w, int64_t k,
                           float* acc) {
  vfloat sums[R][T::kDotColumns];
  typename D::State states[T::kDotColumns] = {};
  WeightRow rows[T::kDotColumns];
#pragma GCC unroll 4
  for (int c = 0; c < T::kDotColumns; ++c) rows[c] = w[c];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < T::kDotColumns; ++c) sums[r][c] = vfloat{};
  }
  constexpr int64_t kStep = D::kVectors * kLanes;
  const auto step = [&](int64_t i, int64_t left) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int c = 0; c < T::kDotColumns; ++c) {
      vfloat v[D::kVectors];
      D::decode(rows[c], i, left, v, states[c]);
#pragma GCC unroll 2
      for (int j = 0; j < D::kVectors; ++j) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sums[r][c] = fma(v[j], read<vfloat>(x + r * stride + i + j * kLanes), sums[r][c]);
      }
    }
  };
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) step(i, kStep);
  if (i < k) step(i, k - i);
#pragma GCC unroll 4
  for (int c = 0; c < T::kDotColumns; ++c) {
    const float unit = D::spoilt(states[c]) ? __builtin_nanf("") : D::kUnit;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r * T::kChunk + c] = T::sum(sums[r][c]) * unit;
  }
}

// The codes of a row of w from k on, as floats in order; a NaN that they do not show goes first.
template <class D>
inline void decode_panel(float* to, const WeightRow& w, int64_t k, int64_t depth) {
  typename D::State state = {};
  for (int64_t i = 0; i < depth; i += D::kVectors * kLanes) {
    vfloat v[D::kVectors];
    D::decode(w, k + i, depth - i, v, state);
    D::natural(v);
    for (int j = 0; j < D::kVectors; ++j) {
      if constexpr (D::kUnit != 1) v[j] *= D::kUnit;
      write(to + i + j * kLanes, v[j]);
    }
  }
  if (D::spoilt(state)) to[0] = __builtin_nanf("");
}

// What a tier in float32 has beside its machine's part and its decoders.
template <class Machine, class Int8, class E4m3, class E2m1>
struct FloatTier : Machine, Inner<FloatTier<Machine, Int8, E4m3, E2m1>> {
  using Code = float;
  using Panel = float;
  using Acc = float;
  using Sum = vfloat;
  using Row = WeightRow;
  static constexpr bool kQuantizes = false;
  static constexpr int64_t kGroup = 1, kOffset = 0;

  static vfloat multiply_add(vfloat sum, vfloat column, vfloat row) {
    return fma(column, row, sum);
  }

  static Row row(const Linear& p, int64_t n) {
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(p.w) + n * p.w_stride;
    return {p.weight, codes,
            p.weight == Weight::e2m1 ? p.block_scale + n * div_up(p.k, kBlock) : nullptr};
  }

  template <class Run>
  static void with_decoder(Weight format, const Run& run) {
    switch (format) {
      case Weight::int8:
        return run(Int8{});
      case Weight::e4m3:
        return run(E4m3{});
      case Weight::e2m1:
        return run(E2m1{});
    }
  }

  static void arrange(Weight format, float* x, int64_t count) {
    with_decoder(format, [&](auto decoder) { decltype(decoder)::arrange(x, count); });
  }
  static void fill_panel(Panel* to, const Row& w, int64_t k, int64_t depth) {
    with_decoder(w.format, [&](auto decoder) { decode_panel<decltype(decoder)>(to, w, k, depth); });
  }
  template <int R>
  static void dot(const float* x, int64_t stride, const Row* w, int64_t k, float* acc) {
    with_decoder(w->format, [&](auto decoder) {
      dot_floats<FloatTier, decltype(decoder), R>(x, stride, w, k, acc);
    });
  }
};

}  // namespace
}  // namespace qnn
