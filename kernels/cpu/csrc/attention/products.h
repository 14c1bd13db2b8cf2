// The two products of attention, of a tier's machine. A tier with tiles of its own has its own
// struct, with the same members:
//
// clang-format off
//   Code, kGroup, kShifts   of weights; codes in a 32-bit word; whether they are bytes
//   kSigned                 codes of queries are signed; else q + 128, and sums begin at a start
//   kMixes                  weights stand in the order of Shorts::key_at<true>
//   kTileRows, kRows        rows of a product, and those that a thread takes at a time
//   Session                 lives while a thread works on rows
//   transpose               kLanes × kLanes words, rows so many bytes apart
//   scores<G>               rows of queries × G vectors of keys
//   values<G>               rows of weights × G vectors of channels, onto sums or anew; in bytes of
//                           both planes
// clang-format on
#pragma once

#include "recurrent/products.h"

namespace qnn {
namespace {

template <class M>
struct AttentionProduct : IntegerProduct<M, 6, 6> {
  using Base = IntegerProduct<M, 6, 6>;
  using typename Base::Code;
  static constexpr bool kSigned = Base::kGroup == 2, kMixes = false;
  static constexpr int64_t kTileRows = 6, kRows = 24;

  template <int G>
  static void scores(int64_t count, const Code* q, int64_t stride, const char* panel,
                     const int32_t* start, int64_t words, int32_t* acc) {
    Base::template rows<G>(count, q, stride, panel, start, words, acc);
  }

  template <int G>
  static void values(int64_t count, const Code* weights, int64_t plane, int64_t stride,
                     const char* panel, int64_t words, bool onto, int32_t* high, int32_t* low) {
    alignas(64) int32_t some[kTileRows * G * kLanes];
    const int32_t zeros[G * kLanes] = {};
    const auto product = [&](const Code* codes, int32_t* sums) {
      Base::template rows<G>(count, codes, stride, panel, zeros, words, onto ? some : sums);
      for (int64_t i = 0; onto && i < count * G * kLanes; i += kLanes)
        write(sums + i, read<vint>(sums + i) + read<vint>(some + i));
    };
    product(weights, high);
    if constexpr (Base::kShifts) product(weights + plane, low);
  }
};

}  // namespace
}  // namespace qnn
