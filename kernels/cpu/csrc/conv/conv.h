// What one call of a quantised convolution is, and what does it: the border between
// ops/conv_ops.cpp, which knows torch, and the tiers, which know the CPU.
#pragma once

#include "common/types.h"

namespace qnn {

// What x is: floats, quantised per sample or on a fixed grid; codes on a grid, with a scale for
// each sample; or floats that stay so. Codes are uint8, 128 more than the int8 code.
enum class ConvInput { dynamic, fixed, codes, floats };

// y = last(act(conv(x, w) · sw · sx + bias) + residual) over axes t h w; 1-D and 2-D calls have
// axes of size 1. The meaning is the reference in kernels/reference/conv.py: to the bit but for
// `floats`, where the order of the sums is free.
struct Conv {
  int64_t batch, channels, outputs, groups;
  int64_t in[3], out[3], kernel[3], stride[3], dilation[3];
  int64_t before[3];  // zeros before x; below 0, values of x that no window begins at
  ConvInput input;
  const void* x;  // dense, [batch, *in, channels] where `x_last`, else [batch, channels, *in]
  bool x_last;
  DType x_dtype;              // of floats
  const float* sample_scale;  // [batch]; of `fixed` null, unless some samples are to be NaN
  float grid_scale;           // of `fixed`; NaN where it is unusable
  int32_t zero_point;         // of `fixed` and `codes`; else 0
  int32_t* odd;      // [batch], to be set where x, of `fixed`, or what becomes codes has NaN or inf
  const int8_t* w;   // [outputs, *kernel, channels / groups]
  const float* sw;   // [outputs]
  const void* bias;  // [outputs], or null
  DType bias_dtype;
  Activation activation;
  const void* residual;           // in y_dtype, lying as y, or null
  const uint8_t* residual_codes;  // the same, of another one
  const float* residual_scale;    // [batch]
  int32_t residual_zero_point;
  bool last_relu;
  void* y;  // [batch, *out, outputs] where `y_last`, else [batch, outputs, *out]; or null
  bool y_last;
  DType y_dtype;
  uint8_t* codes;  // of y, on a grid, lying as y; or null
  float y_inverse;
  int32_t y_zero_point;

  int64_t depth() const { return channels / groups; }  // channels that an output sees
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t rows() const { return batch * out[0] * out[1]; }  // of y, along its last axis
  int64_t pixels() const { return rows() * out[2]; }
  int64_t sample() const { return channels * in[0] * in[1] * in[2]; }  // values
  bool depthwise() const { return depth() == 1 && outputs == channels; }
};

namespace {

// Why the kernels cannot take a call, or null.
inline const char* why_not(const Conv& p) {
  if (p.groups <= 0 || p.channels % p.groups != 0 || p.outputs % p.groups != 0)
    return "channels that are not whole groups";
  if (p.pixels() <= 0 || p.outputs <= 0) return "an empty result";
  for (int axis = 0; axis < 3; ++axis) {
    if (p.kernel[axis] < 1 || p.stride[axis] < 1 || p.dilation[axis] < 1)
      return "a kernel, a stride or a dilation that is too small";
  }
  return nullptr;
}

}  // namespace

// An implementation for one instruction set. `run` does share `part` of `parts` of a call, on any
// thread, in `scratch_bytes` of memory of its own, aligned to 64. Before it, where the input is
// `dynamic`, every `magnitudes` is done: share `part` of the largest magnitudes of the samples, as
// the bits of a float, to most[batch]; `sample_scale` is then `scale` of the largest of all shares.
// `quantize` makes codes of share `part` of x on the fixed grid, dense, to `codes`; one of int16
// has none. A kernel over floats has none of the three.
struct ConvKernel {
  void (*magnitudes)(const Conv&, int part, int parts, int32_t* most);
  float (*scale)(int32_t most);
  void (*quantize)(const Conv&, int part, int parts);
  size_t (*scratch_bytes)(const Conv&, int parts);
  void (*run)(const Conv&, int part, int parts, char* scratch);
};

}  // namespace qnn
