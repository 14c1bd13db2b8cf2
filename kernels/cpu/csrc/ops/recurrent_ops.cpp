// The ops of kernels/recurrent.py on the CPU: an LSTM or a GRU, one layer in one direction.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "ops/arguments.h"
#include "ops/threads.h"
#include "tiers/tier_choice.h"

namespace qnn {
namespace {

struct RecurrentArguments {
  Scheme scheme;
  bool wide;
  const Tensor &x, &h0;
  const Tensor* c0;  // of an LSTM
  const Tensor &w_ih, &sw_ih, &w_hh, &sw_hh;
  const Tensor* table;  // of `fixed`
  const Maybe &b_ih, &b_hh;
  const Maybe *w_hr, *sw_hr;  // of an LSTM
  const Maybe& lengths;
  const std::string& direction;
};

const Signature& declared(bool lstm, Scheme scheme, bool wide) {
  static const Signature* const all[][2] = {
      {&signature_of("int8_gru"), &signature_of("int8_lstm")},
      {&signature_of("int8_static_gru"), &signature_of("int8_static_lstm")},
      {&signature_of("int8_weight_gru"), &signature_of("int8_weight_lstm")},
      {&signature_of("int16_gru"), &signature_of("int16_lstm")},
      {&signature_of("int16_static_gru"), &signature_of("int16_static_lstm")}};
  return *all[static_cast<int>(scheme) + (wide ? 3 : 0)][lstm];
}

// What enters a product is 8 bits wide, or up to 16 less its zero point.
const char* why_not_operand(const float* row, bool wide) {
  const float low = row[2] - row[1], high = row[3] - row[1];
  if (!(row[0] > 0) || !std::isfinite(row[0])) return "a positive scale";
  const bool whole = std::nearbyint(low) == low && std::nearbyint(high) == high && low <= high;
  if (wide)
    return whole && low >= -32767 && high <= 32767
               ? nullptr
               : "codes less its zero point from -32767 to 32767";
  return whole && high - low <= 255 && std::fabs(low) <= 1024 ? nullptr : "8 bits";
}

// Parts of a step that two threads share are worth their meeting, some 0.5 µs, from about so many
// cycles to each; a call is worth the start of a thread from more.
int64_t parts_worth(const Recurrent& p) {
  constexpr int64_t kStepCycles = 5000, kCallCycles = 20000;
  const int64_t gates = parts_of(p.cell).gates;
  const int64_t weights =
      gates * p.hidden * p.outputs + (p.w_hr == nullptr ? 0 : p.outputs * p.hidden);
  // 48 products a cycle, and no more than 16 bytes of the weight; 8 cycles a cell.
  const int64_t step = std::max(p.batch * weights / 48, weights / 16) + p.batch * p.hidden * 8;
  const int64_t inputs = p.steps * p.batch * gates * p.hidden * p.inputs / 48;
  const int64_t packing = gates * p.hidden * (p.inputs + p.outputs) / 8;
  return std::min(step / kStepCycles, (step * p.steps + inputs + packing) / kCallCycles);
}

// A row of the table, of a part that enters a product with so many columns.
void require_operand(const Arguments& args, const float* grid, const std::string& part,
                     int64_t columns, bool wide) {
  const char* reason = why_not_operand(grid, wide);
  if (reason != nullptr) args.fail("table must give the part " + part + " " + reason);
  if (wide) return;  // no sum overflows
  const auto code = [&](int at) { return static_cast<int64_t>(std::fabs(grid[at] - grid[1])); };
  const int64_t largest = std::max<int64_t>({1, code(2), code(3)});
  const int64_t limit = std::numeric_limits<int32_t>::max() / (largest * 128);
  if (columns > limit)
    args.fail("table gives the part " + part + " codes of up to " + std::to_string(largest) +
              ", of which an int32 sum of " + std::to_string(columns) + " can overflow, from " +
              std::to_string(limit + 1) + " on; use the scheme int8_weight");
}

// What the signature cannot say: the `rule` of the ops, and the reference's own check of a table.
void require_rules(const Arguments& args, const Recurrent& p) {
  if ((p.w_hr == nullptr) != (p.sw_hr == nullptr)) args.fail("w_hr and sw_hr belong together");
  if (p.w_hr == nullptr && p.outputs != p.hidden)
    args.fail("h0 must be as wide as c0, " + std::to_string(p.hidden) +
              ", where there is no projection w_hr, got " + std::to_string(p.outputs));
  if (p.table == nullptr) return;
  const CellParts& parts = parts_of(p.cell);
  const auto require = [&](const char* part, int64_t columns) {
    require_operand(args, p.table + 4 * parts.row(part), part, columns, p.wide);
  };
  require("input", p.inputs), require("hidden_state", p.outputs);
  if (p.w_hr != nullptr) require("projection_input", p.hidden);
}

// In so many parts, or, where that is 0, as many as the work is worth.
Tensor recurrent(const RecurrentArguments& a, const Tier& tier, int64_t parts_wanted = 0) {
  const bool lstm = a.c0 != nullptr;
  Recurrent p{};
  p.cell = lstm ? Cell::lstm : Cell::gru, p.scheme = a.scheme, p.wide = a.wide;
  Arguments args(declared(lstm, p.scheme, p.wide), a.x, a.h0, a.c0, a.w_ih, a.sw_ih, a.w_hh,
                 a.sw_hh, a.table, a.b_ih, a.b_hh, a.w_hr, a.sw_hr, a.lengths, a.direction);
  p.steps = a.x.size(0), p.batch = a.x.size(1), p.inputs = a.x.size(2);
  p.outputs = a.h0.size(1), p.hidden = lstm ? a.c0->size(1) : p.outputs;
  p.dtype = float_format(a.x);
  p.x = args.data(a.x), p.h0 = args.data(a.h0), p.c0 = args.data(a.c0);
  p.w_ih = args.data<int8_t>(a.w_ih), p.sw_ih = args.data<float>(a.sw_ih);
  p.w_hh = args.data<int8_t>(a.w_hh), p.sw_hh = args.data<float>(a.sw_hh);
  p.table = args.data<float>(a.table);
  p.b_ih = args.data(a.b_ih), p.b_hh = args.data(a.b_hh);
  if (a.b_ih.has_value()) p.b_ih_dtype = float_format(*a.b_ih);
  if (a.b_hh.has_value()) p.b_hh_dtype = float_format(*a.b_hh);
  p.w_hr = args.data<int8_t>(a.w_hr), p.sw_hr = args.data<float>(a.sw_hr);
  p.lengths = args.data<int64_t>(a.lengths);
  p.reverse = a.direction == "reverse";
  require_rules(args, p);

  const int64_t last = p.batch * p.outputs, out = p.steps * last;
  const Tensor result =
      args.empty({out + last + (lstm ? p.batch * p.hidden : 0)}, a.x.scalar_type());
  if (p.batch == 0) return result;
  const int64_t size = p.dtype == DType::float64 ? 8 : p.dtype == DType::float32 ? 4 : 2;
  char* to = static_cast<char*>(result.data_ptr());
  p.y = to, p.h_n = to + out * size, p.c_n = to + (out + last) * size;

  const RecurrentKernel& kernel = kernel_of(tier, p);
  Meeting meeting;
  with_memory(args, [&] {
    share_memory(
        parts_wanted == 0 ? parts_worth(p) : parts_wanted,
        [&](int n) { return kernel.scratch_bytes(p, n); },
        [&](int begin, int end, int n, char* scratch) {
          kernel.run(p, {begin, end, n, &meeting}, scratch);
        });
  });
  return result;
}

// -- ops

template <Scheme scheme, bool wide = false>
Tensor lstm(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor sw_ih, Tensor w_hh, Tensor sw_hh,
            Maybe b_ih, Maybe b_hh, Maybe w_hr, Maybe sw_hr, Maybe lengths, std::string direction) {
  return recurrent({scheme, wide, x, h0, &c0, w_ih, sw_ih, w_hh, sw_hh, nullptr, b_ih, b_hh, &w_hr,
                    &sw_hr, lengths, direction},
                   best_tier());
}

template <bool wide>
Tensor static_lstm(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor sw_ih, Tensor w_hh,
                   Tensor sw_hh, Tensor table, Maybe b_ih, Maybe b_hh, Maybe w_hr, Maybe sw_hr,
                   Maybe lengths, std::string direction) {
  return recurrent({Scheme::fixed, wide, x, h0, &c0, w_ih, sw_ih, w_hh, sw_hh, &table, b_ih, b_hh,
                    &w_hr, &sw_hr, lengths, direction},
                   best_tier());
}

template <Scheme scheme, bool wide = false>
Tensor gru(Tensor x, Tensor h0, Tensor w_ih, Tensor sw_ih, Tensor w_hh, Tensor sw_hh, Maybe b_ih,
           Maybe b_hh, Maybe lengths, std::string direction) {
  return recurrent({scheme, wide, x, h0, nullptr, w_ih, sw_ih, w_hh, sw_hh, nullptr, b_ih, b_hh,
                    nullptr, nullptr, lengths, direction},
                   best_tier());
}

template <bool wide>
Tensor static_gru(Tensor x, Tensor h0, Tensor w_ih, Tensor sw_ih, Tensor w_hh, Tensor sw_hh,
                  Tensor table, Maybe b_ih, Maybe b_hh, Maybe lengths, std::string direction) {
  return recurrent({Scheme::fixed, wide, x, h0, nullptr, w_ih, sw_ih, w_hh, sw_hh, &table, b_ih,
                    b_hh, nullptr, nullptr, lengths, direction},
                   best_tier());
}

// For tests and benchmarks: an LSTM where c0 is given, else a GRU; int8_static where a table is
// given, else int8 or int8_weight; int16_static or int16 where it is wide; the tier is the named
// one, and the parts so many, 0 for as many as the work is worth.
Tensor cpu_recurrent(Tensor x, Tensor h0, Maybe c0, Tensor w_ih, Tensor sw_ih, Tensor w_hh,
                     Tensor sw_hh, Maybe table, Maybe b_ih, Maybe b_hh, Maybe w_hr, Maybe sw_hr,
                     Maybe lengths, std::string direction, bool weight_only, std::string tier,
                     int64_t parts, bool wide) {
  const Scheme scheme = table.has_value() ? Scheme::fixed
                        : weight_only     ? Scheme::weight
                                          : Scheme::dynamic;
  const bool lstm = c0.has_value();
  return recurrent({scheme, wide, x, h0, lstm ? &*c0 : nullptr, w_ih, sw_ih, w_hh, sw_hh,
                    table.has_value() ? &*table : nullptr, b_ih, b_hh, lstm ? &w_hr : nullptr,
                    lstm ? &sw_hr : nullptr, lengths, direction},
                   tier_called(tier), parts);
}

// "lstm:input,hidden_state,…;gru:…": what the rows of a table are.
std::string cpu_cell_parts() {
  std::string text;
  for (const CellParts* cell : {&kLstmParts, &kGruParts}) {
    text += cell == &kLstmParts ? "lstm:" : ";gru:";
    for (int64_t i = 0; i < cell->count; ++i)
      text += (i == 0 ? "" : ",") + std::string(cell->names[i]);
  }
  return text;
}

[[maybe_unused]] const bool added = add_ops({
    {"int8_lstm", TORCH_BOX(&lstm<Scheme::dynamic>)},
    {"int8_static_lstm", TORCH_BOX(&static_lstm<false>)},
    {"int8_weight_lstm", TORCH_BOX(&lstm<Scheme::weight>)},
    {"int8_gru", TORCH_BOX(&gru<Scheme::dynamic>)},
    {"int8_static_gru", TORCH_BOX(&static_gru<false>)},
    {"int8_weight_gru", TORCH_BOX(&gru<Scheme::weight>)},
    {"int16_lstm", TORCH_BOX((&lstm<Scheme::dynamic, true>))},
    {"int16_static_lstm", TORCH_BOX(&static_lstm<true>)},
    {"int16_gru", TORCH_BOX((&gru<Scheme::dynamic, true>))},
    {"int16_static_gru", TORCH_BOX(&static_gru<true>)},
});

}  // namespace
}  // namespace qnn

STABLE_TORCH_LIBRARY_FRAGMENT(qnn, m) {
  m.def(
      "cpu_recurrent(Tensor x, Tensor h0, Tensor? c0, Tensor w_ih, Tensor sw_ih, Tensor w_hh, "
      "Tensor sw_hh, Tensor? table, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? sw_hr, "
      "Tensor? lengths, str direction, bool weight_only, str tier, int parts, "
      "bool wide=False) -> Tensor");
  m.def("cpu_cell_parts() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CompositeExplicitAutograd, m) {
  m.impl("cpu_cell_parts", TORCH_BOX(&qnn::cpu_cell_parts));
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CPU, m) { m.impl("cpu_recurrent", TORCH_BOX(&qnn::cpu_recurrent)); }
