// What of a recurrent layer is the same whatever its products are: its states, and the cells.
#pragma once

#include "recurrent/codes.h"

namespace qnn {
namespace {

// `states` and what is like them lie as [block of kLanes][row][lane], in float32.
template <int G>
class Cells {
 protected:
  static constexpr bool kLstm = G == 4;
  static constexpr int64_t kWidth = G * kLanes;

  const Recurrent& p_;
  const bool projected_;
  const int64_t units_, outs_;  // blocks of kLanes
  Shares units_of_, outs_of_;
  Quantizer of_h_;
  Grid of_cell_, of_gates_[G], of_tanh_;
  float *h_ = nullptr, *c_ = nullptr, *inner_ = nullptr;

  Cells(const Recurrent& p, int shares)
      : p_(p),
        projected_(p.w_hr != nullptr),
        units_(div_up(p.hidden, kLanes)),
        outs_(div_up(p.outputs, kLanes)),
        units_of_{units_, 1, shares},
        outs_of_{outs_, projected_ ? G : 1, shares} {}

  float* state(float* states, int64_t block, int64_t row) const {
    return states + (block * p_.batch + row) * kLanes;
  }

  // The states before the first step.
  QNN_ONCE void enter(int share) const {
    const Run own = units_of_.of(share);
    const auto read_states = [&](const void* from, const Grid& grid, int64_t width, const Run& run,
                                 float* to) {
      for (int64_t i = run.begin; i < run.end; ++i) {
        for (int64_t row = 0; row < p_.batch; ++row) {
          const int64_t first = i * kLanes, count = width - first;
          vfloat v = load_floats(p_.dtype, from, row * width + first, count);
          // A NaN or inf does not become a plausible number; v · 0 is NaN then.
          if (p_.table != nullptr) v = round_to(grid, v) + v * 0.0f;
          write(state(to, i, row), first_lanes(v, count));
        }
      }
    };
    read_states(p_.h0, of_h_.grid, p_.outputs, outs_of_.of(share), h_);
    if (kLstm) read_states(p_.c0, of_cell_, p_.hidden, own, c_);
    if (projected_)
      std::memset(state(inner_, own.begin, 0), 0,
                  (own.end - own.begin) * p_.batch * kLanes * sizeof(float));
  }

  // And those after the last.
  QNN_ONCE void end(int share) const {
    const auto leave = [&](const float* from, int64_t width, const Run& run, void* to) {
      for (int64_t i = run.begin; i < run.end; ++i) {
        for (int64_t row = 0; row < p_.batch; ++row) {
          const int64_t first = i * kLanes;
          store_floats(p_.dtype, to, row * width + first,
                       read<vfloat>(from + (i * p_.batch + row) * kLanes), width - first);
        }
      }
    };
    leave(h_, p_.outputs, outs_of_.of(share), p_.h_n);
    if (kLstm) leave(c_, p_.hidden, units_of_.of(share), p_.c_n);
  }

  bool there(int64_t t, int64_t row) const { return p_.lengths == nullptr || t < p_.lengths[row]; }

  // The hidden state and the output of a row and block.
  QNN_KERNEL void put(vfloat h, int64_t t, int64_t row, int64_t block) const {
    const int64_t first = block * kLanes, count = p_.outputs - first;
    h = round_to(of_h_.grid, h);
    h = store_floats(p_.dtype, p_.y, (t * p_.batch + row) * p_.outputs + first, h, count);
    write(state(h_, block, row), first_lanes(h, count));
  }
  void put_nothing(int64_t t, int64_t row, int64_t block) const {
    const int64_t first = block * kLanes;
    store_floats(p_.dtype, p_.y, (t * p_.batch + row) * p_.outputs + first, vfloat{},
                 p_.outputs - first);
  }

  // The cells of a block of units in so many rows.
  QNN_KERNEL void cells(const float* of_x, const float* of_h, int64_t first, int64_t rows,
                        int64_t t, int64_t block) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first + r;
      if (!there(t, row)) {
        if (!projected_) put_nothing(t, row, block);
        continue;
      }
      const float *x = of_x + r * kWidth, *h = of_h + r * kWidth;
      const auto gate = [&](int g) { return read<vfloat>(x + g * kLanes); };
      const auto both = [&](int g) { return gate(g) + read<vfloat>(h + g * kLanes); };
      if constexpr (kLstm) {
        float* at = state(c_, block, row);
        const vfloat i = round_to(of_gates_[0], cell_sigmoid(both(0))),
                     f = round_to(of_gates_[1], cell_sigmoid(both(1))),
                     g = round_to(of_gates_[2], cell_tanh(both(2))),
                     o = round_to(of_gates_[3], cell_sigmoid(both(3)));
        const vfloat c = round_to(of_cell_, f * read<vfloat>(at) + i * g);
        write(at, c);
        const vfloat out = o * round_to(of_tanh_, cell_tanh(c));
        if (projected_) {
          write(state(inner_, block, row), first_lanes(out, p_.hidden - block * kLanes));
        } else {
          put(out, t, row, block);
        }
      } else {
        const vfloat r_gate = round_to(of_gates_[0], cell_sigmoid(both(0))),
                     z = round_to(of_gates_[1], cell_sigmoid(both(1)));
        const vfloat n =
            round_to(of_gates_[2], cell_tanh(gate(2) + r_gate * read<vfloat>(h + 2 * kLanes)));
        put((read<vfloat>(state(h_, block, row)) - n) * z + n, t, row, block);
      }
    }
  }

  // Of a block of columns without gates, [row][gate][lane].
  QNN_KERNEL void put_projected(const float* of_inner, int64_t first, int64_t rows, int64_t t,
                                int64_t index) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; g < G && index * G + g < outs_; ++g) {
        if (there(t, first + r)) {
          put(read<vfloat>(of_inner + (r * G + g) * kLanes), t, first + r, index * G + g);
        } else {
          put_nothing(t, first + r, index * G + g);
        }
      }
    }
  }
};

}  // namespace
}  // namespace qnn
