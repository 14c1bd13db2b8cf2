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
//                       the values of the codes from i on, in order, as each(value) if it is given
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

struct AsTheyAre {
  vfloat operator()(vfloat v) const { return v; }
};

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
  template <class Each = AsTheyAre>
  static void panel(float* to, const WeightRow& w, int64_t k, int64_t depth,
                    const Each& each = {}) {
    typename D::State state = {};
    for (int64_t i = 0; i < depth; i += D::kStep) {
      vfloat v[D::kStep / kLanes];
      D::decode(w, k + i, depth - i, state, [&](int j, vfloat floats) { v[j] = floats; });
      D::natural(v);
      for (int j = 0; j < D::kStep / kLanes; ++j) {
        if constexpr (D::kUnit != 1) v[j] *= D::kUnit;
        write(to + i + j * kLanes, each(v[j]));
      }
    }
    if (D::spoilt(state)) to[0] = __builtin_nanf("");
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
