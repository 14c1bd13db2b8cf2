// The epilogue of a convolution: from sums, [pixel][channel], to y. The steps and their casts are
// those of linear/output.h, and two more: a residual that is codes, and an activation after the
// residual.
#pragma once

#include "common/doubles.h"
#include "common/rows.h"
#include "common/scratch.h"
#include "conv/conv.h"

namespace qnn {
namespace {

// Pixels of y, one after the other in memory where y is channels-last, times some channels.
struct ConvPiece {
  int64_t pixel, pixels;      // of all in y
  int64_t channel, channels;  // channels beyond these are padding
  int64_t vectors;
  float* values;  // [pixel][vectors · kLanes], where the sums were
};

template <class P>
QNN_KERNEL void scale_conv_sums(const ConvPiece& piece, const float* sw, const float* bias,
                                const float* scale) {
  using Sum = typename P::Sum;
  float* values = piece.values;
  const int64_t width = piece.vectors * kLanes;
  for (int64_t i = 0; i < piece.pixels; ++i, values += width) {
    for (int64_t c = 0; c < width; c += kLanes) {
      vfloat v = sum_as_float(read<Sum>(values + c)) * read<vfloat>(sw + c);
      if constexpr (P::kQuantizes) v = v * scale[i];
      write(values + c, v + read<vfloat>(bias + c));
    }
  }
}

// Of a tier: kLanes × kLanes words, rows so many bytes apart.
using Transpose = void(const void* from, int64_t in_stride, void* to, int64_t out_stride);

// The last steps, at some values of one sample that lie side by side in y.
template <class Format>
struct ConvOutput {
  using Value = typename Format::Value;
  static constexpr bool kDouble = std::is_same_v<Format, Float64>;

  Activation activation;  // of float64
  bool relu;
  const Value* residual;
  const uint8_t* residual_codes;
  Value* y;  // one of the two, or both
  uint8_t* codes;
  float residual_scale = 0;
  int32_t residual_zero;
  vfloat inverse, low, high;  // of codes
  vint zero;                  // its code, less what is added to round

  explicit ConvOutput(const Conv& p)
      : activation(p.activation),
        relu(p.last_relu),
        residual(static_cast<const Value*>(p.residual)),
        residual_codes(p.residual_codes),
        y(static_cast<Value*>(p.y)),
        codes(p.codes),
        residual_zero(p.residual_zero_point + 128),
        inverse(splat(p.y_inverse)),
        low(splat(static_cast<float>(-128 - p.y_zero_point))),
        high(splat(static_cast<float>(127 - p.y_zero_point))),
        zero(splat(p.y_zero_point + 128) - bits(splat(0x1.8p23f))) {}

  vfloat other(int64_t at, int64_t left) const {
    const auto q = bytes_of<vubyte>(residual_codes + at, left);
    return floats(__builtin_convertvector(q, vint) - residual_zero) * residual_scale;
  }

  // `most` are the magnitudes of what becomes codes.
  void put(int64_t at, vfloat value, int64_t left, vint& most) const {
    if constexpr (kDouble) {
      put_doubles(at, value, left, most);
    } else {
      if (residual != nullptr || residual_codes != nullptr) {
        vfloat sum = residual_codes == nullptr ? vfloat{} : Format::round(other(at, left));
        if (residual != nullptr) {
          const vfloat floats = load_some<Format>(residual + at, left);
          sum = residual_codes == nullptr ? floats : Format::round(floats + sum);
        }
        value = Format::round(value) + sum;
      }
      if (relu || codes != nullptr) value = Format::round(value);
      if (relu) value = activate(Activation::relu, value);
      if (y != nullptr) store_some<Format>(y + at, value, left);
      if (codes != nullptr) put_codes(at, value, left, most);
    }
  }

  // One at a time will do.
  __attribute__((noinline)) void put_doubles(int64_t at, vfloat value, int64_t left,
                                             vint& most) const {
    const vfloat more = residual_codes == nullptr ? vfloat{} : other(at, left);
    vfloat rounded = {};
    for (int64_t lane = 0; lane < kLanes && lane < left; ++lane) {
      double v = activate(activation, static_cast<double>(value[lane]));
      if (residual_codes != nullptr && residual != nullptr) {
        v += residual[at + lane] + static_cast<double>(more[lane]);
      } else if (residual_codes != nullptr) {
        v += more[lane];
      } else if (residual != nullptr) {
        v += residual[at + lane];
      }
      if (relu && v < 0) v = 0;
      rounded[lane] = static_cast<float>(v);
      if (y != nullptr) y[at + lane] = v;
    }
    if (codes != nullptr) put_codes(at, rounded, left, most);
  }

  QNN_INLINE vint code(vfloat v) const {
    const vfloat round = splat(0x1.8p23f);
    v = at_most(high, at_least(low, v * inverse));
    return bits(v + round) + zero;
  }

  QNN_INLINE void put_codes(int64_t at, vfloat v, int64_t left, vint& most) const {
    vint magnitude = magnitude_bits(v);
    const vint q = code(v);
    uint8_t* to = codes + at;
    if (left >= kLanes) {
      write_codes(to, q);
    } else {
      uint8_t some[kLanes];
      write_codes(some, q);
      std::memcpy(to, some, left);
      vint lanes;
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
      magnitude = lanes < static_cast<int32_t>(left) ? magnitude : vint{};
    }
    most = magnitude > most ? magnitude : most;
  }

  static vint magnitude_bits(vfloat v) { return bits(v) & 0x7fffffff; }

  // Whether one is of NaN or inf.
  static bool odd(vint most) {
    int32_t top = 0;
    for (int lane = 0; lane < kLanes; ++lane) top = most[lane] > top ? most[lane] : top;
    return top >= 0x7f800000;
  }
};

// `count` pixels of one sample, from the `i`-th of the piece on.
template <class Format>
void put_pixels(const Conv& p, const ConvPiece& piece, const ConvOutput<Format>& output, int64_t i,
                int64_t count, int64_t sample, Transpose* transpose, vint& most) {
  const int64_t width = piece.vectors * kLanes, plane = p.out[0] * p.out[1] * p.out[2];
  if (p.y_last) {
    for (const int64_t end = i + count; i < end; ++i) {
      const int64_t at = (piece.pixel + i) * p.outputs + piece.channel;
      for (int64_t c = 0; c < piece.channels; c += kLanes)
        output.put(at + c, read<vfloat>(piece.values + i * width + c), piece.channels - c, most);
    }
    return;
  }
  alignas(64) float turned[kLanes * kLanes];
  const int64_t within = piece.pixel + i - sample * plane;
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int64_t c = 0; c < piece.channels; c += kLanes) {
      transpose(piece.values + (i + j) * width + c, width * 4, turned, kLanes * 4);
      for (int64_t k = 0; k < kLanes && c + k < piece.channels; ++k) {
        const int64_t channel = sample * p.outputs + piece.channel + c + k;
        output.put(channel * plane + within + j, read<vfloat>(turned + k * kLanes), count - j,
                   most);
      }
    }
  }
}

QNN_KERNEL void finish_conv(const Conv& p, const ConvPiece& piece, Transpose* transpose) {
  with_format(p.y_dtype, [&](auto format) {
    using Format = decltype(format);
    if constexpr (!std::is_same_v<Format, Float64>) {
      if (p.activation != Activation::none)
        activate_all<Format>(p.activation, piece.values, piece.pixels * piece.vectors);
    }
    const int64_t plane = p.out[0] * p.out[1] * p.out[2];
    for (int64_t i = 0; i < piece.pixels;) {
      const int64_t sample = (piece.pixel + i) / plane;
      const int64_t count = smaller(piece.pixels - i, (sample + 1) * plane - piece.pixel - i);
      ConvOutput<Format> output(p);
      if (p.residual_codes != nullptr) output.residual_scale = p.residual_scale[sample];
      vint most = {};
      put_pixels(p, piece, output, i, count, sample, transpose, most);
      if (p.codes != nullptr && output.odd(most))
        __atomic_store_n(p.odd + sample, 1, __ATOMIC_RELAXED);
      i += count;
    }
  });
}

// What most layers are: channels-last, an activation that is a clamp, a residual of floats at most.
inline bool is_simple(const Conv& p) {
  const bool clamps = p.activation == Activation::none || p.activation == Activation::relu ||
                      p.activation == Activation::relu6;
  return clamps && p.y_last && p.residual_codes == nullptr && p.y_dtype != DType::float64 &&
         (p.codes == nullptr || p.y_dtype == DType::float32);
}

// From sums to y at once: some pixels of one sample, of B vectors of channels. The last channels of
// a vector may be padding where B is 1.
template <class P, class Format, bool kCodes, int B>
QNN_KERNEL void finish_pixels(const Conv& p, const ConvOutput<Format>& output, int64_t pixels,
                              const float* values, int64_t width, const float* sw,
                              const float* bias, const float* scale, int64_t at, int64_t channels,
                              vint* all) {
  using Sum = typename P::Sum;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const bool adds = p.residual != nullptr, keeps = !kCodes || output.y != nullptr;
  const bool clamps = p.activation != Activation::none || (p.last_relu && !adds);
  const vfloat low = splat(clamps ? 0.0f : -kInfinity),
               high = splat(p.activation == Activation::relu6 ? 6.0f : kInfinity),
               last = splat(p.last_relu ? 0.0f : -kInfinity);
  const int64_t outputs = p.outputs;
  vint most = *all;
  for (int64_t i = 0; i < pixels; ++i, values += width, at += outputs) {
    vint q[B];
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) {
      const int64_t here = at + b * kLanes, left = B == 1 ? channels : kLanes;
      vfloat v = sum_as_float(read<Sum>(values + b * kLanes)) * read<vfloat>(sw + b * kLanes);
      if constexpr (P::kQuantizes) v = v * scale[i];
      v = at_most(high, at_least(low, Format::round(v + read<vfloat>(bias + b * kLanes))));
      if (adds) {
        const vfloat other = load_some<Format>(output.residual + here, left);
        v = at_least(last, Format::round(v + other));
      }
      if (keeps) store_some<Format>(output.y + here, v, left);
      if constexpr (kCodes && B == 1) {
        output.put_codes(here, v, left, most);
      } else if constexpr (kCodes) {
        const vint magnitude = output.magnitude_bits(v);
        most = magnitude > most ? magnitude : most;
        q[b] = output.code(v);
      }
    }
    if constexpr (kCodes && B == 2) write_two(output.codes + at, q[0], q[1]);
  }
  *all = most;
}

template <class P, class Format, bool kCodes>
QNN_ONCE void finish_simply(const Conv& p, const ConvPiece& piece, const float* sw,
                            const float* bias, const float* scale) {
  const int64_t width = piece.vectors * kLanes, plane = p.out[0] * p.out[1] * p.out[2];
  const ConvOutput<Format> output(p);
  for (int64_t i = 0; i < piece.pixels;) {
    const int64_t sample = (piece.pixel + i) / plane;
    const int64_t count = smaller(piece.pixels, (sample + 1) * plane - piece.pixel) - i;
    vint most = {};
    for (int64_t c = 0; c < piece.channels;) {
      const int64_t left = piece.channels - c,
                    at = (piece.pixel + i) * p.outputs + piece.channel + c;
      const bool two = left >= 2 * kLanes;
      const auto finish =
          two ? finish_pixels<P, Format, kCodes, 2> : finish_pixels<P, Format, kCodes, 1>;
      finish(p, output, count, piece.values + i * width + c, width, sw + c, bias + c, scale + i, at,
             left, &most);
      c += two ? 2 * kLanes : kLanes;
    }
    if (kCodes && output.odd(most)) __atomic_store_n(p.odd + sample, 1, __ATOMIC_RELAXED);
    i += count;
  }
}

// The epilogue of a strip, whichever it is.
template <class P>
void finish_strip(const Conv& p, const ConvPiece& piece, const float* sw, const float* bias,
                  const float* scale) {
  if (!is_simple(p)) {
    scale_conv_sums<P>(piece, sw, bias, scale);
    return finish_conv(p, piece, P::transpose);
  }
  if (p.codes != nullptr) return finish_simply<P, Float32, true>(p, piece, sw, bias, scale);
  with_format(p.y_dtype, [&](auto format) {
    using Format = decltype(format);
    if constexpr (!std::is_same_v<Format, Float64>)
      finish_simply<P, Format, false>(p, piece, sw, bias, scale);
  });
}

}  // namespace
}  // namespace qnn
