// The image that a convolution's products read: a piece of x with its border, as the products take
// it.
#pragma once

#include "common/rows.h"
#include "common/scratch.h"
#include "conv/conv.h"

namespace qnn {
namespace {

// One axis as the image has it. Along an axis whose kernel is 1 the image holds nothing but what is
// read: every `step`-th value of x, so that its own stride is 1.
struct ConvAxis {
  int64_t stride, step, extent, before;
  ConvAxis(const Conv& p, int axis)
      : stride(p.kernel[axis] == 1 ? 1 : p.stride[axis]),
        step(p.kernel[axis] == 1 ? p.stride[axis] : 1),
        extent((p.kernel[axis] - 1) * p.dilation[axis] + 1),
        before(p.before[axis]) {}
  int64_t length(int64_t outputs) const { return (outputs - 1) * stride + extent; }
  // Of x, where the image of outputs from `first` on begins.
  int64_t begin(const Conv& p, int axis, int64_t first) const {
    return first * p.stride[axis] - before;
  }
};

// The largest code of a symmetric grid.
template <class P>
constexpr int kConvMost = 127;

// How values become codes: clamp(round(value · inverse)) + add.
struct ConvQuantizer {
  float inverse, low, high;
  int32_t add;
};

inline ConvQuantizer fixed_grid(const Conv& p, int32_t add) {
  return {1.0f / p.grid_scale, static_cast<float>(-128 - p.zero_point),
          static_cast<float>(127 - p.zero_point), add};
}

// Pieces of x, or of an image: so many of `count` values, each so many from the last.
struct ConvPieces {
  int64_t pieces, count, stride, to_stride;
};

// Values of x to codes, or to 32-bit words of one code each, whose pieces have room for whole
// vectors. Returns the largest magnitude, as bits.
template <class Format, class To>
QNN_KERNEL int32_t convert_floats(const typename Format::Value* x, const ConvPieces& all,
                                  const ConvQuantizer& how, To* to) {
  const float inverse = how.inverse;
  const vfloat low = splat(how.low), high = splat(how.high), round = splat(0x1.8p23f);
  const int32_t add = how.add;
  const int64_t count = all.count;
  vint most = {};
  const auto codes = [&](vfloat value) __attribute__((always_inline)) {
    const vint magnitude = bits(value) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
    vfloat v = value * inverse;
    v = v < low ? low : v;
    v = v > high ? high : v;
    return bits(v + round) - bits(round) + add;
  };
  const auto put = [](To* at, vint q) __attribute__((always_inline)) {
    if constexpr (sizeof(To) == 4) {
      write(at, q);
    } else {
      write_codes(at, q);
    }
  };
  for (int64_t piece = 0; piece < all.pieces; ++piece, x += all.stride, to += all.to_stride) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) put(to + i, codes(Format::load(x + i)));
    if (i == count) continue;
    const vint rest = codes(load_some<Format>(x + i, count - i));
    if constexpr (sizeof(To) == 4) {
      put(to + i, rest);
    } else {
      To last[kLanes];
      put(last, rest);
      std::memcpy(to + i, last, (count - i) * sizeof *to);
    }
  }
  int32_t top = 0;
  for (int lane = 0; lane < kLanes; ++lane) top = most[lane] > top ? most[lane] : top;
  return top;
}

// The same of codes, and of floats that stay so.
template <class To>
QNN_KERNEL void move_codes(const uint8_t* from, const ConvPieces& all, int32_t add, To* to) {
  for (int64_t piece = 0; piece < all.pieces; ++piece, from += all.stride, to += all.to_stride) {
    if constexpr (sizeof(To) == 1) {
      std::memcpy(to, from, all.count);  // bytes stay as they are: `add` is 0
    } else {
      for (int64_t i = 0; i < all.count; ++i) to[i] = static_cast<To>(from[i] + add);
    }
  }
}

template <class Format, class To>
QNN_KERNEL void move_floats(const typename Format::Value* x, const ConvPieces& all, To* to) {
  for (int64_t piece = 0; piece < all.pieces; ++piece, x += all.stride, to += all.to_stride) {
    int64_t i = 0;
    for (; i + kLanes <= all.count; i += kLanes) write(to + i, Format::load(x + i));
    if (i == all.count) continue;
    const vfloat last = load_some<Format>(x + i, all.count - i);
    std::memcpy(to + i, &last, (all.count - i) * sizeof *to);
  }
}

// Where a share of the work reads x: rows of y from `first` on, so many of one plane, or of whole
// planes; and the channels of a group, or of some depthwise ones.
struct ConvBand {
  int64_t first, rows;        // of y
  int64_t channel, channels;  // of x
};

// [plane][t][row][column][channel]. Of a depthwise convolution a code is a word, which holds the
// codes of the next columns too, as many as a product takes.
template <class P>
struct Image {
  using Code = typename P::Code;
  const Conv& p;
  ConvAxis t, h, w;
  bool depthwise;
  int64_t code_bytes, width, pixel;  // columns of a row; bytes of a pixel
  char* memory;
  int32_t* words;  // of kLanes rows of x
  int32_t pad;     // the code of 0

  Image(const Conv& call)
      : p(call),
        t(call, 0),
        h(call, 1),
        w(call, 2),
        depthwise(call.depthwise()),
        code_bytes(depthwise ? 4 : sizeof(Code)),
        width(w.length(call.out[2])),
        pixel(0),
        memory(nullptr),
        words(nullptr),
        pad(P::kShifts ? call.zero_point + 128 : 0) {}

  int64_t row_bytes() const { return width * pixel; }
  int64_t plane_bytes(int64_t rows) const { return p.kernel[0] * h.length(rows) * row_bytes(); }
  // Products read a word after the last code, and of a depthwise row some columns.
  int64_t slack() const { return P::kGroup * (depthwise ? p.dilation[2] * pixel : 1) + 4 * kLine; }
  // Values of x along its last axis.
  int64_t source_width() const { return round_up(p.in[2], kLanes) + kLanes; }

  // From a row of the image to that of the next tap of t.
  int64_t tap_t(int64_t rows) const { return h.length(rows) * row_bytes(); }

  ConvQuantizer quantizer(int64_t sample) const {
    constexpr auto kMost = static_cast<float>(kConvMost<P>);
    if (p.input == ConvInput::dynamic) {
      const float scale = p.sample_scale[sample];
      const bool finite = scale <= std::numeric_limits<float>::max();
      return {finite ? 1.0f / scale : 0.0f, -kMost, kMost, pad};
    }
    if (kConvMost<P> > 127) return {1.0f / p.grid_scale, -kMost, kMost, pad};
    return fixed_grid(p, pad);
  }

  // Values of x from `at` on as codes or as words; whether one of them is NaN or inf.
  template <class To>
  bool convert(int64_t at, const ConvPieces& all, const ConvQuantizer& how, To* to) const {
    bool odd = false;
    if (p.input == ConvInput::codes) {
      if constexpr (P::kQuantizes)
        move_codes(static_cast<const uint8_t*>(p.x) + at, all, pad - p.zero_point - 128, to);
      return false;
    }
    with_format(p.x_dtype, [&](auto format) {
      using Format = decltype(format);
      const auto* x = static_cast<const typename Format::Value*>(p.x) + at;
      if constexpr (P::kQuantizes) {
        odd = convert_floats<Format>(x, all, how, to) >= 0x7f800000;
      } else {
        move_floats<Format>(x, all, to);
      }
    });
    return odd;
  }

  // The padding of so many pixels; of depthwise words as of one code each.
  void fill_pad(char* to, int64_t pixels) const {
    const int64_t bytes = pixels * pixel;
    if (pad == 0 || code_bytes == 1) {
      std::memset(to, pad, bytes);
    } else {
      for (int64_t i = 0; i < bytes; i += kLanes * 4) write(to + i, splat(pad));
    }
  }

  // A row of the image from a row of x, `sample` and axes `z`, `y`; or of padding. Whether it holds
  // NaN or inf.
  bool fill_row(const ConvBand& band, const ConvQuantizer& how, int64_t sample, int64_t z,
                int64_t y, char* to) {
    // Columns [from, until) of the image lie in x.
    const int64_t left = w.before, last = p.in[2] - 1 + left;
    int64_t from = smaller(larger(0, div_up(left, w.step)), width);
    int64_t until = last < 0 ? from : larger(from, smaller(width, last / w.step + 1));
    if (z < 0 || z >= p.in[0] || y < 0 || y >= p.in[1]) from = until = 0;
    fill_pad(to, from);
    fill_pad(to + until * pixel, width - until);
    bool odd = false;
    if (from < until) {
      const int64_t first = from * w.step - left, count = until - from;
      odd = p.x_last ? fill_pixels(band, how, sample, z, y, to + from * pixel, first, count)
                     : fill_columns(band, how, sample, z, y, to + from * pixel, first, count);
    }
    if (depthwise) join(reinterpret_cast<int32_t*>(to));
    return odd;
  }

  // Channels of a pixel lie side by side.
  bool fill_pixels(const ConvBand& band, const ConvQuantizer& how, int64_t sample, int64_t z,
                   int64_t y, char* to, int64_t first, int64_t count) {
    const int64_t row = ((sample * p.in[0] + z) * p.in[1] + y) * p.in[2];
    const int64_t at = (row + first) * p.channels + band.channel;
    const ConvPieces all{count, band.channels, w.step * p.channels, pixel / code_bytes};
    if (depthwise) return convert(at, all, how, reinterpret_cast<int32_t*>(to));
    auto* codes = reinterpret_cast<Code*>(to);
    if (w.step == 1 && band.channels == p.channels)
      return convert(at, {1, count * p.channels, 0, 0}, how, codes);
    return convert(at, all, how, codes);
  }

  // A channel's row lies side by side: kLanes channels at a time are turned.
  bool fill_columns(const ConvBand& band, const ConvQuantizer& how, int64_t sample, int64_t z,
                    int64_t y, char* to, int64_t first, int64_t count) {
    const int64_t plane = p.in[0] * p.in[1] * p.in[2], line = source_width();
    const int64_t row = sample * p.channels * plane + (z * p.in[1] + y) * p.in[2] + first;
    const int64_t span = (count - 1) * w.step + 1;
    bool odd = false;
    alignas(64) int32_t turned[kLanes * kLanes];
    for (int64_t c = 0; c < band.channels; c += kLanes) {
      const int64_t some = smaller(kLanes, band.channels - c);
      odd |= convert(row + (band.channel + c) * plane, {some, span, plane, line}, how, words);
      for (int64_t i = 0; w.step != 1 && i < some; ++i) {
        int32_t* of = words + i * line;
        for (int64_t j = 0; j < count; ++j) of[j] = of[j * w.step];
      }
      char* const here = to + c * code_bytes;
      if (!depthwise && some <= kLanes / 2) {
        scatter(reinterpret_cast<Code*>(here), some, count);
        continue;
      }
      for (int64_t j = 0; j < count; j += kLanes) {
        P::transpose(words + j, line * 4, turned, kLanes * 4);
        const int64_t columns = smaller(kLanes, count - j);
        for (int64_t k = 0; k < columns; ++k) {
          char* of = here + (j + k) * pixel;
          const vint codes = read<vint>(turned + k * kLanes);
          if (depthwise) {
            write(of, codes);
          } else if (sizeof(Code) == 4) {
            std::memcpy(of, &codes, some * 4);
          } else if (some == kLanes) {
            write_codes(reinterpret_cast<Code*>(of), codes);
          } else {
            Code last[kLanes];
            write_codes(last, codes);
            std::memcpy(of, last, some * sizeof(Code));
          }
        }
      }
    }
    return odd;
  }

  // Few channels.
  void scatter(Code* to, int64_t channels, int64_t count) const {
    const int64_t step = pixel / static_cast<int64_t>(sizeof(Code)), line = source_width();
    for (int64_t c = 0; c < channels; ++c) {
      if constexpr (P::kQuantizes) {
        const int32_t* from = words + c * line;
        for (int64_t j = 0; j < count; ++j) to[j * step + c] = static_cast<Code>(from[j]);
      } else {
        for (int64_t j = 0; j < count; ++j)
          std::memcpy(to + j * step + c, words + c * line + j, sizeof(Code));
      }
    }
  }

  // A row of one code a word: below it the codes of the columns that are the next taps.
  void join(int32_t* to) const {
    if constexpr (P::kGroup > 1) {
      constexpr int kBits = 32 / static_cast<int>(P::kGroup);
      constexpr uint32_t kMask = (1u << kBits) - 1;
      const int64_t step = pixel / 4, ahead = p.dilation[2] * step;
      const int64_t whole = larger(0, width - p.dilation[2]) * step;
      for (int64_t i = width * step; i > whole;) {
        i -= kLanes;
        write(to + i, read<vuint>(to + i) & kMask);
      }
      for (int64_t i = whole; i > 0;) {
        i -= kLanes;
        write(to + i, (read<vuint>(to + i) & kMask) | read<vuint>(to + i + ahead) << kBits);
      }
    }
  }

  // All of a band, for `rows` of each plane.
  void fill(const ConvBand& band, int64_t rows) {
    const int64_t height = p.out[1], planes = band.rows / rows;
    char* to = memory;
    for (int64_t i = 0; i < planes; ++i) {
      const int64_t row = band.first + i * rows, plane = row / height;
      const int64_t sample = plane / p.out[0];
      const int64_t z = t.begin(p, 0, plane % p.out[0]), y = h.begin(p, 1, row % height);
      const ConvQuantizer how = P::kQuantizes ? quantizer(sample) : ConvQuantizer{};
      bool odd = false;
      for (int64_t a = 0; a < p.kernel[0]; ++a) {
        for (int64_t b = 0; b < h.length(rows); ++b, to += row_bytes())
          odd |= fill_row(band, how, sample, z + a * p.dilation[0], y + b * h.step, to);
      }
      if (odd && p.input == ConvInput::fixed) __atomic_store_n(p.odd + sample, 1, __ATOMIC_RELAXED);
    }
  }
};

}  // namespace
}  // namespace qnn
