// The inner kernels of all tiers but AMX, in terms of a tier's vectors:
//
// clang-format off
//   Sum                      a vector of sums
//   multiply_add(s, c, r)    s + c · r, lane by lane, each lane kGroup products; c and r are words:
//                            floats, or integers that hold several codes
//   column(w, left)          a vector of codes of one row of w, of which `left` are there; then zeros
//   sum(s)                   over the lanes
// clang-format on
#pragma once

#include "common/scratch.h"
#include "common/vec.h"

namespace qnn {
namespace {

// Whether rows of x are parts of bfloat16.
template <class T>
constexpr bool kInBfloat16 = std::is_same_v<typename T::Code, uint16_t>;

// One more line than the codes, so that rows of a panel do not share the sets of a cache.
template <class T>
constexpr int64_t kPanelStride =
    T::kDepth + kLine / static_cast<int64_t>(sizeof(typename T::Panel));

// What `block` does: acc[r, g] += panel[r] · x[g] over so many words; and it fetches as much of the
// rows of w from `next` on as it reads of the panel, where `next` is not null.
template <class T>
struct Product {
  const typename T::Code* x;  // [group][word][lane]
  int64_t x_stride, words;
  const typename T::Panel* panel;  // [row][kPanelStride]
  typename T::Acc* acc;            // [row][acc_stride], and kLanes sums for each group
  int64_t acc_stride;
  const int8_t* next;
  int64_t next_stride;
  int next_shift;  // 1: two codes a byte
  int64_t group;  // words that share a scale, of which the panel holds none: see Bfloat16Tier; or 0
};

template <class T>
struct Inner {
  static constexpr int64_t kParts = 1;

  // Every loop over the sums is written out, so that they stay in registers. Float sums of a panel
  // begin at zero and are added at the end: of 4,096 terms one after the other the error is 3.5
  // times that of torch's float32 product, of 16 panels of 256 it is about the same.
  template <int R, int G>
  QNN_KERNEL static void block(const Product<T>& p) {
    using Sum = typename T::Sum;
    using Word = std::conditional_t<T::kGroup == 1, float, int32_t>;
    using Words = decltype(splat(Word{}));
    constexpr bool kGoesOn = T::kQuantizes;
    Sum sums[R][G];
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        sums[r][g] = Sum{};
        if constexpr (kGoesOn) sums[r][g] = read<Sum>(p.acc + r * p.acc_stride + g * kLanes);
      }
    }
    for (int64_t begin = 0; begin < p.words; begin += T::kWordStep) {
      if (p.next != nullptr && begin * T::kGroup % kLine == 0) {
        for (int r = 0; r < R; ++r) {
          __builtin_prefetch(p.next + r * p.next_stride + (begin * T::kGroup >> p.next_shift));
        }
      }
      for (int64_t word = begin; word < begin + T::kWordStep; ++word) {
        Words rows[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          rows[g] = read<Words>(p.x + g * p.x_stride + word * T::kGroup * kLanes);
        }
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) {
          const auto* at = p.panel + r * kPanelStride<T> + word * T::kGroup;
          const Words column = splat(read<Word>(at));
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) sums[r][g] = T::multiply_add(sums[r][g], column, rows[g]);
        }
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        typename T::Acc* to = p.acc + r * p.acc_stride + g * kLanes;
        if constexpr (kGoesOn) {
          write(to, sums[r][g]);
        } else {
          write(to, sums[r][g] + read<Sum>(to));
        }
      }
    }
  }

  // R rows of x, `stride` codes apart, times kDotColumns rows of w: [R][kChunk] sums.
  template <int R, class Code, class Acc>
  QNN_KERNEL static void dot(const Code* x, int64_t stride, const int8_t* const* w, int64_t k,
                             Acc* acc) {
    using Sum = typename T::Sum;
    Sum sums[R][T::kDotColumns];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < T::kDotColumns; ++c) sums[r][c] = Sum{};
    }
    for (int64_t i = 0; i < k; i += T::kGroup * kLanes) {
      Sum rows[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) rows[r] = read<Sum>(x + r * stride + i);
#pragma GCC unroll 4
      for (int c = 0; c < T::kDotColumns; ++c) {
        const Sum column = T::column(w[c] + i, k - i);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r][c] = T::multiply_add(sums[r][c], column, rows[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < T::kDotColumns; ++c) acc[r * T::kChunk + c] = T::sum(sums[r][c]);
    }
  }
};

}  // namespace
}  // namespace qnn
