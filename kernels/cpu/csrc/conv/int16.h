// The convolutions in int16: x in 16 bits, w in 8.
#pragma once

#include "conv/image.h"
#include "conv/products.h"

namespace qnn {
namespace {

// Of a machine M that multiplies 16-bit codes in pairs, with sums in 32 bits, as Int16Tier: so a
// product costs what one of int8 costs where bytes are widened to 16 bits. `kDepth` words are
// summed in 32 bits, and their sums in double.
template <class M>
struct Int16Conv : M {
  using Code = int16_t;
  using Acc = int32_t;
  using Sum = vint;
  static constexpr bool kQuantizes = true, kShifts = false, kCouples = false;
  static constexpr int64_t kGroup = M::kGroup, kDepth = 256, kTileWords = 0;
  static constexpr int kMostVectors = kConvVectors;
  static_assert(kGroup == 2 && kDepth * 2 * 32767 * 128 < int64_t{1} << 31);

  static vint weights(const int8_t* w, int64_t left) { return M::column(w, left); }
};

template <class M>
constexpr int kConvMost<Int16Conv<M>> = 32767;

// What the epilogue meets: the exact sums, rounded once.
template <class P>
struct Joined : P {
  using Sum = vfloat;
};

template <class From>
__attribute__((noinline)) void join_sums(const From* from, int64_t count, float* to) {
  using V = std::conditional_t<std::is_same_v<From, double>, vhalfdouble, vhalfint>;
  for (int64_t i = 0; i < count; i += kLanes / 2)
    write(to + i, __builtin_convertvector(read<V>(from + i), vhalffloat));
}

}  // namespace
}  // namespace qnn
