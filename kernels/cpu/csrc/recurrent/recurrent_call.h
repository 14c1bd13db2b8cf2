// What one call of a recurrent layer is: the border between recurrent_ops.cpp, which knows torch,
// and the tiers, which know the CPU.
#pragma once

#include <iterator>
#include <stdexcept>
#include <string_view>

#include "common/types.h"

namespace qnn {

enum class Cell { lstm, gru };
// int8 or int16, int8_static or int16_static, int8_weight
enum class Scheme { dynamic, fixed, weight };

// What the rows of a table are, as Cell.parts in kernels/reference/recurrent.py.
struct CellParts {
  int64_t gates, count;
  const std::string_view* names;

  // The row of a part; those of gates follow one another.
  constexpr int64_t row(std::string_view name) const {
    for (int64_t i = 0; i < count; ++i) {
      if (names[i] == name) return i;
    }
    throw std::invalid_argument("a cell has no such part");
  }
};

constexpr std::string_view kLstmNames[] = {
    "input",           "hidden_state",    "cell_state",      "input_linear_i",  "input_linear_f",
    "input_linear_g",  "input_linear_o",  "hidden_linear_i", "hidden_linear_f", "hidden_linear_g",
    "hidden_linear_o", "input_gate",      "forget_gate",     "cell_gate",       "output_gate",
    "cell_tanh",       "projection_input"};
constexpr std::string_view kGruNames[] = {"input",           "hidden_state",    "input_linear_r",
                                          "input_linear_z",  "input_linear_n",  "hidden_linear_r",
                                          "hidden_linear_z", "hidden_linear_n", "reset_gate",
                                          "update_gate",     "new_gate"};
constexpr CellParts kLstmParts{4, std::size(kLstmNames), kLstmNames};
constexpr CellParts kGruParts{3, std::size(kGruNames), kGruNames};

namespace {

constexpr const CellParts& parts_of(Cell cell) {
  return cell == Cell::lstm ? kLstmParts : kGruParts;
}

}  // namespace

// An LSTM or a GRU, one layer in one direction; row-major and dense. G is 4 or 3. The meaning is
// the reference in kernels/reference/recurrent.py: to the bit, but for the order of the float sums
// of `weight`.
struct Recurrent {
  Cell cell;
  Scheme scheme;
  bool wide;  // what enters a product has up to 16 bits, and not 8: int16, int16_static
  int64_t steps, batch, inputs, hidden, outputs;  // T, B, I, H, P
  const void* x;                                  // [T, B, I]
  const void *h0, *c0;                            // [B, P], [B, H]; c0 null in a GRU
  DType dtype;                                    // of x, h0, c0 and the results
  const int8_t *w_ih, *w_hh, *w_hr;               // [G H, I], [G H, P], [P, H] or null
  const float *sw_ih, *sw_hh, *sw_hr;
  const float* table;       // [CellParts.count, 4] of `fixed`: scale, zero point, qmin, qmax
  const void *b_ih, *b_hh;  // [G H] or null
  DType b_ih_dtype, b_hh_dtype;
  const int64_t* lengths;  // [B] or null
  bool reverse;
  void *y, *h_n, *c_n;  // [T, B, P], [B, P], [B, H]
};

// Where the shares of a call wait for each other. On lines of their own: what all watch, and what
// each writes once.
struct Meeting {
  alignas(64) unsigned round = 0;
  alignas(64) int arrived = 0;
};

// The shares of a call that one thread does, of all of them.
struct Members {
  int begin, end, shares;
  Meeting* meeting;
};

// `run` does its members of a call, and waits between the steps for the others: all shares run at
// the same time, or are members of one `run`. They have one scratch for all, aligned to 64.
struct RecurrentKernel {
  size_t (*scratch_bytes)(const Recurrent&, int shares);
  void (*run)(const Recurrent&, const Members&, char* scratch);
};

}  // namespace qnn
