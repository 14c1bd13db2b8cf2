// How codes of w become floats in registers, or products. A decoder is a struct D in a file of its
// own here, and a word in the list of linear/decoders.h:
//
// clang-format off
//   kDecoder            its name in a WeightFormat
//   kStep               codes that `step` takes
//   kInTurn             rows of w are taken one after the other; else kDotColumns of them at once
//   State               what a row's steps leave; zeros at first
//   arrange(x, count)   a row of x to the form that `step` wants, in place; count: whole steps
//   step<R>(w, i, left, x, stride, state, add)
//                       the codes of w from i on, of which `left` are there, times R rows of x: onto
//                       the sums, as add(row, a, b) of vectors whose product is added
//   unit(state)         what a row's sums are to be multiplied by
//   panel(to, w, i, count, each)
//                       the values of the codes from i on, in order, as each(value) if it is given;
//                       as bfloat16, of 16 lanes, where `to` is, which holds each exactly. Without
//                       the scale of their group where that is float32: see Bfloat16Tier
// clang-format on
//
// One whose codes become floats first is a ByFloats<D>, and has instead of the last four
//
// clang-format off
//   kUnit               a float times this is the value of its code
//   decode(w, i, left, state, use)
//                       the floats of a step, as use(0, floats), use(1, …); after those that are
//                       there zeros, or floats that meet zeros of x
//   spoilt(state)       the row holds a NaN that its floats do not show
//   natural(v)          those floats to the order of K
// clang-format on
#pragma once

#include "common/vec.h"
#include "linear/linear.h"

namespace qnn {
namespace {

// A row of w.
struct WeightRow {
  Decoder decoder;
  const uint8_t* codes;
  const void* scales;          // of its groups
  const uint8_t* zero_points;  // of its groups, or null
  int shift;                   // a group is 2^shift codes
};

// Row n of the weight of a call.
inline WeightRow weight_row(const Linear& p, int64_t n) {
  const int64_t groups = p.weight.groups(p.k), at = n * groups;
  WeightRow row{p.weight.decoder,
                reinterpret_cast<const uint8_t*>(p.w) + n * p.weight.row_bytes(p.k), nullptr,
                p.zero_points == nullptr ? nullptr : p.zero_points + at,
                p.weight.grouped() ? __builtin_ctzll(p.weight.group) : 0};
  if (p.weight.grouped()) {
    row.scales = p.weight.scale == ScaleKind::float32
                     ? static_cast<const void*>(static_cast<const float*>(p.group_scale) + at)
                     : static_cast<const uint8_t*>(p.group_scale) + at;
  }
  return row;
}

struct AsTheyAre {
  vfloat operator()(vfloat v) const { return v; }
};

// Vectors of values that go to a panel at a time.
inline void put(float* to, const vfloat* v) { write(to, *v); }
inline void put_nan(float* to) { *to = __builtin_nanf(""); }

template <class To>
constexpr int kPut = 1;  // To is a pointer, or what stands for one

#if defined(__AVX512BW__) && QNN_LANES == 16
// Two, as bfloat16: their upper halves.
template <>
constexpr int kPut<uint16_t*> = 2;

inline void put(uint16_t* to, const vfloat* v) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  write(to, _mm512_permutex2var_epi16((__m512i)v[0], read<__m512i>(kUpper), (__m512i)v[1]));
}
inline void put_nan(uint16_t* to) { *to = 0x7fc0; }

// Where the lines of 16 rows of a panel alternate, so that a square of it is one piece.
struct Alternating {
  uint16_t* first;
  Alternating operator+(int64_t codes) const { return {first + 16 * codes}; }
};
template <>
constexpr int kPut<Alternating> = kPut<uint16_t*>;
inline void put(Alternating to, const vfloat* v) { put(to.first, v); }
inline void put_nan(Alternating to) { put_nan(to.first); }
#endif

template <class D>
struct ByFloats {
  static constexpr bool kInTurn = false;

  template <int R, class State, class Add>
  static QNN_INLINE void step(const WeightRow& w, int64_t i, int64_t left, const float* x,
                              int64_t stride, State& state, const Add& add) {
    D::decode(w, i, left, state, [&](int j, vfloat v) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) add(r, v, read<vfloat>(x + r * stride + i + j * kLanes));
    });
  }
  template <class State>
  static float unit(const State& state) {
    return D::spoilt(state) ? __builtin_nanf("") : D::kUnit;
  }
  // A NaN that the floats do not show goes first.
  template <class To, class Each = AsTheyAre>
  static void panel(To to, const WeightRow& w, int64_t k, int64_t depth, const Each& each = {}) {
    constexpr int64_t kTaken = larger(D::kStep, kPut<To> * kLanes);
    typename D::State state = {};
    for (int64_t i = 0; i < depth; i += kTaken) {
      vfloat v[kTaken / kLanes] = {};
      for (int64_t s = 0; s < kTaken && (s == 0 || i + s < depth); s += D::kStep) {
        vfloat* some = v + s / kLanes;
        D::decode(w, k + i + s, depth - i - s, state,
                  [&](int j, vfloat floats) { some[j] = floats; });
        D::natural(some);
      }
      for (vfloat& value : v) {
        if constexpr (D::kUnit != 1) value *= D::kUnit;
        value = each(value);
      }
      for (int j = 0; j < kTaken / kLanes; j += kPut<To>) put(to + i + j * kLanes, v + j);
    }
    if (D::spoilt(state)) put_nan(to);
  }
};

// Whose floats are values in the order of their codes, and show every NaN.
template <class D>
struct InOrder : ByFloats<D> {
  struct State {};
  static constexpr int64_t kStep = kLanes;
  static constexpr float kUnit = 1;
  static bool spoilt(State) { return false; }
  static void arrange(float*, int64_t) {}
  static void natural(vfloat*) {}
};

}  // namespace
}  // namespace qnn
