// What one call of a quantised linear layer is, and what a tier offers: the border between ops.cpp,
// which knows torch, and the tiers, which know the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qnn {

enum class DType { float32, bfloat16, float16, float64 };
enum class Activation { none, relu, gelu, gelu_tanh, silu };

// y = act(x · (w · sw)ᵀ + bias) + residual. Row-major and dense: x [m, k], w [n, k], sw and bias
// [n], residual and y [m, n]. The meaning, to the bit, is the reference in kernels/int8.py.
struct Linear {
  int64_t m, n, k;
  const void* x;           // floats, or int8 codes where `row_scale` is given
  DType x_dtype;           // of the floats
  const float* row_scale;  // [m], or null: the rows are quantised here
  const int8_t* w;
  const float* sw;
  const void* bias;  // or null
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

struct Tier {
  const char* name;
  bool (*runs_here)();
  Kernel int8;         // rows quantised to int8
  Kernel int8_weight;  // rows as they are, float32 accumulation
  void (*quantize)(const Quantize&, int part, int parts);
};

constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

}  // namespace qnn
