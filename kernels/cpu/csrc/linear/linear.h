// What one call of a quantised linear layer is, and what does it: the border
// between ops.cpp, which knows torch, and the tiers, which know the CPU.
#pragma once

#include "linear/weight.h"

namespace qnn {

// y = act(x · (w · sw)ᵀ + bias) + residual. Row-major and dense: x [m, k], w [n, k], sw and bias
// [n], residual and y [m, n]. The meaning, to the bit, is the reference in
// kernels/reference/int8.py, and of a fixed grid that in int8_static.py there; where rows stay
// floats, but for the order of the sums, the product with the dequantised weight.
struct Linear {
  int64_t m, n, k;
  const void* x;           // floats, or int8 codes where `row_scale` is given
  DType x_dtype;           // of the floats
  const float* row_scale;  // [m], or null: the rows are quantised here
  bool fixed;              // on one grid for all rows, of `grid_scale`; NaN where that is unusable
  float grid_scale;
  int32_t zero_point;  // the code of 0; y is of (code - zero_point) · w. 0 but on a fixed grid
  WeightFormat weight;
  const int8_t* w;          // codes, `row_bytes` of the format a row
  const float* sw;          // [n], a scale per channel; [1] where groups have scales of their own
  const void* group_scale;  // [n, groups] of the format's kind, or null
  const uint8_t* zero_points;  // [n, groups], the codes of 0, or null
  const void* bias;            // or null
  DType bias_dtype;
  const void* residual;  // or null; in y_dtype
  Activation activation;
  void* y;
  DType y_dtype;
};

namespace {

// Why the kernels cannot take a call, or null.
inline const char* why_not(const Linear& p) {
  if (const char* why = why_not(p.weight)) return why;
  if (p.m <= 0 || p.n <= 0 || p.k < 0) return "an empty result";
  if (p.y == nullptr || p.sw == nullptr) return "a missing operand";
  if (p.k > 0 && (p.x == nullptr || p.w == nullptr)) return "a missing operand";
  if (p.weight.grouped() ? p.k > 0 && p.group_scale == nullptr : p.group_scale != nullptr)
    return "scales of groups, or none, against the format";
  if (p.weight.zero_points ? p.k > 0 && p.zero_points == nullptr : p.zero_points != nullptr)
    return "zero points, or none, against the format";
  if (p.weight.decoder == Decoder::int4 && p.k % p.weight.group != 0)
    return "rows that are not whole groups";
  return nullptr;
}

}  // namespace

// An implementation for one instruction set. `run` does share `part` of `parts` of a call, on any
// thread, in `scratch_bytes` of memory of its own, aligned to 64.
struct Kernel {
  size_t (*scratch_bytes)(const Linear&);
  void (*run)(const Linear&, int part, int parts, char* scratch);
};

// What quantising rows alone needs: `run` does share `part` of `parts` of x [m, k] to codes [m, k]
// and scales [m].
struct Quantize {
  int64_t m, k;
  const void* x;
  DType x_dtype;
  int8_t* codes;
  float* scales;
};

}  // namespace qnn
