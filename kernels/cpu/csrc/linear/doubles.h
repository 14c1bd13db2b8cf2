// float64 operands, by way of float32: the tiers know no float64, for which nobody waits. Compiled
// for every CPU.
#pragma once

#include "common/doubles.h"
#include "linear/linear.h"

namespace qnn {
namespace {

inline const float* to_single(const void* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = static_cast<float>(static_cast<const double*>(from)[i]);
  return to;
}

// Whether x has float64 too: not where it is codes.
inline bool has_double_rows(const Linear& p) {
  return p.x_dtype == DType::float64 && p.row_scale == nullptr;
}

// A call whose y is float64, as a tier takes it: x, which is read as float32 anyway, cast to `x`,
// of m · k values if `has_double_rows`; and y up to the activation, in `y`, of m · n.
inline Linear without_doubles(Linear p, float* x, float* y) {
  if (has_double_rows(p)) p.x = to_single(p.x, p.m * p.k, x);
  p.x_dtype = p.y_dtype = DType::float32;
  p.residual = nullptr, p.activation = Activation::none, p.y = y;
  return p;
}

// The activation and the residual of the call itself, in double.
inline void finish_doubles(const Linear& p, const float* y) {
  const auto* residual = static_cast<const double*>(p.residual);
  for (int64_t i = 0; i < p.m * p.n; ++i) {
    const double value = activate(p.activation, static_cast<double>(y[i]));
    static_cast<double*>(p.y)[i] = residual == nullptr ? value : value + residual[i];
  }
}

}  // namespace
}  // namespace qnn
