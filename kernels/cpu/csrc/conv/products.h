// The products of a convolution, and the weight as they take it. A lane is an output channel, and
// words of input channels are sent to all lanes, straight from the image. A tier gives them as a
// struct P:
//
// clang-format off
//   Code, Acc, Sum      what the image holds, a sum, a vector of sums
//   kQuantizes          x is codes; else float32
//   kShifts             codes are unsigned bytes, code - zero point + 128 + zero point
//   kGroup              codes in a 32-bit word
//   kCouples            words are multiplied two by two: see couples.h
//   kMostVectors        of channels in a tile
//   kDepth              words between two additions of float sums, 0: all of them
//   Session             lives while a thread works on a call
//   kTileWords          words that a matrix instruction takes, of 16 pixels; 0: there is none
//   tiles               all of a strip by it, where kTileWords
//   multiply_add        sum + codes · weights, lane by lane
//   transpose           kLanes × kLanes words, rows so many bytes apart
//   weights(w, left)    kLanes words of a row of w, of which so many codes are there
// clang-format on
#pragma once

#include "common/scratch.h"
#include "common/vec.h"
#include "conv/conv.h"

namespace qnn {
namespace {

// Vectors of channels in a panel, and in a tile: with 16 lanes 4, 2 or 1, else 2 or 1. Floats have
// no tile of 4, which would be no faster.
constexpr int kConvVectors = kLanes == 16 ? 4 : 2;

// Pixels of a tile of so many vectors, all held in registers.
constexpr int conv_pixels(int vectors) {
  return kLanes == 16 ? (vectors == 4 ? 6 : 12) : kLanes == 8 ? 12 / vectors : 8 / vectors;
}

// By a machine's integer multiply_add(sum, x, w); or its add_couple.
template <class M, bool Couples = false>
struct IntegerConv : M {
  using Code = std::conditional_t<M::kGroup == 4, uint8_t, int16_t>;
  using Acc = int32_t;
  using Sum = vint;
  static constexpr bool kQuantizes = true, kShifts = M::kGroup == 4, kCouples = Couples;
  static constexpr int64_t kGroup = M::kGroup, kDepth = 0, kTileWords = 0;
  static constexpr int kMostVectors = kConvVectors;

  static vint weights(const int8_t* w, int64_t left) {
    if constexpr (kShifts) {
      return bytes_of<vint>(w, left);
    } else {
      return M::column(w, left);
    }
  }
};

// By float32 multiplications and additions. Sums of 256 products are added up: the error of one
// long sum would be several times as large.
template <class M>
struct FloatConv : M {
  using Code = float;
  using Acc = float;
  using Sum = vfloat;
  static constexpr bool kQuantizes = false, kShifts = false, kCouples = false;
  static constexpr int64_t kGroup = 1, kDepth = 256, kTileWords = 0;
  static constexpr int kMostVectors = 2;

  static vfloat multiply_add(vfloat sum, vfloat x, vfloat w) { return fma(x, w, sum); }
  static vint weights(const int8_t* w, int64_t left) {
    return bits(floats(__builtin_convertvector(bytes_of<vbyte>(w, left), vint)));
  }
};

// A piece of the window whose words lie side by side in the image, and in a row of w.
struct ConvRun {
  int64_t offset;  // bytes from the window's first pixel
  int64_t words;
  int64_t from, codes;  // in a row of w
};

// What a tile of pixels × vectors is multiplied from.
struct ConvTile {
  const char* image;
  const int64_t* at;  // of each pixel's window, in bytes
  const ConvRun* runs;
  int64_t run_count;
  const char* panel;   // [word][vector][lane]
  int64_t panel_step;  // bytes of a word
  const void* start;   // what the sums of a channel start at, of integers
  void* acc;           // [pixel][acc_stride]
  int64_t acc_stride;
  bool more;  // onto acc, of floats
};

template <class P, int R, int B>
QNN_KERNEL void conv_tile(const ConvTile& tile) {
  using Sum = typename P::Sum;
  using Acc = typename P::Acc;
  Sum sums[R][B];
  const char* x[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    x[r] = tile.image + tile.at[r];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      sums[r][b] = Sum{};
      if constexpr (P::kQuantizes)
        sums[r][b] = read<Sum>(static_cast<const Acc*>(tile.start) + b * kLanes);
    }
  }
  const char* w = tile.panel;
  const int64_t panel_step = tile.panel_step;
  const ConvRun* const end = tile.runs + tile.run_count;
  for (const ConvRun* run = tile.runs; run != end; ++run) {
    const int64_t until = run->offset + run->words * 4;
    for (int64_t i = run->offset; i < until; i += 4) {
      Sum v[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) v[b] = read<Sum>(w + b * kLanes * 4);
      w += panel_step;
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Sum codes = splat(read<Acc>(x[r] + i));
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) sums[r][b] = P::multiply_add(sums[r][b], codes, v[b]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      Acc* to = static_cast<Acc*>(tile.acc) + r * tile.acc_stride + b * kLanes;
      if constexpr (!P::kQuantizes) {
        if (tile.more) sums[r][b] += read<Sum>(to);
      }
      write(to, sums[r][b]);
    }
  }
}

// R pixels × B vectors of a depthwise convolution, whose words are vectors: the word of a run is
// `word_step` bytes from the last.
template <class P, int R, int B>
QNN_KERNEL void depthwise_tile(const ConvTile& tile, int64_t word_step) {
  using Sum = typename P::Sum;
  using Acc = typename P::Acc;
  Sum sums[R][B];
  const char* x[R];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
    x[r] = tile.image + tile.at[r];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      sums[r][b] = Sum{};
      if constexpr (P::kQuantizes)
        sums[r][b] = read<Sum>(static_cast<const Acc*>(tile.start) + b * kLanes);
    }
  }
  const char* w = tile.panel;
  const int64_t panel_step = tile.panel_step;
  const ConvRun* const end = tile.runs + tile.run_count;
  for (const ConvRun* run = tile.runs; run != end; ++run) {
    int64_t at = run->offset;
    for (int64_t i = 0; i < run->words; ++i, at += word_step, w += panel_step) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const Sum v = read<Sum>(w + b * kLanes * 4);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r)
          sums[r][b] = P::multiply_add(sums[r][b], read<Sum>(x[r] + at + b * kLanes * 4), v);
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
      write(static_cast<Acc*>(tile.acc) + r * tile.acc_stride + b * kLanes, sums[r][b]);
  }
}

template <class P>
void depthwise_tiles(int64_t vectors, int64_t pixels, const ConvTile& strip, int64_t word_step) {
  ConvTile of = strip;
  const auto all_pixels = [&](auto count) {
    ConvTile tile = of;
    int64_t r = 0;
    for (; r + 2 <= pixels; r += 2, tile.at += 2) {
      depthwise_tile<P, 2, count()>(tile, word_step);
      tile.acc = static_cast<typename P::Acc*>(tile.acc) + 2 * tile.acc_stride;
    }
    if (r < pixels) depthwise_tile<P, 1, count()>(tile, word_step);
  };
  for (int64_t b = 0; b < vectors;) {
    const int64_t count = vectors - b >= 4 ? 4 : 1;
    count == 4 ? all_pixels(std::integral_constant<int, 4>{})
               : all_pixels(std::integral_constant<int, 1>{});
    b += count;
    of.image += count * kLanes * 4;
    of.panel += count * kLanes * 4;
    of.start = static_cast<const int32_t*>(of.start) + count * kLanes;
    of.acc = static_cast<typename P::Acc*>(of.acc) + count * kLanes;
  }
}

// All pixels of a strip, spread evenly over tiles.
template <class P, int B, int R = conv_pixels(B)>
void conv_tiles_of(int64_t count, const ConvTile& tile) {
  if (count == R) return conv_tile<P, R, B>(tile);
  if constexpr (R > 1) conv_tiles_of<P, B, R - 1>(count, tile);
}

template <class P, int B = P::kMostVectors>
void conv_tiles(int64_t vectors, int64_t pixels, const ConvTile& strip) {
  ConvTile of = strip;
  for (; vectors >= B; vectors -= B) {
    const int64_t times = div_up(pixels, conv_pixels(B));
    for (int64_t i = 0; i < times; ++i) {
      const int64_t first = pixels * i / times, count = pixels * (i + 1) / times - first;
      ConvTile tile = of;
      tile.at += first;
      tile.acc = static_cast<typename P::Acc*>(of.acc) + first * of.acc_stride;
      conv_tiles_of<P, B>(count, tile);
    }
    of.panel += B * kLanes * 4;
    of.start = static_cast<const int32_t*>(of.start) + B * kLanes;
    of.acc = static_cast<typename P::Acc*>(of.acc) + B * kLanes;
  }
  if constexpr (B > 1) conv_tiles<P, B / 2>(vectors, pixels, of);
}

// Rows [first, first + count) of w, `depth` codes each, to a panel of so many vectors; `start` is
// `low` times the sum of a row.
template <class P>
QNN_KERNEL void turn_panel(const Conv& p, int64_t first, int64_t count, int64_t vectors,
                           const ConvRun* runs, int64_t run_count, int32_t low, char* panel,
                           int32_t* start) {
  const int64_t depth = p.depth() * p.taps(), step = vectors * kLanes * 4;
  constexpr int64_t kSquare = P::kGroup * kLanes;  // codes
  alignas(64) char square[kLanes * kLanes * 4];
  for (int64_t b = 0; b < vectors; ++b) {
    const int8_t* w = p.w + (first + b * kLanes) * depth;
    const int64_t lanes = smaller(kLanes, count - b * kLanes);
    if (lanes < kLanes) std::memset(square, 0, sizeof square);
    char* to = panel + b * kLanes * 4;
    vint sum = {};
    for (int64_t r = 0; r < run_count; ++r) {
      const ConvRun& run = runs[r];
      for (int64_t i = 0; i < run.words; i += kLanes) {
        const int64_t at = run.from + i * P::kGroup, left = run.codes - i * P::kGroup;
        const int64_t words = smaller(kLanes, run.words - i);
        const char* from = square;
        int64_t stride = kLanes * 4;
        if (P::kGroup == 4 && left >= kSquare && lanes == kLanes) {
          from = reinterpret_cast<const char*>(w + at), stride = depth;
        } else {
          for (int64_t lane = 0; lane < lanes; ++lane)
            write(square + lane * kLanes * 4, P::weights(w + lane * depth + at, left));
        }
        if (words == kLanes) {
          P::transpose(from, stride, to, step);
        } else {
          alignas(64) char turned[kLanes * kLanes * 4];
          P::transpose(from, stride, turned, kLanes * 4);
          for (int64_t j = 0; j < words; ++j)
            write(to + j * step, read<vint>(turned + j * kLanes * 4));
        }
        if constexpr (P::kShifts) {
          for (int64_t j = 0; j < words; ++j)
            sum = P::multiply_add(sum, splat(0x01010101), read<vint>(to + j * step));
        }
        to += words * step;
      }
    }
    write(start + b * kLanes, (vint)((vuint)sum * static_cast<uint32_t>(low)));
  }
}

// The same of a depthwise convolution.
template <class P>
QNN_KERNEL void turn_depthwise(const Conv& p, int64_t first, int64_t count, int64_t vectors,
                               const ConvRun* runs, int64_t run_count, int32_t low, char* panel,
                               int32_t* start) {
  const int64_t taps = p.taps(), step = vectors * kLanes * P::kGroup;
  using Part = std::conditional_t<P::kGroup == 1, float,
                                  std::conditional_t<P::kGroup == 4, int8_t, int16_t>>;
  std::memset(start, 0, vectors * kLanes * 4);
  auto* to = reinterpret_cast<Part*>(panel);
  for (int64_t r = 0; r < run_count; ++r) {
    const ConvRun& run = runs[r];
    std::memset(to, 0, run.words * step * sizeof(Part));
    for (int64_t lane = 0; lane < count; ++lane) {
      const int8_t* row = p.w + (first + lane) * taps + run.from;
      uint32_t sum = 0;
      for (int64_t i = 0; i < run.codes; ++i) {
        to[i / P::kGroup * step + lane * P::kGroup + i % P::kGroup] = static_cast<Part>(row[i]);
        sum += static_cast<uint32_t>(row[i]);
      }
      start[lane] = static_cast<int32_t>(static_cast<uint32_t>(start[lane]) +
                                         sum * static_cast<uint32_t>(low));
    }
    to += run.words * step;
  }
}

}  // namespace
}  // namespace qnn
