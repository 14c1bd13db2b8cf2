// The recurrent layers of kernels/reference/recurrent.py.
//
// A lane is a unit. Weights are laid into panels once a call, [block of units][word][gate][lane],
// and a word of a row's activations is sent to all lanes, so that the sums of a unit's gates stand
// in the same lane and what follows needs no tensor of all gates. Blocks are divided among the
// shares, which keep their panels in their caches, and wait for each other between the steps.
#pragma once

#include "recurrent/cells.h"
#include "recurrent/panels.h"
#include "recurrent/products.h"

namespace qnn {
namespace {

template <class P, int G>
class Layer : Cells<G> {
  using Code = typename P::Code;
  using Panels = qnn::Panels<P, G>;
  using Block = typename Panels::Block;
  // Of the input linears of a share's units: what stays in the second-level cache beside its
  // panels.
  static constexpr int64_t kChunkBytes = 1 << 18;

  using Cells<G>::kLstm, Cells<G>::kWidth, Cells<G>::p_, Cells<G>::projected_;
  using Cells<G>::units_, Cells<G>::outs_, Cells<G>::units_of_, Cells<G>::outs_of_;
  using Cells<G>::of_h_, Cells<G>::of_cell_, Cells<G>::of_gates_, Cells<G>::of_tanh_;
  using Cells<G>::h_, Cells<G>::c_, Cells<G>::inner_;

  const Members& members_;
  Panels input_, hidden_, projection_;
  Quantizer of_x_, of_inner_;
  int64_t chunk_;  // steps

  size_t bytes_;
  Code* x_codes_;
  float* x_scales_;
  Operand<Code> h_codes_[2], inner_codes_;
  // Of each share.
  char *input_blocks_, *hidden_blocks_, *projection_blocks_ = nullptr, *spare_;
  float* chunk_values_;
  int64_t chunk_size_, spare_size_;
  Shares projections_of_;

 public:
  QNN_ONCE Layer(const Recurrent& p, const Members& members, char* scratch)
      : Cells<G>(p, members.shares),
        members_(members),
        input_(Panels::of_gates(p.w_ih, p.sw_ih, p.b_ih, p.b_ih_dtype, p.hidden, p.inputs)),
        hidden_(Panels::of_gates(p.w_hh, p.sw_hh, p.b_hh, p.b_hh_dtype, p.hidden, p.outputs)),
        projection_(Panels::plain(p.w_hr, p.sw_hr, p.outputs, p.hidden)),
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
      each([&](int share) { this->end(share); });
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
    each([&](int share) { this->end(share); });
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
                           scratch.take<int32_t>(shares * marks),
                           scratch.take<float>(shares * marks), marks};
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
    this->enter(share);
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
              this->cells(of_x + row * kWidth, of_h, row, rows, t, i);
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
    if (!last)
      publish(p_, members_, h_codes_[(index + 1) % 2], of_h_, kMostCodeOf<P>, h_, outs_of_);
  }

  QNN_KERNEL void project(int share, int64_t index, int64_t t) const {
    const Block& block = block_of(projection_, projection_blocks_, index, share);
    alignas(64) float values[P::kTileRows * kWidth];
    multiply(
        projection_, block, inner_codes_.codes, p_.batch,
        inner_codes_.scales + share * inner_codes_.mark_stride, [&](int64_t) { return values; },
        [&](int64_t first, int64_t rows, const float* of_inner) {
          this->put_projected(of_inner, first, rows, t, index);
        });
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
