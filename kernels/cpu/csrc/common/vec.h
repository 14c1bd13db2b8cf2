// Vectors of QNN_LANES 32-bit values, which the including tier defines, in the compiler's own
// vector types: the same source becomes AVX-512, AVX2 or NEON. Everything is in an unnamed
// namespace, so that code compiled for one instruction set is never linked into another's.
#pragma once

#ifndef QNN_LANES
#error "a tier's file defines QNN_LANES, 4, 8 or 16, before its first include"
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/types.h"

namespace qnn {
namespace {

constexpr int kLanes = QNN_LANES;

typedef float vfloat __attribute__((vector_size(4 * QNN_LANES)));
typedef int32_t vint __attribute__((vector_size(4 * QNN_LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * QNN_LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * QNN_LANES)));
typedef uint16_t vhalves __attribute__((vector_size(4 * QNN_LANES)));
typedef int16_t vshort __attribute__((vector_size(2 * QNN_LANES)));
typedef int8_t vbyte __attribute__((vector_size(QNN_LANES)));
typedef uint8_t vubyte __attribute__((vector_size(QNN_LANES)));
typedef double vdouble __attribute__((vector_size(8 * QNN_LANES)));
// As many as fill a register in double: a conversion of more GCC 12 does one by one.
typedef int32_t vhalfint __attribute__((vector_size(2 * QNN_LANES)));
typedef float vhalffloat __attribute__((vector_size(2 * QNN_LANES)));
typedef double vhalfdouble __attribute__((vector_size(4 * QNN_LANES)));

template <class V>
inline V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void write(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// Bytes from `p` on, of which `left` are there; zeros after them.
template <class V>
inline V bytes_of(const void* p, int64_t left) {
  if (left >= static_cast<int64_t>(sizeof(V))) return read<V>(p);
  uint8_t some[sizeof(V)] = {};
  std::memcpy(some, p, left);
  return read<V>(some);
}

inline vfloat splat(float x) { return x - vfloat{}; }
inline vint splat(int32_t x) { return x - vint{}; }
inline vint bits(vfloat x) { return (vint)x; }
inline vfloat floats(vint x) { return __builtin_convertvector(x, vfloat); }
inline vfloat sum_as_float(vint acc) { return floats(acc); }
inline vfloat sum_as_float(vfloat acc) { return acc; }
inline vfloat sum_as_float(vdouble acc) { return __builtin_convertvector(acc, vfloat); }

// a · b + c, rounded once where the instruction set can.
inline vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__) && QNN_LANES == 16
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && QNN_LANES == 8
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// To a whole number, ties to even.
inline vfloat nearest(vfloat x) {
#if defined(__AVX512F__) && QNN_LANES == 16
  return (vfloat)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__) && QNN_LANES == 8
  return (vfloat)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vint sign = bits(x) & (vint)splat(-0.0f);
  const vfloat magnitude = (vfloat)(bits(x) ^ sign), step = splat(0x1p23f);
  const vfloat rounded = magnitude + step - step;
  return (vfloat)(bits(magnitude < step ? rounded : magnitude) | sign);
#endif
}

// For what takes an inner kernel's sums: inlined before the compiler looks for registers.
#define QNN_INLINE inline __attribute__((always_inline))

// For the inner kernels: on its own, so that GCC keeps an array of sums in registers. What it
// learns from the callers of a static function makes it store each sum back at each step (GCC 12),
// which costs half of the speed. Every loop over the sums is written out for the same reason.
#if defined(__clang__)
#define QNN_KERNEL __attribute__((noinline))
#else
#define QNN_KERNEL __attribute__((noipa))
#endif

// For what a call does once, around its kernels: for size, and so quick to compile.
#define QNN_ONCE __attribute__((noinline, cold))

// -- float formats in memory

struct Float32 {
  using Value = float;
  static vfloat load(const Value* p) { return read<vfloat>(p); }
  static vfloat round(vfloat x) { return x; }             // as it reads after a cast to the format
  static vint pack(vfloat x, vfloat) { return bits(x); }  // cast, as many to a word as go
  static void store(Value* p, vfloat x) { write(p, x); }
};

struct BFloat16 {
  using Value = uint16_t;
  static vfloat load(const Value* p) {
    return (vfloat)(__builtin_convertvector(read<vhalf>(p), vuint) << 16);
  }
  // In the upper halves: to nearest, ties to even.
  static vuint halves(vfloat x) {
    const vuint u = (vuint)x;
    return x != x ? u | 0x400000 : u + 0x7fff + ((u >> 16) & 1);
  }
  static vfloat round(vfloat x) { return (vfloat)(halves(x) & 0xffff0000); }
  static vint pack(vfloat low, vfloat high) {
    return (vint)(halves(low) >> 16 | (halves(high) & 0xffff0000));
  }
  static void store(Value* p, vfloat x) {
    write(p, __builtin_convertvector(halves(x) >> 16, vhalf));
  }
};

struct Float16 {
  using Value = uint16_t;
  static vfloat round(vfloat x) {
    Value cast[kLanes];
    store(cast, x);
    return load(cast);
  }
  static vint pack(vfloat low, vfloat high) {
    Value cast[2 * kLanes];
    store(cast, low);
    store(cast + kLanes, high);
    const vuint upper = __builtin_convertvector(read<vhalf>(cast + kLanes), vuint);
    return (vint)(__builtin_convertvector(read<vhalf>(cast), vuint) | upper << 16);
  }
#if defined(__AVX512F__) && QNN_LANES == 16
  static vfloat load(const Value* p) { return (vfloat)_mm512_cvtph_ps(read<__m256i>(p)); }
  static void store(Value* p, vfloat x) {
    write(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__F16C__) && QNN_LANES == 8
  static vfloat load(const Value* p) { return (vfloat)_mm256_cvtph_ps(read<__m128i>(p)); }
  static void store(Value* p, vfloat x) {
    write(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static vfloat load(const Value* p) {
    const vuint h = __builtin_convertvector(read<vhalf>(p), vuint);
    const vuint magnitude = (h & 0x7fff) << 13;
    // 2^112 moves the exponent from bias 15 to 127, and makes normal numbers of subnormal ones.
    const vfloat finite = (vfloat)magnitude * splat(0x1p112f);
    const vuint special = magnitude | 0x7f800000;
    const vuint value = magnitude >= 0x0f800000 ? special : (vuint)finite;
    return (vfloat)(value | (h & 0x8000) << 16);
  }
  static void store(Value* p, vfloat x) {
    const vuint u = (vuint)x, sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    // Normal: round the mantissa in place. Subnormal: adding 0.5 leaves the result, rounded, in the
    // low bits.
    const vuint normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const vuint subnormal = (vuint)((vfloat)magnitude + splat(0.5f)) - 0x3f000000;
    vuint h = magnitude < 0x38800000 ? subnormal : normal;
    h = magnitude >= 0x477ff000 ? vuint{} + 0x7c00 : h;  // 65,520 and more
    h = magnitude > 0x7f800000 ? (magnitude >> 13 & 0x3ff) | 0x7e00 : h;
    write(p, __builtin_convertvector(h | sign, vhalf));
  }
#endif
};

struct Float64 {
  using Value = double;
  static vfloat load(const Value* p) { return __builtin_convertvector(read<vdouble>(p), vfloat); }
  static void store(Value* p, vfloat x) { write(p, __builtin_convertvector(x, vdouble)); }
};

template <class Run>
inline void with_format(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float32:
      return run(Float32{});
    case DType::bfloat16:
      return run(BFloat16{});
    case DType::float16:
      return run(Float16{});
    case DType::float64:
      return run(Float64{});
  }
}

// The same without float64, of which a tier has but `to_floats`.
template <class Run>
inline void with_single_format(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float32:
      return run(Float32{});
    case DType::bfloat16:
      return run(BFloat16{});
    default:
      return run(Float16{});
  }
}

// The first `count` values; the other lanes are 0.
template <class Format>
inline vfloat load_some(const typename Format::Value* p, int64_t count) {
  if (count >= kLanes) return Format::load(p);
  typename Format::Value some[kLanes] = {};
  std::memcpy(some, p, count * sizeof *p);
  return Format::load(some);
}

template <class Format>
inline void store_some(typename Format::Value* p, vfloat x, int64_t count) {
  if (count >= kLanes) return Format::store(p, x);
  typename Format::Value some[kLanes];
  Format::store(some, x);
  std::memcpy(p, some, count * sizeof *p);
}

// `count` values from `at` on as float32, then zeros, in whole vectors up to `padded`. Not for
// inlining: a switch over formats, each time, is much of a file.
__attribute__((noinline)) void to_floats(DType dtype, const void* from, int64_t at, int64_t count,
                                         int64_t padded, float* to) {
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* x = static_cast<const typename Format::Value*>(from) + at;
    for (int64_t i = 0; i < padded; i += kLanes)
      write(to + i, i < count ? load_some<Format>(x + i, count - i) : vfloat{});
  });
}

// -- activations

// The lesser and the greater of x and a bound; NaN stays NaN.
inline vfloat at_most(vfloat bound, vfloat x) {
#if defined(__AVX512F__) && QNN_LANES == 16
  return (vfloat)_mm512_min_ps((__m512)bound, (__m512)x);
#else
  return x > bound ? bound : x;
#endif
}
inline vfloat at_least(vfloat bound, vfloat x) {
#if defined(__AVX512F__) && QNN_LANES == 16
  return (vfloat)_mm512_max_ps((__m512)bound, (__m512)x);
#else
  return x < bound ? bound : x;
#endif
}

// 1 / x to 1 ulp, for finite x from 2^-126 on.
inline vfloat reciprocal(vfloat x) {
#if defined(__AVX512F__) && QNN_LANES == 16
  // 14 bits, and twice as many after a Newton step: a third of a division's time.
  const vfloat guess = (vfloat)_mm512_rcp14_ps((__m512)x);
  return fma(guess, fma(-x, guess, splat(1.0f)), guess);
#else
  return 1.0f / x;
#endif
}

// 2^n · x for whole n, |n| ≤ 252.
inline vfloat scaled(vfloat x, vfloat n) {
#if defined(__AVX512F__) && QNN_LANES == 16
  return (vfloat)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  // In two factors: 2^128 alone is no float.
  const vint whole = __builtin_convertvector(n, vint), half = whole >> 1;
  return x * (vfloat)((half + 127) << 23) * (vfloat)((whole - half + 127) << 23);
#endif
}

// e^x to 1 ulp: x = n · ln2 + r with |r| ≤ ln2 / 2, and a polynomial of degree 6 for e^r. x is cut
// off where e^x has left float32's normal numbers, and NaN stays NaN.
inline vfloat exp(vfloat x) {
  const vfloat round = splat(0x1.8p23f);
  const vfloat c = at_least(splat(-104.0f), at_most(splat(89.0f), x));
  const vfloat n = fma(c, splat(1.44269504f), round) - round;
  vfloat r = fma(n, splat(-0.693145752f), c);
  r = fma(n, splat(-1.42860677e-6f), r);
  // The least relative error on |r| ≤ ln2 / 2, 3e-9.
  vfloat e = splat(1.38145394e-3f);
  e = fma(e, r, splat(8.36874518e-3f));
  e = fma(e, r, splat(4.16683908e-2f));
  e = fma(e, r, splat(1.66665204e-1f));
  e = fma(e, r, splat(4.99999934e-1f));
  e = fma(e, r, splat(1.0f));
  e = fma(e, r, splat(1.0f));
  return scaled(e, n);
}

// Abramowitz and Stegun 7.1.26, |error| ≤ 1.5e-7 before float32's roundings: the polynomial that
// torch's own gelu uses, so that a folded gelu is the separate one but for its last bit.
inline vfloat erf(vfloat x) {
  // From 10 on, where erf is 1, also for inf: the reciprocal takes finite values.
  const vfloat magnitude = at_most(splat(10.0f), (vfloat)(bits(x) & 0x7fffffff));
  const vfloat t = reciprocal(fma(splat(0.3275911f), magnitude, splat(1.0f)));
  vfloat r = fma(splat(1.061405429f), t, splat(-1.453152027f));
  r = fma(r, t, splat(1.421413741f));
  r = fma(r, t, splat(-0.284496736f));
  r = fma(r, t, splat(0.254829592f));
  const vfloat e = fma(-exp(-(x * x)) * t, r, splat(1.0f));
  return (vfloat)(bits(e) ^ (bits(x) & (vint)splat(-0.0f)));
}

inline vfloat tanh(vfloat x) { return 1.0f - 2.0f / (exp(x + x) + 1.0f); }

inline vfloat activate(Activation activation, vfloat x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < 0.0f ? splat(0.0f) : x;  // NaN stays NaN
    case Activation::gelu:
      return x * 0.5f * (1.0f + erf(x * 0.70710678f));
    case Activation::gelu_tanh: {
      const vfloat inner = 0.79788456f * (x + 0.044715f * (x * x * x));
      return 0.5f * x * (1.0f + tanh(inner));
    }
    case Activation::silu:
      return x / (1.0f + exp(-x));
    case Activation::relu6:
      return at_most(splat(6.0f), at_least(splat(0.0f), x));
    case Activation::hardswish:
      return x * at_most(splat(6.0f), at_least(splat(0.0f), x + 3.0f)) / 6.0f;
    case Activation::hardsigmoid:
      return at_most(splat(6.0f), at_least(splat(0.0f), x + 3.0f)) / 6.0f;
  }
  return x;
}

// `rows` vectors of values, each rounded to Format first. A function of its own, so that the
// constants stay in registers.
template <class Format>
QNN_KERNEL void activate_all(Activation activation, float* values, int64_t rows) {
  const auto each = [&](auto which) {
    for (int64_t r = 0; r < rows; ++r) {
      write(values + r * kLanes,
            activate(which(), Format::round(read<vfloat>(values + r * kLanes))));
    }
  };
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
      return each(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu:
      return each(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return each(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::silu:
      return each(std::integral_constant<Activation, Activation::silu>{});
    case Activation::relu6:
      return each(std::integral_constant<Activation, Activation::relu6>{});
    case Activation::hardswish:
      return each(std::integral_constant<Activation, Activation::hardswish>{});
    case Activation::hardsigmoid:
      return each(std::integral_constant<Activation, Activation::hardsigmoid>{});
  }
}

}  // namespace
}  // namespace qnn
