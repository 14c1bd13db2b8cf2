// What the ops of attention make of their arguments alike.
#pragma once

#include <cmath>
#include <optional>
#include <string>

#include "attention/attention.h"
#include "ops/arguments.h"

namespace qnn {

// What `why_not_attention` in kernels/reference/attention.py says.
inline void require_heads(const Arguments& args, const Attention& p) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  if (p.d < 1) args.fail("d must be at least 1, got 0");
  if (p.g > 0 ? p.h % p.g != 0 : p.h > 0)
    args.fail("the heads of k and v must divide those of q, " + text(p.h) + ", got " + text(p.g));
}

inline void require_mask(const Arguments& args, const Attention& p, const Tensor& mask) {
  if (p.causal) args.fail("mask and is_causal exclude each other; take both into the mask");
  const int64_t wanted[] = {p.b, p.h, p.m, p.n};
  bool good = mask.dim() == 4;
  for (int axis = 0; good && axis < 4; ++axis)
    good = mask.size(axis) == 1 || mask.size(axis) == wanted[axis];
  if (good) return;
  std::string want, got;
  for (const int64_t size : wanted) want += (want.empty() ? "" : ", ") + std::to_string(size);
  for (int64_t axis = 0; axis < mask.dim(); ++axis)
    got += (got.empty() ? "" : ", ") + std::to_string(mask.size(axis));
  args.fail("mask must be [" + want + "], or 1 along some of its axes, got [" + got + "]");
}

// As it lies, if its last axis is dense, else a copy.
inline Rows rows_of(Arguments& args, const Tensor& t) {
  const int64_t columns = t.size(3);
  if (columns == 1 || t.stride(3) == 1)
    return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  return {args.data(t), t.size(1) * t.size(2) * columns, t.size(2) * columns, columns};
}

inline void set_mask(Arguments& args, Attention& p, const Tensor& mask) {
  p.mask = rows_of(args, mask);
  // A size of 1, or an axis that was expanded.
  int64_t* const strides[] = {&p.mask.batch, &p.mask.head, &p.mask.row};
  for (int axis = 0; axis < 3; ++axis) {
    if (mask.size(axis) == 1) *strides[axis] = 0;
  }
  p.mask_key = mask.size(3) == 1 ? 0 : 1;
  p.mask_is_bool = mask.scalar_type() == ScalarType::Bool;
  if (!p.mask_is_bool) p.mask_dtype = float_format(mask);
}

// Of scores: 2^−10 of a power of two.
inline float unit_of(const std::optional<double>& scale, int64_t d) {
  const double factor = scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(d));
  return static_cast<float>(factor) * 1.44269504f * 1024.0f;
}

}  // namespace qnn
