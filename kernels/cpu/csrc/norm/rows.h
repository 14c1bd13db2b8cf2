// Norms, a row at a time, in passes over a row of float32 that stays in the first-level cache.
#pragma once

#include <cmath>
#include <limits>

#include "common/rows.h"
#include "norm/norm.h"

namespace qnn {
namespace {

// `join` of all elements, in memory: halves with halves, until there is one.
template <int kCount, class Element, class Join>
QNN_INLINE Element folded(const Element* all, const Join& join) {
  if constexpr (kCount == 2) {
    return join(all[0], all[1]);
  } else {
    constexpr int kHalf = kCount / 2;
    typedef Element Half __attribute__((vector_size(kHalf * sizeof(Element))));
    Element half[kHalf];
    write(half, join(read<Half>(all), read<Half>(all + kHalf)));
    return folded<kHalf>(half, join);
  }
}

// Σ of what `each(i)` gives for the lanes from i on, in the order of the definition: kNormSums
// partial sums, of which then halves are added to halves.
template <class Each>
QNN_INLINE float sum_of_row(int64_t padded, const Each& each) {
  constexpr int kVectors = kNormSums / kLanes;
  vfloat sums[kVectors] = {};
  for (int64_t i = 0; i < padded; i += kNormSums) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sums[v] += each(i + v * kLanes);
  }
#pragma GCC unroll 16
  for (int half = kVectors / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int v = 0; v < half; ++v) sums[v] += sums[v + half];
  }
  float lanes[kLanes];
  write(lanes, sums[0]);
  return folded<kLanes>(lanes, [](auto a, auto b) { return a + b; });
}

template <class Format>
struct Norms {
  using Value = typename Format::Value;

  Norms(const Norm& p, char* scratch) : p(p), k(p.k), memory(p, scratch) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    fill(p.weight, p.weight_dtype, 1.0f, memory.weight);
    fill(p.bias, p.bias_dtype, -0.0f, memory.bias);  // which adding leaves every number as it is
  }

  void fill(const void* from, DType dtype, float otherwise, float* to) const {
    if (from != nullptr) return to_floats(dtype, from, 0, k, memory.padded, to);
    for (int64_t i = 0; i < memory.padded; ++i) to[i] = otherwise;
  }

  // Zeros in the lanes after the end of a row.
  template <class V>
  V inside(int64_t i, V v) const {
    const int64_t left = k - i;
    return left >= kLanes ? v : (V)(lanes < static_cast<int32_t>(left) ? (vint)v : vint{});
  }

  // A row, with the residual's; its mean where that is asked for.
  template <class Sum>
  float read_row(int64_t at, const Sum& sum) const {
    float* row = memory.row;
    const int64_t k = this->k;
    const Value* x = static_cast<const Value*>(p.x) + at;
    const Value* more =
        p.residual == nullptr ? nullptr : static_cast<const Value*>(p.residual) + at;
    Value* total = p.sum == nullptr ? nullptr : static_cast<Value*>(p.sum) + at;
    return sum(memory.padded, [=](int64_t i) {
      const int64_t left = k - i;
      vfloat v = {};
      if (left > 0) {
        v = load_some<Format>(x + i, left);
        if (more != nullptr) v = Format::round(v + load_some<Format>(more + i, left));
        if (total != nullptr) store_some<Format>(total + i, v, left);
      }
      write(row + i, v);
      return v;
    });
  }

  // The row on its way to y: centred, and 1 / its deviation.
  float prepare(int64_t at) const {
    float* row = memory.row;
    const auto count = static_cast<float>(k);
    const auto sum = [](int64_t padded, const auto& each) { return sum_of_row(padded, each); };
    float variance;
    if (p.kind == NormKind::layer) {
      const float mean = read_row(at, sum) / count;
      variance = sum_of_row(memory.padded, [=](int64_t i) {
        const vfloat v = inside(i, read<vfloat>(row + i) - mean);
        write(row + i, v);
        return v * v;
      });
    } else {
      variance = read_row(at, [&sum](int64_t padded, const auto& each) {
        return sum(padded, [&each](int64_t i) {
          const vfloat v = each(i);
          return v * v;
        });
      });
    }
    return 1.0f / std::sqrt(variance / count + p.eps);
  }

  // y, as it reads after its cast, in the place of the row; returns its largest magnitude, as bits,
  // by which NaN and inf are above every number.
  template <bool kRounded>
  int32_t finish(int64_t at, float by) const {
    float* row = memory.row;
    const float *weight = memory.weight, *bias = memory.bias;
    Value* y = p.y == nullptr ? nullptr : static_cast<Value*>(p.y) + at;
    const int64_t k = this->k;
    vint most = {};
    for (int64_t i = 0; i < k; i += kLanes) {
      vfloat v = read<vfloat>(row + i) * by;
      if (kRounded) v = Format::round(v);
      v = v * read<vfloat>(weight + i) + read<vfloat>(bias + i);
      if (y != nullptr) store_some<Format>(y + i, v, k - i);
      v = Format::round(v);
      write(row + i, v);
      const vint here = inside(i, bits(v) & 0x7fffffff);
      most = here > most ? here : most;
    }
    int32_t all[kLanes];
    write(all, most);
    return folded<kLanes>(all, [](auto a, auto b) { return a > b ? a : b; });
  }

  // So many codes of one row, by the code of a vector of values.
  template <class Code>
  void write_row(int8_t* codes, const Code& code) const {
    const float* row = memory.row;
    const int64_t k = this->k, whole = k / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) write_codes(codes + i, code(read<vfloat>(row + i)));
    if (whole == k) return;
    int8_t last[kLanes];
    write_codes(last, code(read<vfloat>(row + whole)));
    std::memcpy(codes + whole, last, k - whole);
  }

  void quantize(int64_t r, int32_t most) const {
    int8_t* codes = p.codes + r * k;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const bool finite = most < 0x7f800000;
    float amax;
    std::memcpy(&amax, &most, sizeof amax);
    p.scales[r] = !p.fixed ? scale_of(amax) : finite ? p.grid_scale : nan;
    if (!finite || p.scales[r] != p.scales[r]) {
      std::memset(codes, p.fixed ? p.zero_point : 0, k);
      return;
    }
    const float inverse = 1.0f / p.scales[r];
    if (!p.fixed) return write_row(codes, [=](vfloat v) { return codes_of(v, inverse); });
    const int32_t zero_point = p.zero_point;
    const vfloat low = splat(static_cast<float>(-128 - zero_point)),
                 high = splat(static_cast<float>(127 - zero_point)), round = splat(0x1.8p23f);
    write_row(codes, [=](vfloat v) {
      v = v * inverse;
      v = v < low ? low : v;
      v = v > high ? high : v;
      return bits(v + round) - bits(round) + zero_point;
    });
  }

  void run(int64_t begin, int64_t end) const {
    const bool rounded = p.kind == NormKind::rms_rounded;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * k;
      const float by = prepare(at);
      quantize(r, rounded ? finish<true>(at, by) : finish<false>(at, by));
    }
  }

  const Norm& p;
  const int64_t k;
  const NormMemory memory;
  vint lanes;
};

inline void norm_rows(const Norm& p, int part, int parts, char* scratch) {
  with_single_format(p.dtype, [&](auto format) {
    Norms<decltype(format)>(p, scratch).run(p.m * part / parts, p.m * (part + 1) / parts);
  });
}

}  // namespace
}  // namespace qnn
