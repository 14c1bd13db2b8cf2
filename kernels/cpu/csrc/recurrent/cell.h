// The arithmetic of the cells on vectors, to the bit that of kernels/reference/recurrent.py.
#pragma once

#include "common/rows.h"
#include "common/scratch.h"
#include "recurrent/recurrent_call.h"

namespace qnn {
namespace {

// The grid of a part of the cell: a row of the table.
struct Grid {
  float scale = 0, inverse = 0, low = 0, high = 0;
  static Grid of(const float* table, int64_t part) {
    if (table == nullptr || table[4 * part] == 0) return {};
    const float* row = table + 4 * part;
    return {row[0], 1.0f / row[0], row[2] - row[1], row[3] - row[1]};
  }
};

inline vfloat codes_on(const Grid& grid, vfloat v) {
  return nearest(at_most(splat(grid.high), at_least(splat(grid.low), v * grid.inverse)));
}

inline vfloat round_to(const Grid& grid, vfloat v) {
  return grid.scale == 0 ? v : codes_on(grid, v) * grid.scale;
}

inline vfloat cell_tanh(vfloat x) {
  const vfloat c = at_most(splat(8.0f), at_least(splat(-8.0f), x)), z = c * c;
  vfloat p = z * -1.1565058922756906e-13f + 6.365833618762423e-11f;
  p = p * z + -2.2315303070513437e-08f;
  p = p * z + 1.1642605386441574e-05f;
  p = p * z + 0.0031493804417550564f;
  p = p * z + 0.13124364614486694f;
  p = p * z + 1.0f;
  vfloat q = z * 0.00026129968464374542f + 0.02467506378889084f;
  q = q * z + 0.46457695960998535f;
  q = q * z + 1.0f;
  return c * p / q;
}

inline vfloat cell_sigmoid(vfloat x) { return cell_tanh(x * 0.5f) * 0.5f + 0.5f; }

inline vfloat first_lanes(vfloat v, int64_t count) {
  if (count >= kLanes) return v;
  for (int64_t lane = count < 0 ? 0 : count; lane < kLanes; ++lane) v[lane] = 0;
  return v;
}

// These two are not for inlining: a switch over formats, each time, is most of a file.
QNN_KERNEL vfloat load_floats(DType dtype, const void* p, int64_t at, int64_t count) {
  vfloat v = {};
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    v = load_some<Format>(static_cast<const typename Format::Value*>(p) + at, count);
  });
  return v;
}

// Casts to `dtype`, and writes; returns what was written.
QNN_KERNEL vfloat store_floats(DType dtype, void* p, int64_t at, vfloat v, int64_t count) {
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    if constexpr (!std::is_same_v<Format, Float64>) v = Format::round(v);
    store_some<Format>(static_cast<typename Format::Value*>(p) + at, v, count);
  });
  return v;
}

}  // namespace
}  // namespace qnn
