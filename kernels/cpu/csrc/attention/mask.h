// Masks, as they are added to scores.
#pragma once

#include <cfloat>
#include <cmath>

#include "attention/attention.h"
#include "common/vec.h"

namespace qnn {
namespace {

// Of a mask, what is added to the scores of a row, with zeros at the end: −inf where a key is
// hidden, and only there.
inline void read_mask(const Attention& p, int64_t sequence, int64_t head, int64_t row, int64_t keys,
                      int64_t padded, float* to) {
  const Rows& mask = p.mask;
  const int64_t at = sequence * mask.batch + head * mask.head + row * mask.row;
  const int64_t count = p.mask_key == 0 ? 1 : keys;
  if (p.mask_is_bool) {
    const auto* seen = static_cast<const uint8_t*>(mask.values) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = seen[i] != 0 ? 0.0f : -INFINITY;
  } else {
    to_floats(p.mask_dtype, mask.values, at, count, round_up(count, kLanes), to);
    for (int64_t i = 0; i < count; i += kLanes) {
      const vfloat value = read<vfloat>(to + i);
      const vfloat added =
          at_most(splat(FLT_MAX), at_least(splat(-FLT_MAX), value * (1.44269504f * 1024)));
      write(to + i, value == splat(-INFINITY) ? splat(-INFINITY) : added);
    }
  }
  for (int64_t i = 1; p.mask_key == 0 && i < keys; ++i) to[i] = to[0];
  for (int64_t i = keys; i < padded; ++i) to[i] = 0.0f;
}

}  // namespace
}  // namespace qnn
