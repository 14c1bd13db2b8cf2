// Lookups, for any decoder of linear/decoders: a piece of a row becomes floats that stay in the
// first-level cache, and then values of y.
#pragma once

#include "embedding/lookup.h"
#include "linear/float_tier.h"

namespace qnn {
namespace {

// Columns at a time: a whole number of the steps of every decoder.
constexpr int64_t kPiece = 512;
static_assert(kPiece % AllDecoders::kStep == 0);

// The values of columns k … k + count of a row times `scale`, in `to`, which has room for whole
// steps. Not for inlining, as what follows: a switch over decoders or formats, each time, is much
// of a file.
__attribute__((noinline)) void decode_piece(const WeightRow& row, int64_t k, int64_t count,
                                            float scale, float* to) {
  const vfloat by = splat(scale);
  AllDecoders::with(row.decoder, [&](auto decoder) {
    using D = decltype(decoder);
    D::panel(to, row, k, count, [&](vfloat v) { return v * by; });
    // A product may have the NaN of a row in its first place; here each value has its own.
    if constexpr (D::kDecoder == Decoder::e4m3) {
      if (to[0] != to[0]) {
        for (int64_t i = 0; i < count; ++i) to[i] = kE4m3Values.values[row.codes[k + i]] * scale;
      }
    }
  });
}

// So many values to y, from `at` on.
__attribute__((noinline)) void store_piece(DType dtype, void* y, int64_t at, const float* values,
                                           int64_t count) {
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    auto* to = static_cast<typename Format::Value*>(y) + at;
    for (int64_t i = 0; i < count; i += kLanes)
      store_some<Format>(to + i, read<vfloat>(values + i), count - i);
  });
}

// So many floats, in vectors; the last may reach beyond them.
template <class Each>
QNN_INLINE void in_vectors(int64_t count, const Each& each) {
  for (int64_t i = 0; i < count; i += kLanes) each(i);
}

template <class T>
struct Lookups {
  explicit Lookups(const Lookup& p) : p(p), k(p.table.k) {}
  const Lookup& p;
  const int64_t k;
  // Whole vectors after the end of a piece may be written.
  alignas(64) float values[kPiece + 64], sums[kPiece + 64];

  float scale(int64_t id) const { return p.table.sw[p.table.weight.grouped() ? 0 : id]; }

  void rows(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = p.id(i), at = i * k;
      const WeightRow row = T::row(p.table, id);
      const float by = scale(id);
      for (int64_t c = 0; c < k; c += kPiece) {
        const int64_t count = smaller(kPiece, k - c);
        const bool in_place = p.table.y_dtype == DType::float32 && count % AllDecoders::kStep == 0;
        float* to = in_place ? static_cast<float*>(p.table.y) + at + c : values;
        decode_piece(row, c, count, by, to);
        if (!in_place) store_piece(p.table.y_dtype, p.table.y, at + c, values, count);
      }
    }
  }

  void bag(int64_t b, int64_t begin, int64_t end) {
    int64_t number = 0;
    for (int64_t i = begin; i < end; ++i) number += p.id(i) != p.padding;
    const bool largest = p.mode == Bag::max && number > 0;
    for (int64_t c = 0; c < k; c += kPiece) {
      const int64_t count = smaller(kPiece, k - c);
      const vfloat first = splat(largest ? -__builtin_inff() : 0.0f);
      in_vectors(count, [&](int64_t j) { write(sums + j, first); });
      for (int64_t i = begin; i < end; ++i) {
        const int64_t id = p.id(i);
        if (id == p.padding) continue;
        decode_piece(T::row(p.table, id), c, count, scale(id), values);
        alignas(64) float one[kLanes] = {1.0f};
        if (p.weights != nullptr) to_floats(p.table.y_dtype, p.weights, i, 1, kLanes, one);
        const vfloat weight = splat(one[0]);
        in_vectors(count, [&](int64_t j) {
          const vfloat v = read<vfloat>(values + j) * weight, sum = read<vfloat>(sums + j);
          if (largest) {
            write(sums + j, (v > sum) | (v != v) ? v : sum);  // NaN stays NaN
          } else {
            write(sums + j, sum + v);
          }
        });
      }
      const vfloat among =
          splat(p.mode == Bag::mean ? static_cast<float>(larger(1, number)) : 1.0f);
      in_vectors(count, [&](int64_t j) { write(sums + j, read<vfloat>(sums + j) / among); });
      store_piece(p.table.y_dtype, p.table.y, b * k + c, sums, count);
    }
  }
};

// Share `part` of `parts`.
template <class T>
void look_up(const Lookup& p, int part, int parts) {
  Lookups<T> all(p);
  const int64_t begin = p.count * part / parts, end = p.count * (part + 1) / parts;
  if (p.offsets == nullptr) return all.rows(begin, end);
  // The bags that begin at the part's own ids; the last part has those that are empty at the end.
  const auto bag_at = [&](int64_t id) {
    int64_t low = 0, high = p.bags;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      p.offsets[middle] < id ? void(low = middle + 1) : void(high = middle);
    }
    return low;
  };
  const int64_t last = part + 1 == parts ? p.bags : bag_at(end);
  for (int64_t b = part == 0 ? 0 : bag_at(begin); b < last; ++b)
    all.bag(b, p.offsets[b], p.offsets[b + 1]);
}

}  // namespace
}  // namespace qnn
