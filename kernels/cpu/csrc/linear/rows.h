// Rows of x as a tier multiplies them: quantised, on a grid, or as floats.
#pragma once

#include <cmath>

#include "common/rows.h"
#include "linear/inner.h"
#include "linear/linear.h"

namespace qnn {
namespace {

// The largest code of a row of x: of 8 bits, or of 16 where sums have more than 32.
template <class T>
constexpr int kMostCode = std::is_same_v<typename T::Sum, vdouble> ? 32767 : 127;

// One row: its codes, padded with zeros to `padded`, and its scale. Returns the sum of the codes.
template <class Format, class Code>
inline int32_t quantize_row(const typename Format::Value* x, int64_t k, int64_t padded, int most,
                            Code* codes, float* scale) {
  *scale = row_scale<Format>(x, k, most);
  const float inverse = 1.0f / *scale;
  vuint sum = {};  // codes of 16 bits may wrap around: nobody asks for their sum
  int64_t i = 0;
  // Else the row holds NaN or inf, and its codes are 0.
  if (*scale <= std::numeric_limits<float>::max()) {
    if constexpr (std::is_same_v<Format, BFloat16> && sizeof(Code) == 1) {
      // Two values to a word are two floats by a shift and a mask, and two codes again.
      for (; i + 2 * kLanes <= k; i += 2 * kLanes) {
        const vuint pair = read<vuint>(x + i);
        const vint low = codes_of((vfloat)(pair << 16), inverse);
        const vint high = codes_of((vfloat)(pair & 0xffff0000), inverse);
        sum += (vuint)(low + high);
        write(codes + i, __builtin_convertvector(((vuint)low & 0xff) | (vuint)high << 8, vhalf));
      }
    }
    for (; i < k; i += kLanes) {
      const vint q = codes_of(load_some<Format>(x + i, k - i), inverse);
      sum += (vuint)q;
      write_codes(codes + i, q);
    }
  }
  for (; i < padded; i += kLanes) write_codes(codes + i, vint{});
  uint32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return static_cast<int32_t>(total);
}

// One row on the call's own grid, down to -128 of 8 bits and to -32767 of 16; as above.
template <class Format, class Code>
inline int32_t quantize_on_grid(const Linear& p, const typename Format::Value* x, int64_t padded,
                                int most_code, Code* codes, float* scale) {
  const float inverse = 1.0f / p.grid_scale;
  const int least_code = most_code == 127 ? -128 : -most_code;
  const vfloat low = splat(static_cast<float>(least_code - p.zero_point)),
               high = splat(static_cast<float>(most_code - p.zero_point)), round = splat(0x1.8p23f);
  vint lanes, most = {};
  vuint sum = {};  // codes of NaN may wrap around
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  int64_t i = 0;
  for (; i < p.k; i += kLanes) {
    const vfloat value = load_some<Format>(x + i, p.k - i);
    const vint magnitude = bits(value) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
    vfloat v = value * inverse;
    v = v < low ? low : v;
    v = v > high ? high : v;
    vint q = bits(v + round) - bits(round) + p.zero_point;
    if (p.k - i < kLanes) q = lanes < static_cast<int32_t>(p.k - i) ? q : vint{};
    sum += (vuint)q;
    write_codes(codes + i, q);
  }
  for (; i < padded; i += kLanes) write_codes(codes + i, vint{});
  bool good = p.grid_scale == p.grid_scale;
  for (int lane = 0; lane < kLanes; ++lane) good = good && most[lane] < 0x7f800000;
  *scale = good ? p.grid_scale : std::numeric_limits<float>::quiet_NaN();
  if (!good) return 0;  // whatever the codes are
  uint32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return static_cast<int32_t>(total);
}

inline void quantize(const Quantize& p, int part, int parts) {
  with_single_format(p.x_dtype, [&](auto format) {
    using Format = decltype(format);
    for (int64_t row = p.m * part / parts; row < p.m * (part + 1) / parts; ++row) {
      const auto* x = static_cast<const typename Format::Value*>(p.x) + row * p.k;
      int8_t* codes = p.codes + row * p.k;
      const int64_t whole = p.k / kLanes * kLanes, rest = p.k - whole;
      p.scales[row] = row_scale<Format>(x, p.k);
      if (!(p.scales[row] <= std::numeric_limits<float>::max())) {
        std::memset(codes, 0, p.k);
        continue;
      }
      const float inverse = 1.0f / p.scales[row];
      for (int64_t i = 0; i < whole; i += kLanes)
        write_codes(codes + i, codes_of(Format::load(x + i), inverse));
      if (rest > 0) {
        int8_t last[kLanes];
        write_codes(last, codes_of(load_some<Format>(x + whole, rest), inverse));
        std::memcpy(codes + whole, last, rest);
      }
    }
  });
}

// One row of x in codes up to `most`, `padded` of them; returns their sum. Not for inlining: a
// switch over formats, each time, is much of a file.
template <class Code>
__attribute__((noinline)) int32_t read_codes(const Linear& p, int64_t row, int64_t padded, int most,
                                             Code* out, float* scale) {
  int32_t sum = 0;
  if (p.row_scale != nullptr) {
    // Sizes of its own: a store of bytes may change any member, for all that the compiler knows,
    // and then it makes no vectors of a loop.
    const int64_t k = p.k;
    const int8_t* codes = static_cast<const int8_t*>(p.x) + row * k;
    *scale = p.row_scale[row];
    if constexpr (sizeof(Code) == 1) {
      std::memcpy(out, codes, k);
    } else {
      for (int64_t i = 0; i < k; ++i) out[i] = codes[i];
    }
    for (int64_t i = k; i < padded; ++i) out[i] = 0;
    for (int64_t i = 0; i < k; ++i) sum += codes[i];
    return sum;
  }
  with_single_format(p.x_dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* x = static_cast<const typename Format::Value*>(p.x) + row * p.k;
    sum = p.fixed ? quantize_on_grid<Format>(p, x, padded, most, out, scale)
                  : quantize_row<Format>(x, p.k, padded, most, out, scale);
  });
  return sum;
}

// The power of two that brings a row's largest magnitude to [2^-40, 2^60], where products with a
// weight neither overflow nor leave the normal numbers, unless they are far below the largest; 1
// for a row of zeros or with an inf or NaN.
inline float normalizer(float amax) {
  constexpr int kLow = -40, kHigh = 60;
  if (amax == 0 || !(amax <= std::numeric_limits<float>::max())) return 1;
  const int exponent = std::ilogb(amax), wanted = exponent < kLow    ? kLow
                                                  : exponent > kHigh ? kHigh
                                                                     : exponent;
  return std::ldexp(1.0f, wanted - exponent);
}

// One row of x, times a power of two, in `parts` of bfloat16, each of `padded` values, whose sum it
// is: one of bfloat16, two of float16, three of float32. Returns what undoes the power.
inline __attribute__((noinline)) float read_parts(const Linear& p, int64_t row, int64_t padded,
                                                  int64_t parts, uint16_t* out) {
  float factor = 1;
  with_single_format(p.x_dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* x = static_cast<const typename Format::Value*>(p.x) + row * p.k;
    factor = normalizer(row_magnitude<Format>(x, p.k));
    if (std::is_same_v<Format, BFloat16> && factor == 1) {
      std::memcpy(out, x, p.k * sizeof *x);
      std::memset(out + p.k, 0, (padded - p.k) * sizeof *x);
      return;
    }
    for (int64_t i = 0; i < padded; i += kLanes) {
      vfloat rest = i < p.k ? load_some<Format>(x + i, p.k - i) * factor : vfloat{};
      for (int64_t part = 0; part < parts; ++part) {
        const vuint all = (vuint)rest, upper = rest == rest ? all & 0xffff0000 : all | 0x400000;
        write(out + part * padded + i, __builtin_convertvector(upper >> 16, vhalf));
        rest = (all & 0x7f800000) == 0x7f800000 ? vfloat{} : rest - (vfloat)upper;
      }
    }
  });
  return 1 / factor;
}

// One row of x as a tier wants it, `padded` codes long; returns the sum of its codes.
template <class T>
int32_t read_row(const Linear& p, int64_t row, int64_t padded, typename T::Code* out,
                 float* scale) {
  if constexpr (std::is_same_v<typename T::Code, float>) {
    to_floats(p.x_dtype, p.x, row * p.k, p.k, padded, out);
    return 0;
  } else if constexpr (kInBfloat16<T>) {
    *scale = read_parts(p, row, padded, T::kParts, out);
    return 0;
  } else {
    return read_codes(p, row, padded, kMostCode<T>, out, scale);
  }
}

}  // namespace
}  // namespace qnn
