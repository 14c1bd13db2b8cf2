// What one call of a quantised linear layer is, and what does it: the border
// between ops.cpp, which knows torch, and the tiers, which know the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qnn {

enum class DType { float32, bfloat16, float16, float64 };
enum class Activation { none, relu, gelu, gelu_tanh, silu };
// What w is stored in. e2m1: two codes a byte, the even one in the low nibble, in blocks of 16.
enum class Weight { int8, e4m3, e2m1 };

// y = act(x · (w · sw)ᵀ + bias) + residual. Row-major and dense: x [m, k], w [n, k], sw and bias
// [n], residual and y [m, n]. The meaning, to the bit, is the reference in kernels/int8.py, and of
// a fixed grid that in kernels/int8_static.py; that of a float weight, but for the order of its
// sums, the one in kernels/float_ops.py.
struct Linear {
  int64_t m, n, k;
  const void* x;           // floats, or int8 codes where `row_scale` is given
  DType x_dtype;           // of the floats
  const float* row_scale;  // [m], or null: the rows are quantised here
  bool fixed;              // on one grid for all rows, of `grid_scale`; NaN where that is unusable
  float grid_scale;
  int32_t zero_point;  // the code of 0; y is of (code - zero_point) · w. 0 but on a fixed grid
  Weight weight;
  const int8_t* w;             // codes of any format, in bytes
  int64_t w_stride;            // bytes from a row of w to the next
  const uint8_t* block_scale;  // of e2m1: e4m3 codes [n, k/16]
  const float* sw;             // of e2m1: [1]
  const void* bias;            // or null
  DType bias_dtype;
  const void* residual;  // or null; in y_dtype
  Activation activation;
  void* y;
  DType y_dtype;
};

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

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

}  // namespace qnn
