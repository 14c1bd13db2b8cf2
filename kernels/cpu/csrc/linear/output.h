// The epilogue: from sums to y.
#pragma once

#include "common/scratch.h"
#include "common/vec.h"
#include "linear/inner.h"
#include "linear/linear.h"

namespace qnn {
namespace {

// Whether a tier's sums have room for what a zero point adds to them.
template <class T>
constexpr bool kZeroPoints = std::is_same_v<typename T::Sum, vint>;

// The columns of y in one chunk, and what is added and multiplied there, as float32.
template <class T>
struct Columns {
  int64_t begin, count;
  float* sw;
  float* bias;     // -0, which changes no sum, where there is none
  int32_t* start;  // of the blocked form: -zero_point times the sum of a row of w

  static Columns take(Scratch& scratch) {
    return {0, 0, scratch.take<float>(T::kChunk), scratch.take<float>(T::kChunk),
            scratch.take<int32_t>(T::kChunk)};
  }

  void move_to(const Linear& p, int64_t first, int64_t most) {
    begin = first;
    count = p.n - first < most ? p.n - first : most;
    if (p.weight.grouped()) {
      fill(sw, *p.sw);
    } else {
      to_floats(DType::float32, p.sw, first, count, T::kChunk, sw);
    }
    if (p.bias == nullptr) return fill(bias, -0.0f);
    to_floats(p.bias_dtype, p.bias, first, count, T::kChunk, bias);
  }

 private:
  static void fill(float* to, float value) {
    for (int64_t i = 0; i < T::kChunk; i += kLanes) write(to + i, splat(value));
  }
};

// A vector of sums: scales and bias.
template <class T>
QNN_INLINE vfloat scaled_sums(typename T::Sum sums, vfloat sw, vfloat sx, vfloat bias) {
  vfloat value = sum_as_float(sums);
  // There a power of two, which comes first: the sum alone may be out of range.
  if constexpr (kInBfloat16<T>) value = value * sx;
  value = value * sw;
  if constexpr (T::kQuantizes) value = value * sx;
  return value + bias;
}

// What follows is the same for all tiers of a file: the cast to y; then the activation and the
// residual, each on what the cast left, with a cast of its own. So one call gives what separate
// operations give. Everything is held by value: through a reference the compiler would have to
// read it again after each store to y.
template <class Format>
struct Output {
  using Value = typename Format::Value;
  Value* y;
  const Value* residual;
  int64_t stride;
  Activation activation;

  explicit Output(const Linear& p)
      : y(static_cast<Value*>(p.y)),
        residual(static_cast<const Value*>(p.residual)),
        stride(p.n),
        activation(p.activation) {}

  void activate(float* values, int64_t vectors) const {
    if (activation != Activation::none) activate_all<Format>(activation, values, vectors);
  }
  // The last steps at `left` or kLanes elements of y from `at` on.
  void put(int64_t at, vfloat value, int64_t left) const {
    if (residual != nullptr) value = Format::round(value) + load_some<Format>(residual + at, left);
    store_some<Format>(y + at, value, left);
  }
};

// Dot form: rows of values, `values_stride` apart, to `count` columns of y from `column` on.
inline __attribute__((noinline)) void put_rows(const Linear& p, int64_t row, int64_t rows,
                                               int64_t column, int64_t count, float* values,
                                               int64_t values_stride) {
  with_single_format(p.y_dtype, [&](auto format) {
    const Output<decltype(format)> output(p);
    for (const int64_t end = row + rows; row < end; ++row, values += values_stride) {
      output.activate(values, div_up(count, kLanes));
      for (int64_t c = 0; c < count; c += kLanes)
        output.put(row * output.stride + column + c, read<vfloat>(values + c), count - c);
    }
  });
}

// Blocked form: a vector of values is a column of up to kLanes rows. As many columns as fill the
// words of a vector are packed, and turned on their way to y. M is the machine, whose `transpose`
// it is.
template <class M>
__attribute__((noinline)) void put_columns(const Linear& p, int64_t row, int64_t rows,
                                           int64_t column, int64_t count, float* values) {
  with_single_format(p.y_dtype, [&](auto format) {
    using Format = decltype(format);
    using Value = typename Format::Value;
    constexpr int kPerWord = 4 / sizeof(Value), kTurned = kLanes * kPerWord;
    constexpr int64_t kWordRow = kLanes * 4;
    alignas(64) int32_t words[kLanes * kLanes], turned[kLanes * kLanes];
    const Output<Format> output(p);
    for (int64_t c = 0; c < count; c += kTurned, values += kTurned * kLanes) {
      output.activate(values, kTurned);
      const void* packed = values;
      if constexpr (kPerWord > 1) {
        for (int w = 0; w < kLanes; ++w) {
          const float* pair = values + w * kPerWord * kLanes;
          write(words + w * kLanes,
                Format::pack(read<vfloat>(pair), read<vfloat>(pair + (kPerWord - 1) * kLanes)));
        }
        packed = words;
      }
      const int64_t at = row * output.stride + column + c, left = count - c;
      const bool whole = output.residual == nullptr && rows == kLanes && left >= kTurned;
      M::transpose(packed, kWordRow, whole ? static_cast<void*>(output.y + at) : turned,
                   whole ? output.stride * static_cast<int64_t>(sizeof(Value)) : kWordRow);
      for (int64_t r = 0; !whole && r < rows; ++r) {
        const auto* values_of_row = reinterpret_cast<const Value*>(turned + r * kLanes);
        for (int i = 0; i < kTurned && i < left; i += kLanes)
          output.put(at + r * output.stride + i, Format::load(values_of_row + i), left - i);
      }
    }
  });
}

}  // namespace
}  // namespace qnn
