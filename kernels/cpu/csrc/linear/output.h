// The epilogue: from sums to y.
#pragma once

#include "common/scratch.h"
#include "common/vec.h"
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

// The way from sums to y: scales, bias, cast; then the activation and the residual, each on what
// the cast left, with a cast of its own. So one call gives what separate operations give.
// Everything is held by value: through a reference the compiler would have to read it again after
// each store to y.
template <class T, class Format>
struct Output {
  using Value = typename Format::Value;
  using Sum = typename T::Sum;
  static constexpr int kPerWord = 4 / sizeof(Value), kTurned = kLanes * kPerWord;

  const float* sw;
  const float* bias;
  const int32_t* start;
  Value* y;  // of the chunk's first column, in row 0
  const Value* residual;
  int64_t stride, count;
  Activation activation;

  Output(const Linear& p, const Columns<T>& columns)
      : sw(columns.sw),
        bias(columns.bias),
        start(columns.start),
        y(static_cast<Value*>(p.y) + columns.begin),
        residual(p.residual == nullptr ? nullptr
                                       : static_cast<const Value*>(p.residual) + columns.begin),
        stride(p.n),
        count(columns.count),
        activation(p.activation) {}

  // Dot form: the sums of one row, at the kLanes columns from `c` of the chunk on.
  void row(int64_t row, int64_t c, Sum sums, float sx) const {
    alignas(64) float value[kLanes];
    vfloat scaled = sum_as_float(sums) * read<vfloat>(sw + c);
    if constexpr (T::kQuantizes) scaled = scaled * sx;
    write(value, scaled + read<vfloat>(bias + c));
    if (activation != Activation::none) activate_all<Format>(activation, value, 1);
    put(row * stride + c, read<vfloat>(value), count - c);
  }

  // Blocked form: a vector of sums is a column of up to kLanes rows. kTurned columns from `c` of
  // the chunk on are scaled as they lie, cast, packed into words, and turned on their way to y.
  void columns(int64_t row, int64_t rows, int64_t c, const typename T::Acc* acc, int64_t acc_stride,
               vfloat sx) const {
    alignas(64) float values[kTurned * kLanes];
    alignas(64) int32_t words[kLanes * kLanes], turned[kLanes * kLanes];
    const auto scaled = [&](int64_t i) {
      Sum sum = read<Sum>(acc + i * acc_stride);
      if constexpr (T::kQuantizes && kZeroPoints<T>)
        sum = (vint)((vuint)sum + static_cast<uint32_t>(start[c + i]));
      vfloat value = sum_as_float(sum) * sw[c + i];
      if constexpr (T::kQuantizes) value = value * sx;
      return value + bias[c + i];
    };
    const auto pack = [&](const auto& value) {
      for (int w = 0; w < kLanes; ++w)
        write(words + w * kLanes,
              Format::pack(value(w * kPerWord), value(w * kPerWord + kPerWord - 1)));
    };
    if (activation == Activation::none) {
      pack(scaled);
    } else {
      for (int i = 0; i < kTurned; ++i) write(values + i * kLanes, scaled(i));
      activate_all<Format>(activation, values, kTurned);
      pack([&](int64_t i) { return read<vfloat>(values + i * kLanes); });
    }
    const int64_t at = row * stride + c, left = count - c;
    constexpr int64_t kWordRow = kLanes * 4;
    const bool whole = residual == nullptr && rows == kLanes && left >= kTurned;
    T::transpose(words, kWordRow, whole ? static_cast<void*>(y + at) : turned,
                 whole ? stride * static_cast<int64_t>(sizeof(Value)) : kWordRow);
    for (int64_t r = 0; !whole && r < rows; ++r) {
      const auto* values_of_row = reinterpret_cast<const Value*>(turned + r * kLanes);
      for (int i = 0; i < kTurned && i < left; i += kLanes)
        put(at + r * stride + i, Format::load(values_of_row + i), left - i);
    }
  }

 private:
  // The last steps at `left` or kLanes elements of y from `at` on.
  void put(int64_t at, vfloat value, int64_t left) const {
    if (residual != nullptr) value = Format::round(value) + load_some<Format>(residual + at, left);
    store_some<Format>(y + at, value, left);
  }
};

}  // namespace
}  // namespace qnn
