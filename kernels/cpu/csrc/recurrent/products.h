// The products of the recurrent layers. A tier gives them as a struct P:
//
// clang-format off
//   Code, Acc           what activations are multiplied as, and the sums: of 16-bit codes double
//   kQuantizes          activations are integers; else float32
//   kShifts, kLeast     as bytes: code - low of their part + kLeast; else as they are
//   kGroup              codes that one 32-bit word of activations or of weights stands for
//   kWordStep           words that a product takes at a time
//   kTileRows           rows that `multiply` takes at most
//   Session             lives while a thread works on a call
//   transpose           kLanes × kLanes words, rows so many bytes apart
//   widen               codes of a row of w to kLanes words, as a panel has them
//   sum_of_codes        onto the sums of a panel's lanes, where kShifts
//   multiply<G>         rows × G · kLanes columns
// clang-format on
#pragma once

#include "recurrent/cell.h"

namespace qnn {
namespace {

// A vector of a product's sums, and the largest code of what it multiplies.
template <class P>
using Sums = std::conditional_t<std::is_same_v<typename P::Acc, double>, vdouble,
                                std::conditional_t<P::kQuantizes, vint, vfloat>>;
template <class P>
constexpr int kMostCodeOf = std::is_same_v<typename P::Acc, double> ? 32767 : 127;

// Of integers, by a machine's multiply_add(sum, x, w): R rows a call times G gates. Sums of 16-bit
// codes, of which 32 bits hold so many pairs, are added in double, exactly.
template <class M, int kMost4, int kMost3, class Total = int32_t>
struct IntegerProduct : M {
  using Code = std::conditional_t<M::kGroup == 4, uint8_t, int16_t>;
  using Acc = Total;
  static constexpr bool kGoesOn = std::is_same_v<Acc, double>;
  static constexpr int64_t kPairs = 256;
  static_assert(!kGoesOn || M::kGroup == 2);
  static constexpr bool kQuantizes = true, kShifts = M::kGroup == 4;
  static constexpr int32_t kLeast = M::kOffset != 0 ? 0 : -128;  // of an unsigned or a signed byte
  static constexpr int64_t kGroup = M::kGroup, kWordStep = 1, kTileRows = 18;
  template <int G>
  static constexpr int kMost = G == 4 ? kMost4 : kMost3;

  static void widen(const int8_t* w, int64_t count, char* to) {
    using Panel = std::conditional_t<kShifts, int8_t, int16_t>;
    constexpr int64_t kAll = kGroup * kLanes;
    Panel codes[kAll] = {};
    if (count >= kAll) {
      for (int64_t i = 0; i < kAll; ++i) codes[i] = w[i];
    } else {
      for (int64_t i = 0; i < count; ++i) codes[i] = w[i];
    }
    std::memcpy(to, codes, sizeof codes);
  }
  static vint sum_of_codes(vint sum, vint words) {
    return M::multiply_add(sum, splat(0x01010101), words);
  }

  template <int R, int G>
  QNN_KERNEL static void product(const Code* x, int64_t stride, const char* panel,
                                 const int32_t* start, int64_t words, int32_t* acc) {
    vint sums[R][G];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) sums[r][g] = read<vint>(start + g * kLanes);
    }
    for (int64_t word = 0; word < words; ++word) {
      vint w[G];
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) w[g] = read<vint>(panel + (word * G + g) * kLanes * 4);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vint codes = splat(read<int32_t>(x + r * stride + word * kGroup));
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sums[r][g] = M::multiply_add(sums[r][g], codes, w[g]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) write(acc + (r * G + g) * kLanes, sums[r][g]);
    }
  }

  template <int G, int R = kMost<G>>
  static void rows(int64_t count, const Code* x, int64_t stride, const char* panel,
                   const int32_t* start, int64_t words, Acc* acc) {
    if (count != R) {
      if constexpr (R > 1) rows<G, R - 1>(count, x, stride, panel, start, words, acc);
    } else if constexpr (kGoesOn) {
      constexpr int64_t kSums = R * G * kLanes;
      alignas(64) int32_t some[kSums];
      for (int64_t begin = 0; begin == 0 || begin < words; begin += kPairs) {
        // The same kernel as of the sums that stay in 32 bits.
        IntegerProduct<M, kMost4, kMost3>::template product<R, G>(
            x + begin * kGroup, stride, panel + begin * G * kLanes * 4, start,
            smaller(kPairs, words - begin), some);
        add_sums(some, kSums, begin > 0, acc);
      }
    } else {
      product<R, G>(x, stride, panel, start, words, acc);
    }
  }

  // acc [rows][G][kLanes] = start + x · panel; of 16-bit codes `start` is zeros.
  template <int G>
  QNN_KERNEL static void multiply(const Code* x, int64_t stride, int64_t count, const char* panel,
                                  const int32_t* start, int64_t words, Acc* acc) {
    const int64_t times = div_up(count, kMost<G>);
    for (int64_t i = 0; i < times; ++i) {
      const int64_t row = count * i / times, some = count * (i + 1) / times - row;
      rows<G>(some, x + row * stride, stride, panel, start, words, acc + row * G * kLanes);
    }
  }
};

// Of float32 by int8, four codes a word, each made a float on its way.
template <class M, int kMost4, int kMost3>
struct FloatProduct : M {
  using Code = float;
  using Acc = float;
  static constexpr bool kQuantizes = false, kShifts = false;
  static constexpr int32_t kLeast = 0;
  static constexpr int64_t kGroup = 4, kWordStep = 1, kTileRows = 18;
  template <int G>
  static constexpr int kMost = G == 4 ? kMost4 : kMost3;

  static void widen(const int8_t* w, int64_t count, char* to) {
    int8_t codes[kGroup * kLanes] = {};
    std::memcpy(codes, w, count < kGroup * kLanes ? count : kGroup * kLanes);
    std::memcpy(to, codes, sizeof codes);
  }
  static vint sum_of_codes(vint sum, vint) { return sum; }

  // Sums of 256 products, added up: the error of one long sum would be several times as large.
  template <int R, int G>
  QNN_KERNEL static void product(const float* x, int64_t stride, const char* panel, int64_t words,
                                 float* acc) {
    constexpr int64_t kWords = 64;
    for (int64_t begin = 0; begin == 0 || begin < words; begin += kWords) {
      vfloat sums[R][G];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sums[r][g] = vfloat{};
      }
      const int64_t end = words - begin < kWords ? words : begin + kWords;
      for (int64_t word = begin; word < end; ++word) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          vfloat w[G];
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) {
            w[g] = floats((read<vint>(panel + (word * G + g) * kLanes * 4) << (24 - 8 * j)) >> 24);
          }
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const vfloat value = splat(x[r * stride + word * 4 + j]);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) sums[r][g] = fma(value, w[g], sums[r][g]);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          float* to = acc + (r * G + g) * kLanes;
          write(to, begin == 0 ? sums[r][g] : read<vfloat>(to) + sums[r][g]);
        }
      }
    }
  }

  template <int G, int R = kMost<G>>
  static void rows(int64_t count, const float* x, int64_t stride, const char* panel, int64_t words,
                   float* acc) {
    if (count == R) return product<R, G>(x, stride, panel, words, acc);
    if constexpr (R > 1) rows<G, R - 1>(count, x, stride, panel, words, acc);
  }

  template <int G>
  QNN_KERNEL static void multiply(const float* x, int64_t stride, int64_t count, const char* panel,
                                  const int32_t*, int64_t words, float* acc) {
    const int64_t times = div_up(count, kMost<G>);
    for (int64_t i = 0; i < times; ++i) {
      const int64_t row = count * i / times, some = count * (i + 1) / times - row;
      rows<G>(some, x + row * stride, stride, panel, words, acc + row * G * kLanes);
    }
  }
};

}  // namespace
}  // namespace qnn
