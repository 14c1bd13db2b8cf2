// What one call of a norm whose result is quantised is: the border between norm_ops.cpp, which
// knows torch, and the tiers.
#pragma once

#include "common/scratch.h"
#include "common/types.h"

namespace qnn {

enum class NormKind { layer, rms, rms_rounded };
constexpr const char* kNorms[] = {"layer", "rms", "rms_rounded"};

// Rows of x [m, k], with those of a residual added, normalised and quantised: a scale for each row,
// or on one grid. Row-major and dense. The meaning, to the bit, is the reference in
// kernels/reference/norm.py.
struct Norm {
  int64_t m, k;
  NormKind kind;
  float eps;
  const void *x, *residual;   // the latter or null
  DType dtype;                // of both, of sum and of y; not float64
  const void *weight, *bias;  // [k], or null
  DType weight_dtype, bias_dtype;
  bool fixed;  // on one grid for all rows, of `grid_scale`; NaN where that is unusable
  float grid_scale;
  int32_t zero_point;
  void *sum, *y;  // x + residual, and the result before it is quantised; or null
  int8_t* codes;  // [m, k]
  float* scales;  // [m]
};

namespace {

// A sum along a row has so many partial sums: the first is that of the columns 0, 64, 128, …
constexpr int64_t kNormSums = 64;

// What a thread needs: a row, the weight and the bias as float32.
struct NormMemory {
  NormMemory(const Norm& p, char* base) : scratch(base), padded(round_up(p.k, kNormSums)) {
    row = scratch.take<float>(padded);
    weight = scratch.take<float>(padded);
    bias = scratch.take<float>(padded);
  }
  Scratch scratch;
  int64_t padded;
  float *row, *weight, *bias;
};

inline size_t norm_bytes(const Norm& p) { return NormMemory(p, nullptr).scratch.used(); }

}  // namespace

// Share `part` of `parts` of a call, on any thread, in `norm_bytes` of memory of its own, aligned
// to 64.
using NormKernel = void (*)(const Norm&, int part, int parts, char* scratch);

}  // namespace qnn
