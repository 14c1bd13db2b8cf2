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

// How values become codes: clamp(round(value · inverse)) + add.
struct ConvQuantizer {
  float inverse, low, high;
  int32_t add;
};

inline ConvQuantizer fixed_grid(const Conv& p, int32_t add) {
  return {1.0f / p.grid_scale, static_cast<float>(-128 - p.zero_point),
          static_cast<float>(127 - p.zero_point), add};
}

// `count` values of x to codes, or to 32-bit words of one code each. Returns the largest magnitude,
// as bits.
template <class Format, class To>
QNN_KERNEL int32_t convert_floats(const typename Format::Value* x, int64_t count,
                                  const ConvQuantizer& how, To* to) {
  const float inverse = how.inverse;
  const vfloat low = splat(how.low), high = splat(how.high), round = splat(0x1.8p23f);
  const int32_t add = how.add;
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
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) put(to + i, codes(Format::load(x + i)));
  if (i < count) {
    To last[kLanes];
    put(last, codes(load_some<Format>(x + i, count - i)));
    std::memcpy(to + i, last, (count - i) * sizeof *to);
  }
  int32_t top = 0;
  for (int lane = 0; lane < kLanes; ++lane) top = most[lane] > top ? most[lane] : top;
  return top;
}

template <class To>
QNN_KERNEL void move_codes(const uint8_t* from, int64_t count, int32_t add, To* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i] + add);
}

// Where a share of the work reads x: rows of y from `first` on, so many of one plane, or of whole
// planes; and the channels of a group, or of some depthwise ones.
struct ConvBand {
  int64_t first, rows;       // of y
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
  int64_t plane_bytes(int64_t rows) const {
    return p.kernel[0] * h.length(rows) * row_bytes();
  }
  // Products read a word after the last code, and of a depthwise row some columns.
  int64_t slack() const {
    return P::kGroup * (depthwise ? p.dilation[2] * pixel : 1) + 4 * kLine;
  }
  // Values of x along its last axis.
  int64_t source_width() const { return round_up(p.in[2], kLanes) + kLanes; }

  // From a row of the image to that of the next tap of t.
  int64_t tap_t(int64_t rows) const { return h.length(rows) * row_bytes(); }

  ConvQuantizer quantizer(int64_t sample) const {
    if (p.input == ConvInput::dynamic) {
      const float scale = p.sample_scale[sample];
      const bool finite = scale <= std::numeric_limits<float>::max();
      return {finite ? 1.0f / scale : 0.0f, -127.0f, 127.0f, pad};
    }
    return fixed_grid(p, pad);
  }

  // Values of x from `at` on, dense, as codes or as words; whether one of them is NaN or inf.
  template <class To>
  bool convert(int64_t at, int64_t count, const ConvQuantizer& how, To* to) const {
    bool odd = false;
    if (p.input == ConvInput::codes) {
      if constexpr (P::kQuantizes) {
        move_codes(static_cast<const uint8_t*>(p.x) + at, count, pad - p.zero_point - 128, to);
      }
      return false;
    }
    with_format(p.x_dtype, [&](auto format) {
      using Format = decltype(format);
      const auto* x = static_cast<const typename Format::Value*>(p.x) + at;
      if constexpr (P::kQuantizes) {
        odd = convert_floats<Format>(x, count, how, to) >= 0x7f800000;
      } else {
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) write(to + i, Format::load(x + i));
        if (i < count) {
          const vfloat last = load_some<Format>(x + i, count - i);
          std::memcpy(to + i, &last, (count - i) * sizeof *to);
        }
      }
    });
    return odd;
  }

  // The padding of `count` codes.
  void fill_pad(char* to, int64_t count) const {
    if (code_bytes == 1) {
      std::memset(to, pad, count);
    } else {
      int32_t word = pad;
      if (depthwise && P::kShifts) word = static_cast<int32_t>(0x01010101u * (pad & 0xff));
      if (word == 0) {
        std::memset(to, 0, count * code_bytes);
      } else {
        for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * 4, &word, 4);
      }
    }
  }

  // A row of the image from a row of x, `sample` and axes `z`, `y`; or of padding.
  bool fill_row(const ConvBand& band, const ConvQuantizer& how, int64_t sample, int64_t z,
                int64_t y, char* to) {
    if (z < 0 || z >= p.in[0] || y < 0 || y >= p.in[1]) {
      fill_pad(to, row_bytes() / code_bytes);
      return false;
    }
    // Columns [from, until) of the image lie in x.
    const int64_t codes = pixel / code_bytes, left = w.before;
    const int64_t from = smaller(div_up(left, w.step), width);
    const int64_t last = p.in[2] - 1 + left;
    const int64_t until = last < 0 ? from : larger(from, smaller(width, last / w.step + 1));
    if (depthwise) {
      if (until > from) {
        fill_pad(to + until * pixel, (width - until) * codes);
      } else {
        fill_pad(to, width * codes);
      }
    } else {
      fill_pad(to, from * codes);
      fill_pad(to + until * pixel, (width - until) * codes);
    }
    if (from >= until) return false;
    const int64_t first = from * w.step - left, count = until - from;
    return p.x_last ? fill_pixels(band, how, sample, z, y, to, from, first, count)
                    : fill_columns(band, how, sample, z, y, to, from, first, count);
  }

  // Channels of a pixel lie side by side.
  bool fill_pixels(const ConvBand& band, const ConvQuantizer& how, int64_t sample, int64_t z,
                   int64_t y, char* to, int64_t from, int64_t first, int64_t count) {
    const int64_t row = ((sample * p.in[0] + z) * p.in[1] + y) * p.in[2];
    const int64_t at = (row + first) * p.channels + band.channel;
    bool odd = false;
    if (!depthwise) {
      auto* codes = reinterpret_cast<Code*>(to + from * pixel);
      if (w.step == 1 && band.channels == p.channels)
        return convert(at, count * p.channels, how, codes);
      for (int64_t i = 0; i < count; ++i) {
        odd |= convert(at + i * w.step * p.channels, band.channels, how,
                       codes + i * band.channels);
      }
      return odd;
    }
    for (int64_t i = count; i-- > 0;) {
      odd |= convert(at + i * w.step * p.channels, band.channels, how, words);
      join(reinterpret_cast<int32_t*>(to + (from + i) * pixel), from + i, words, band.channels);
    }
    join_border(to, from);
    return odd;
  }

  // A channel's row lies side by side: kLanes channels at a time are turned.
  bool fill_columns(const ConvBand& band, const ConvQuantizer& how, int64_t sample, int64_t z,
                    int64_t y, char* to, int64_t from, int64_t first, int64_t count) {
    const int64_t plane = p.in[0] * p.in[1] * p.in[2], line = source_width();
    const int64_t row = sample * p.channels * plane + (z * p.in[1] + y) * p.in[2];
    const int64_t span = (count - 1) * w.step + 1;
    bool odd = false;
    alignas(64) int32_t square[kLanes * kLanes], turned[kLanes * kLanes];
    for (int64_t c = 0; c < band.channels; c += kLanes) {
      const int64_t some = smaller(kLanes, band.channels - c);
      for (int64_t i = 0; i < some; ++i)
        odd |= convert(row + (band.channel + c + i) * plane + first, span, how, words + i * line);
      // From the right: a depthwise word holds those of the columns after it.
      for (int64_t begin = (count - 1) / kLanes * kLanes; begin >= 0; begin -= kLanes) {
        const int64_t columns = smaller(kLanes, count - begin);
        const int32_t* source = words + begin;
        int64_t stride = line;
        if (w.step != 1) {
          for (int64_t i = 0; i < some; ++i) {
            for (int64_t j = 0; j < columns; ++j)
              square[i * kLanes + j] = words[i * line + (begin + j) * w.step];
          }
          source = square, stride = kLanes;
        }
        P::transpose(source, stride * 4, turned, kLanes * 4);
        for (int64_t j = columns; j-- > 0;) {
          const int64_t column = from + begin + j;
          char* here = to + column * pixel + c * code_bytes;
          if (depthwise) {
            join(reinterpret_cast<int32_t*>(here), column, turned + j * kLanes, some);
          } else if constexpr (sizeof(Code) == 4) {
            std::memcpy(here, turned + j * kLanes, some * 4);
          } else {
            Code codes[kLanes];
            write_codes(codes, read<vint>(turned + j * kLanes));
            std::memcpy(here, codes, some * sizeof(Code));
          }
        }
      }
    }
    if (depthwise) join_border(to, from);
    return odd;
  }

  // The codes of a pixel to depthwise words: its own below those of the column that is the next
  // tap.
  void join(int32_t* to, int64_t column, const int32_t* codes, int64_t count) const {
    constexpr int kBits = 32 / static_cast<int>(P::kGroup);
    constexpr uint32_t kMask = kBits == 32 ? ~0u : (1u << (kBits % 32)) - 1;
    if constexpr (kBits == 32) {
      std::memcpy(to, codes, count * 4);
    } else {
      const bool more = column + p.dilation[2] < width;
      const int32_t* next = more ? to + p.dilation[2] * pixel / 4 : codes;
      // Pixels are whole vectors, and what lies after the codes belongs to nobody.
      for (int64_t i = 0; i < count; i += kLanes) {
        const vuint code = read<vuint>(codes + i) & kMask;
        const vuint rest = more ? read<vuint>(next + i) << (kBits % 32) : vuint{};
        write(to + i, code | rest);
      }
    }
  }

  // The words of the columns before x.
  void join_border(char* to, int64_t from) const {
    for (int64_t i = 0; i < pixel / 4; i += kLanes) write(words + i, splat(pad));
    for (int64_t column = from; column-- > 0;)
      join(reinterpret_cast<int32_t*>(to + column * pixel), column, words, pixel / 4);
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
      if (odd && p.input == ConvInput::fixed)
        __atomic_store_n(p.odd + sample, 1, __ATOMIC_RELAXED);
    }
  }
};

}  // namespace
}  // namespace qnn
