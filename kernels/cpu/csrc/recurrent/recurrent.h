// The recurrent layers of kernels/reference/recurrent.py.
//
// A lane is a unit. Weights are laid into panels once a call, [block of units][word][gate][lane],
// and a word of a row's activations is sent to all lanes, so that the sums of a unit's gates stand
// in the same lane and what follows needs no tensor of all gates. Blocks are divided among the
// shares, which keep their panels in their caches, and wait for each other between the steps.
#pragma once

#include "recurrent/codes.h"
#include "recurrent/panels.h"
#include "recurrent/products.h"

namespace qnn {
namespace {

// `states` and what is like them lie as [block of kLanes][row][lane], in float32.
template <class P, int G>
class Layer {
  using Code = typename P::Code;
  using Panels = qnn::Panels<P, G>;
  using Block = typename Panels::Block;
  static constexpr bool kLstm = G == 4;
  static constexpr int64_t kWidth = Panels::kWidth;
  // Of the input linears of a share's units: what stays in the second-level cache beside its
  // panels.
  static constexpr int64_t kChunkBytes = 1 << 18;

  const Recurrent& p_;
  const Members& members_;
  const bool projected_;
  const int64_t units_, outs_;  // blocks of kLanes
  Panels input_, hidden_, projection_;
  Quantizer of_x_, of_h_, of_inner_;
  Grid of_cell_, of_gates_[G], of_tanh_;
  int64_t chunk_;  // steps

  size_t bytes_;
  Code* x_codes_;
  float* x_scales_;
  Operand<Code> h_codes_[2], inner_codes_;
  float *h_, *c_, *inner_ = nullptr;
  // Of each share.
  char *input_blocks_, *hidden_blocks_, *projection_blocks_ = nullptr, *spare_;
  float* chunk_values_;
  int64_t chunk_size_, spare_size_;
  Shares units_of_, outs_of_, projections_of_;

 public:
  QNN_ONCE Layer(const Recurrent& p, const Members& members, char* scratch)
      : p_(p),
        members_(members),
        projected_(p.w_hr != nullptr),
        units_(div_up(p.hidden, kLanes)),
        outs_(div_up(p.outputs, kLanes)),
        input_(Panels::of_gates(p.w_ih, p.sw_ih, p.b_ih, p.b_ih_dtype, p.hidden, p.inputs)),
        hidden_(Panels::of_gates(p.w_hh, p.sw_hh, p.b_hh, p.b_hh_dtype, p.hidden, p.outputs)),
        projection_(Panels::plain(p.w_hr, p.sw_hr, p.outputs, p.hidden)),
        units_of_{units_, 1, members.shares},
        outs_of_{outs_, projected_ ? G : 1, members.shares},
        projections_of_{projection_.blocks, 1, members.shares} {
    constexpr CellParts kParts = kLstm ? kLstmParts : kGruParts;
    constexpr int64_t kInput = kParts.row("input"), kState = kParts.row("hidden_state"),
                      kInputLinear = kParts.row(kLstm ? "input_linear_i" : "input_linear_r"),
                      kHiddenLinear = kParts.row(kLstm ? "hidden_linear_i" : "hidden_linear_r"),
                      kActivation = kParts.row(kLstm ? "input_gate" : "reset_gate");
    static_assert(kParts.gates == G);
    of_x_ = quantizer(kInput), of_h_ = quantizer(kState);
    for (int g = 0; g < G; ++g) {
      input_.grids[g] = Grid::of(p.table, kInputLinear + g);
      hidden_.grids[g] = Grid::of(p.table, kHiddenLinear + g);
      of_gates_[g] = Grid::of(p.table, kActivation + g);
    }
    if constexpr (kLstm) {
      constexpr int64_t kCell = kParts.row("cell_state"), kTanh = kParts.row("cell_tanh"),
                        kInner = kParts.row("projection_input");
      of_cell_ = Grid::of(p.table, kCell), of_tanh_ = Grid::of(p.table, kTanh);
      if (projected_) of_inner_ = quantizer(kInner);
    }
    input_.low = of_x_.low, hidden_.low = of_h_.low, projection_.low = of_inner_.low;
    take(Scratch(scratch));
  }

  size_t bytes() const { return bytes_; }

  void run() {
    each([&](int share) { begin(share); });
    if (p_.steps == 0) {
      each([&](int share) { end(share); });
      return;
    }
    publish(p_, members_, h_codes_[0], of_h_, kMostCodeOf<P>, h_, outs_of_);
    // The chunk's first step, counted in the order in which they are taken.
    for (int64_t begin = 0; begin < p_.steps; begin += chunk_) {
      const int64_t count = p_.steps - begin < chunk_ ? p_.steps - begin : chunk_;
      // Where they lie in time.
      const int64_t first = p_.reverse ? p_.steps - begin - count : begin;
      each([&](int share) { multiply_inputs(share, first, count); });
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = p_.reverse ? count - 1 - i : i;
        take_step(begin + i, first + at, at, count);
      }
    }
    each([&](int share) { end(share); });
  }

 private:
  template <class Do>
  void each(const Do& work) const {
    for (int share = members_.begin; share < members_.end; ++share) work(share);
  }

  Quantizer quantizer(int64_t part) const {
    Quantizer how;
    if (p_.scheme == Scheme::fixed) {
      how.grid = Grid::of(p_.table, part);
      if (P::kShifts) how.low = static_cast<int32_t>(how.grid.low) - P::kLeast;
    } else if (P::kShifts) {
      how.low = -128 - P::kLeast;
    }
    return how;
  }

  void take(Scratch scratch) {
    const int64_t rows = p_.steps * p_.batch, shares = members_.shares, more = P::kTileRows;
    const int64_t most = div_up(units_, shares);
    const int64_t step_bytes = p_.batch * most * kWidth * static_cast<int64_t>(sizeof(float));
    chunk_ = step_bytes == 0 ? p_.steps : kChunkBytes / step_bytes;
    chunk_ = larger(smaller(chunk_, p_.steps), 1);
    const int64_t state_rows = p_.batch * kLanes;
    x_codes_ = scratch.take<Code>((rows + more) * input_.code_stride());
    x_scales_ = scratch.take<float>(rows);
    const auto operand = [&](const Panels& weight) {
      const int64_t marks = round_up(p_.batch, kLine / 4), stride = weight.code_stride();
      return Operand<Code>{scratch.take<Code>((p_.batch + more) * stride), stride,
                        scratch.take<int32_t>(shares * marks), scratch.take<float>(shares * marks),
                        marks};
    };
    for (Operand<Code>& o : h_codes_) o = operand(hidden_);
    h_ = scratch.take<float>(outs_ * state_rows);
    c_ = scratch.take<float>(kLstm ? units_ * state_rows : 0);
    if (projected_) {
      inner_codes_ = operand(projection_);
      inner_ = scratch.take<float>(units_ * state_rows);
    }
    const bool once = p_.steps == 1;
    const auto blocks = [&](const Panels& weight) {
      return scratch.take<char>(once ? 0 : weight.blocks * weight.block_bytes());
    };
    input_blocks_ = blocks(input_), hidden_blocks_ = blocks(hidden_);
    if (projected_) projection_blocks_ = blocks(projection_);
    spare_size_ = 0;
    if (once) {
      spare_size_ = larger(input_.block_bytes(), hidden_.block_bytes());
      if (projected_) spare_size_ = larger(spare_size_, projection_.block_bytes());
      spare_size_ = round_up(spare_size_, kLine);
    }
    spare_ = scratch.take<char>(shares * spare_size_);
    chunk_size_ = round_up(chunk_ * p_.batch * most * kWidth, kLine);
    chunk_values_ = scratch.take<float>(shares * chunk_size_);
    bytes_ = scratch.used();
  }

  float* state(float* states, int64_t block, int64_t row) const {
    return states + (block * p_.batch + row) * kLanes;
  }

  // A block of a weight: as packed at the beginning, or now, where it is used only once.
  const Block& block_of(const Panels& weight, char* blocks, int64_t index, int share) const {
    if (p_.steps > 1) return *reinterpret_cast<Block*>(blocks + index * weight.block_bytes());
    auto* spare = reinterpret_cast<Block*>(spare_ + share * spare_size_);
    weight.pack(index, spare);
    return *spare;
  }

  QNN_ONCE void begin(int share) {
    const Run rows = Shares{p_.steps * p_.batch, 1, members_.shares}.of(share),
              own = units_of_.of(share);
    const int64_t stride = input_.code_stride();
    const int64_t padded = larger(input_.words() * P::kGroup, round_up(p_.inputs, kLanes));
    for (int64_t row = rows.begin; row < rows.end; ++row)
      read_row<P>(p_, of_x_, row, padded, x_codes_ + row * stride, x_scales_ + row);
    if (p_.steps > 1) {
      const auto pack = [](const Panels& weight, char* blocks, const Run& run) {
        for (int64_t i = run.begin; i < run.end; ++i)
          weight.pack(i, reinterpret_cast<Block*>(blocks + i * weight.block_bytes()));
      };
      pack(input_, input_blocks_, own);
      pack(hidden_, hidden_blocks_, own);
      if (projected_) pack(projection_, projection_blocks_, projections_of_.of(share));
    }
    const auto enter = [&](const void* from, const Grid& grid, int64_t width, const Run& run,
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
    enter(p_.h0, of_h_.grid, p_.outputs, outs_of_.of(share), h_);
    if (kLstm) enter(p_.c0, of_cell_, p_.hidden, own, c_);
    if (projected_)
      std::memset(state(inner_, own.begin, 0), 0,
                  (own.end - own.begin) * p_.batch * kLanes * sizeof(float));
  }

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

  // A block times rows, in tiles of an even share. `place(row)` is where a tile's values go,
  // [row][gate][lane], and `use(row, rows, values)` follows them.
  template <class Place, class Use>
  void multiply(const Panels& weight, const Block& block, const Code* codes, int64_t rows,
                const float* scales, const Place& place, const Use& use) const {
    alignas(64) typename P::Acc acc[P::kTileRows * kWidth];
    const int64_t tiles = div_up(rows, P::kTileRows), stride = weight.code_stride();
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = rows * i / tiles, some = rows * (i + 1) / tiles - row;
      P::template multiply<G>(codes + row * stride, stride, some, block.panel(), block.start,
                              weight.words(), acc);
      float* to = place(row);
      scale_sums<P, G>(acc, some, block, weight.bias != nullptr, weight.grids, scales + row, to);
      use(row, some, to);
    }
  }

  // The input linears of a share's units, of all rows of so many steps: [unit
  // block][row][gate][lane].
  QNN_KERNEL void multiply_inputs(int share, int64_t first, int64_t steps) const {
    const Run own = units_of_.of(share);
    const int64_t rows = steps * p_.batch, row = first * p_.batch;
    for (int64_t i = own.begin; i < own.end; ++i) {
      const Block& block = block_of(input_, input_blocks_, i, share);
      float* to = chunk_values_ + share * chunk_size_ + (i - own.begin) * rows * kWidth;
      multiply(
          input_, block, x_codes_ + row * input_.code_stride(), rows, x_scales_ + row,
          [&](int64_t at) { return to + at * kWidth; }, [](int64_t, int64_t, const float*) {});
    }
  }

  // Step number `index`, at time `t`, which is step `at` of the `count` whose input linears are
  // there.
  void take_step(int64_t index, int64_t t, int64_t at, int64_t count) const {
    const bool last = index + 1 == p_.steps;
    const Operand<Code>& from = h_codes_[index % 2];
    each([&](int share) {
      const Run own = units_of_.of(share);
      for (int64_t i = own.begin; i < own.end; ++i) {
        const Block& block = block_of(hidden_, hidden_blocks_, i, share);
        const float* of_x = chunk_values_ + share * chunk_size_ +
                            ((i - own.begin) * count + at) * p_.batch * kWidth;
        alignas(64) float values[P::kTileRows * kWidth];
        multiply(
            hidden_, block, from.codes, p_.batch, from.scales + share * from.mark_stride,
            [&](int64_t) { return values; },
            [&](int64_t row, int64_t rows, const float* of_h) {
              cells(of_x + row * kWidth, of_h, row, rows, t, i);
            });
      }
    });
    if (projected_) {
      publish(p_, members_, inner_codes_, of_inner_, kMostCodeOf<P>, inner_, units_of_);
      each([&](int share) {
        const Run own = projections_of_.of(share);
        for (int64_t i = own.begin; i < own.end; ++i) project(share, i, t);
      });
    }
    if (!last) publish(p_, members_, h_codes_[(index + 1) % 2], of_h_, kMostCodeOf<P>, h_, outs_of_);
  }

  QNN_KERNEL void project(int share, int64_t index, int64_t t) const {
    const Block& block = block_of(projection_, projection_blocks_, index, share);
    alignas(64) float values[P::kTileRows * kWidth];
    multiply(
        projection_, block, inner_codes_.codes, p_.batch,
        inner_codes_.scales + share * inner_codes_.mark_stride, [&](int64_t) { return values; },
        [&](int64_t first, int64_t rows, const float* of_inner) {
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t g = 0; g < G && index * G + g < outs_; ++g) {
              if (there(t, first + r)) {
                put(read<vfloat>(of_inner + (r * G + g) * kLanes), t, first + r, index * G + g);
              } else {
                put_nothing(t, first + r, index * G + g);
              }
            }
          }
        });
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
};

template <class P>
size_t recurrent_bytes(const Recurrent& p, int shares) {
  const Members all{0, shares, shares, nullptr};
  return p.cell == Cell::lstm ? Layer<P, 4>(p, all, nullptr).bytes()
                              : Layer<P, 3>(p, all, nullptr).bytes();
}

template <class P>
void recurrent_run(const Recurrent& p, const Members& members, char* scratch) {
  [[maybe_unused]] const typename P::Session session;
  p.cell == Cell::lstm ? Layer<P, 4>(p, members, scratch).run()
                       : Layer<P, 3>(p, members, scratch).run();
}

template <class P>
constexpr RecurrentKernel recurrent() {
  return {recurrent_bytes<P>, recurrent_run<P>};
}

}  // namespace
}  // namespace qnn
