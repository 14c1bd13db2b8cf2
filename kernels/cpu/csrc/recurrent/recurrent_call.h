// What one call of a recurrent layer is: the border between recurrent_ops.cpp, which knows torch,
// and the tiers, which know the CPU.
#pragma once

#include "common/types.h"

namespace qnn {

enum class Cell { lstm, gru };
// int8, int8_static, int8_weight
enum class Scheme { dynamic, fixed, weight };

// An LSTM or a GRU, one layer in one direction; row-major and dense. G is 4 or 3. The meaning is
// the reference in kernels/recurrent.py: to the bit, but for the order of the float sums of
// `weight`.
struct Recurrent {
  Cell cell;
  Scheme scheme;
  int64_t steps, batch, inputs, hidden, outputs;  // T, B, I, H, P
  const void* x;                                  // [T, B, I]
  const void *h0, *c0;                            // [B, P], [B, H]; c0 null in a GRU
  DType dtype;                                    // of x, h0, c0 and the results
  const int8_t *w_ih, *w_hh, *w_hr;               // [G H, I], [G H, P], [P, H] or null
  const float *sw_ih, *sw_hh, *sw_hr;
  const float* table;       // [parts, 4] of `fixed`: scale, zero point, qmin, qmax
  const void *b_ih, *b_hh;  // [G H] or null
  DType b_ih_dtype, b_hh_dtype;
  const int64_t* lengths;  // [B] or null
  bool reverse;
  void *y, *h_n, *c_n;  // [T, B, P], [B, P], [B, H]
};

// Where the parts of a call wait for each other. On lines of their own: what all watch, and what
// each writes once.
struct Meeting {
  alignas(64) unsigned round = 0;
  alignas(64) int arrived = 0;
};

// The parts of a call that one thread does, of all of them.
struct Members {
  int begin, end, parts;
  Meeting* meeting;
};

// `run` does its members' share of a call, and waits between the steps for the others: all parts
// run at the same time, or are members of one `run`. All share one scratch, aligned to 64.
struct RecurrentKernel {
  size_t (*scratch_bytes)(const Recurrent&, int parts);
  void (*run)(const Recurrent&, const Members&, char* scratch);
};

}  // namespace qnn
