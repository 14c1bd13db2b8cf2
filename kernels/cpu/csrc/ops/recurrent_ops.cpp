// The ops of kernels/recurrent.py on the CPU: an LSTM or a GRU, one layer in one direction.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "ops/arguments.h"
#include "ops/threads.h"
#include "tiers/tier_choice.h"

namespace qnn {
namespace {

// The tensors of a call by their names, as the op declares them. Sizes are bound by the first
// argument that has them.
class Shapes {
 public:
  struct Axis {
    const char* name;  // of a size, or null
    int64_t factor;    // as many times
  };

  void add(const char* name, const Tensor* t, std::vector<Axis> axes) {
    if (t == nullptr) return;
    tensors_.emplace_back(name, t);
    axes_.push_back(std::move(axes));
  }
  void add(const char* name, const Maybe& t, std::vector<Axis> axes) {
    if (t.has_value()) add(name, &*t, std::move(axes));
  }

  const std::vector<std::pair<const char*, const Tensor*>>& tensors() const { return tensors_; }

  // As Op.check in kernels/spec.py.
  void check(const Arguments& args, size_t i) {
    const Tensor& t = *tensors_[i].second;
    const std::vector<Axis>& axes = axes_[i];
    if (t.dim() != static_cast<int64_t>(axes.size())) args.shape(i, false, rule(axes).c_str());
    for (size_t d = 0; d < axes.size(); ++d) {
      const Axis& axis = axes[d];
      const int64_t size = t.size(static_cast<int64_t>(d));
      if (axis.name == nullptr) {
        if (size != axis.factor) args.shape(i, false, rule(axes).c_str());
        continue;
      }
      const auto known = std::find_if(bound_.begin(), bound_.end(), [&](const Bound& b) {
        return std::strcmp(b.name, axis.name) == 0;
      });
      if (known == bound_.end()) {
        bound_.push_back({axis.name, size, tensors_[i].first});
      } else if (size != known->size * axis.factor) {
        args.shape(i, false, rule(axes).c_str(), text(axis).c_str(), known->size * axis.factor,
                   known->source);
      }
    }
  }

  int64_t operator[](const char* name) const {
    for (const Bound& b : bound_) {
      if (std::strcmp(b.name, name) == 0) return b.size;
    }
    return 0;
  }

 private:
  struct Bound {
    const char* name;
    int64_t size;
    const char* source;
  };

  static std::string text(const Axis& axis) {
    if (axis.name == nullptr) return std::to_string(axis.factor);
    return axis.factor == 1 ? axis.name : axis.name + ("*" + std::to_string(axis.factor));
  }
  static std::string rule(const std::vector<Axis>& axes) {
    std::string all = "[";
    for (const Axis& axis : axes) all += (all.size() == 1 ? "" : ", ") + text(axis);
    return all + "]";
  }

  std::vector<std::pair<const char*, const Tensor*>> tensors_;
  std::vector<std::vector<Axis>> axes_;
  std::vector<Bound> bound_;
};

struct RecurrentArguments {
  const char* op;
  Cell cell;
  Scheme scheme;
  const Tensor *x, *h0, *c0;
  const Tensor *w_ih, *sw_ih, *w_hh, *sw_hh;
  const Tensor* table;
  Maybe b_ih, b_hh, w_hr, sw_hr, lengths;
  std::string direction;
};

// What enters a product is 8 bits wide.
const char* why_not_8_bits(const float* row) {
  const float low = row[2] - row[1], high = row[3] - row[1];
  if (!(row[0] > 0) || !std::isfinite(row[0])) return "a positive scale";
  const bool whole = std::nearbyint(low) == low && std::nearbyint(high) == high;
  if (!whole || !(low <= high) || high - low > 255 || std::fabs(low) > 1024) return "8 bits";
  return nullptr;
}

// Parts of a step that two threads share are worth their meeting, some 0.5 µs, from about so many
// cycles to each; a call is worth the start of a thread from more.
int64_t parts_worth(const Recurrent& p) {
  constexpr int64_t kStepCycles = 5000, kCallCycles = 20000;
  const int64_t gates = p.cell == Cell::lstm ? 4 : 3;
  const int64_t weights =
      gates * p.hidden * p.outputs + (p.w_hr == nullptr ? 0 : p.outputs * p.hidden);
  // 48 products a cycle, and no more than 16 bytes of the weight; 8 cycles a cell.
  const int64_t step = std::max(p.batch * weights / 48, weights / 16) + p.batch * p.hidden * 8;
  const int64_t inputs = p.steps * p.batch * gates * p.hidden * p.inputs / 48;
  const int64_t packing = gates * p.hidden * (p.inputs + p.outputs) / 8;
  return std::min(step / kStepCycles, (step * p.steps + inputs + packing) / kCallCycles);
}

// In so many parts, or, where that is 0, as many as the work is worth.
Tensor recurrent(const RecurrentArguments& a, const Tier& tier, int64_t parts_wanted = 0) {
  const bool lstm = a.cell == Cell::lstm;
  const int64_t gates = lstm ? 4 : 3, parts = lstm ? 17 : 11;
  const char* hidden = lstm ? "p" : "h";
  Shapes shapes;
  shapes.add("x", a.x, {{"t", 1}, {"b", 1}, {"i", 1}});
  shapes.add("h0", a.h0, {{"b", 1}, {hidden, 1}});
  shapes.add("c0", a.c0, {{"b", 1}, {"h", 1}});
  shapes.add("w_ih", a.w_ih, {{"h", gates}, {"i", 1}});
  shapes.add("sw_ih", a.sw_ih, {{"h", gates}, {nullptr, 1}});
  shapes.add("w_hh", a.w_hh, {{"h", gates}, {hidden, 1}});
  shapes.add("sw_hh", a.sw_hh, {{"h", gates}, {nullptr, 1}});
  shapes.add("table", a.table, {{nullptr, parts}, {nullptr, 4}});
  shapes.add("b_ih", a.b_ih, {{"h", gates}});
  shapes.add("b_hh", a.b_hh, {{"h", gates}});
  shapes.add("w_hr", a.w_hr, {{"p", 1}, {"h", 1}});
  shapes.add("sw_hr", a.sw_hr, {{"p", 1}, {nullptr, 1}});
  shapes.add("lengths", a.lengths, {{"b", 1}});
  const Arguments args(a.op, shapes.tensors(),
                       a.direction == "forward" ? "" : ", direction='" + a.direction + "'");

  Recurrent p{};
  p.cell = a.cell, p.scheme = a.scheme;
  std::vector<Tensor> dense;  // alive until the end of the call
  dense.reserve(shapes.tensors().size());
  for (size_t i = 0; i < shapes.tensors().size(); ++i) {
    const std::string name = shapes.tensors()[i].first;
    if (i == 0) {
      p.dtype = args.float_dtype(0);
    } else if (name == "h0" || name == "c0") {
      args.dtype(i, a.x->scalar_type());
    } else if (name == "lengths") {
      args.dtype(i, ScalarType::Long);
    } else if (name[0] == 'b') {
      (name == "b_ih" ? p.b_ih_dtype : p.b_hh_dtype) = args.float_dtype(i);
    } else {
      args.dtype(i, name[0] == 'w' ? ScalarType::Char : ScalarType::Float);
    }
    shapes.check(args, i);
    dense.push_back(args.dense(i));
    const void* data = dense.back().data_ptr();
    const auto* floats = static_cast<const float*>(data);
    const auto* codes = static_cast<const int8_t*>(data);
    if (name == "x") p.x = data;
    if (name == "h0") p.h0 = data;
    if (name == "c0") p.c0 = data;
    if (name == "w_ih") p.w_ih = codes;
    if (name == "sw_ih") p.sw_ih = floats;
    if (name == "w_hh") p.w_hh = codes;
    if (name == "sw_hh") p.sw_hh = floats;
    if (name == "table") p.table = floats;
    if (name == "b_ih") p.b_ih = data;
    if (name == "b_hh") p.b_hh = data;
    if (name == "w_hr") p.w_hr = codes;
    if (name == "sw_hr") p.sw_hr = floats;
    if (name == "lengths") p.lengths = static_cast<const int64_t*>(data);
  }
  if (a.direction != "forward" && a.direction != "reverse")
    args.fail("direction must be one of 'forward', 'reverse', got '" + a.direction + "'");
  p.reverse = a.direction == "reverse";
  p.steps = shapes["t"], p.batch = shapes["b"], p.inputs = shapes["i"], p.hidden = shapes["h"];
  p.outputs = shapes[hidden];
  if (a.w_hr.has_value() != a.sw_hr.has_value()) args.fail("w_hr and sw_hr belong together");
  if (!a.w_hr.has_value() && p.outputs != p.hidden) {
    args.fail("h0 must be as wide as c0, " + std::to_string(p.hidden) +
              ", where there is no projection w_hr, got " + std::to_string(p.outputs));
  }
  if (p.scheme != Scheme::weight) {
    for (const char* axis : {"i", "h", "p"})
      args.int32_sum(axis, shapes[axis], p.table ? 255 : 127);
  }
  const auto require = [&](const char* part, int64_t row, int64_t columns) {
    const float* grid = p.table + 4 * row;
    const char* reason = why_not_8_bits(grid);
    if (reason != nullptr)
      args.fail("table must give the part " + std::string(part) + " " + reason);
    const auto code = [&](int at) { return static_cast<int64_t>(std::fabs(grid[at] - grid[1])); };
    const int64_t largest = std::max<int64_t>({1, code(2), code(3)});
    const int64_t limit = std::numeric_limits<int32_t>::max() / (largest * 128);
    if (columns > limit)
      args.fail("table gives the part " + std::string(part) + " codes of up to " +
                std::to_string(largest) + ", of which an int32 sum of " + std::to_string(columns) +
                " can overflow, from " + std::to_string(limit + 1) +
                " on; use the scheme int8_weight");
  };
  if (p.table != nullptr) {
    require("input", 0, p.inputs), require("hidden_state", 1, p.outputs);
    if (p.w_hr != nullptr) require("projection_input", 16, p.hidden);
  }

  const int64_t last = p.batch * p.outputs, out = p.steps * last;
  const Tensor result =
      args.empty({out + last + (lstm ? p.batch * p.hidden : 0)}, a.x->scalar_type());
  if (p.batch == 0) return result;
  const int64_t size = p.dtype == DType::float64 ? 8 : p.dtype == DType::float32 ? 4 : 2;
  char* to = static_cast<char*>(result.data_ptr());
  p.y = to, p.h_n = to + out * size, p.c_n = to + (out + last) * size;

  const RecurrentKernel& kernel =
      p.scheme == Scheme::weight ? tier.recurrent_weight : tier.recurrent;
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
// ---------------------------------------------------------------------------------------------------------------

template <Scheme scheme>
Tensor lstm(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor sw_ih, Tensor w_hh, Tensor sw_hh,
            Maybe b_ih, Maybe b_hh, Maybe w_hr, Maybe sw_hr, Maybe lengths, std::string direction) {
  const char* op = scheme == Scheme::dynamic ? "int8_lstm" : "int8_weight_lstm";
  return recurrent({op, Cell::lstm, scheme, &x, &h0, &c0, &w_ih, &sw_ih, &w_hh, &sw_hh, nullptr,
                    b_ih, b_hh, w_hr, sw_hr, lengths, direction},
                   best_tier());
}

Tensor int8_static_lstm(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor sw_ih, Tensor w_hh,
                        Tensor sw_hh, Tensor table, Maybe b_ih, Maybe b_hh, Maybe w_hr, Maybe sw_hr,
                        Maybe lengths, std::string direction) {
  return recurrent({"int8_static_lstm", Cell::lstm, Scheme::fixed, &x, &h0, &c0, &w_ih, &sw_ih,
                    &w_hh, &sw_hh, &table, b_ih, b_hh, w_hr, sw_hr, lengths, direction},
                   best_tier());
}

template <Scheme scheme>
Tensor gru(Tensor x, Tensor h0, Tensor w_ih, Tensor sw_ih, Tensor w_hh, Tensor sw_hh, Maybe b_ih,
           Maybe b_hh, Maybe lengths, std::string direction) {
  const char* op = scheme == Scheme::dynamic ? "int8_gru" : "int8_weight_gru";
  return recurrent({op,
                    Cell::gru,
                    scheme,
                    &x,
                    &h0,
                    nullptr,
                    &w_ih,
                    &sw_ih,
                    &w_hh,
                    &sw_hh,
                    nullptr,
                    b_ih,
                    b_hh,
                    {},
                    {},
                    lengths,
                    direction},
                   best_tier());
}

Tensor int8_static_gru(Tensor x, Tensor h0, Tensor w_ih, Tensor sw_ih, Tensor w_hh, Tensor sw_hh,
                       Tensor table, Maybe b_ih, Maybe b_hh, Maybe lengths, std::string direction) {
  return recurrent({"int8_static_gru",
                    Cell::gru,
                    Scheme::fixed,
                    &x,
                    &h0,
                    nullptr,
                    &w_ih,
                    &sw_ih,
                    &w_hh,
                    &sw_hh,
                    &table,
                    b_ih,
                    b_hh,
                    {},
                    {},
                    lengths,
                    direction},
                   best_tier());
}

// For tests and benchmarks: an LSTM where c0 is given, else a GRU; int8_static where a table is
// given, else int8 or int8_weight; the tier is the named one, and the parts so many, 0 for as many
// as the work is worth.
Tensor cpu_recurrent(Tensor x, Tensor h0, Maybe c0, Tensor w_ih, Tensor sw_ih, Tensor w_hh,
                     Tensor sw_hh, Maybe table, Maybe b_ih, Maybe b_hh, Maybe w_hr, Maybe sw_hr,
                     Maybe lengths, std::string direction, bool weight_only, std::string tier,
                     int64_t parts) {
  const Scheme scheme = table.has_value() ? Scheme::fixed
                        : weight_only     ? Scheme::weight
                                          : Scheme::dynamic;
  return recurrent(
      {"cpu_recurrent", c0.has_value() ? Cell::lstm : Cell::gru, scheme, &x, &h0,
       c0.has_value() ? &*c0 : nullptr, &w_ih, &sw_ih, &w_hh, &sw_hh,
       table.has_value() ? &*table : nullptr, b_ih, b_hh, w_hr, sw_hr, lengths, direction},
      tier_called(tier), parts);
}

}  // namespace
}  // namespace qnn

STABLE_TORCH_LIBRARY_FRAGMENT(qnn, m) {
  m.def(
      "cpu_recurrent(Tensor x, Tensor h0, Tensor? c0, Tensor w_ih, Tensor sw_ih, Tensor w_hh, "
      "Tensor sw_hh, Tensor? table, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? sw_hr, "
      "Tensor? lengths, str direction, bool weight_only, str tier, int parts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CPU, m) {
  qnn::serve(m, "int8_lstm", TORCH_BOX(&qnn::lstm<qnn::Scheme::dynamic>));
  qnn::serve(m, "int8_static_lstm", TORCH_BOX(&qnn::int8_static_lstm));
  qnn::serve(m, "int8_weight_lstm", TORCH_BOX(&qnn::lstm<qnn::Scheme::weight>));
  qnn::serve(m, "int8_gru", TORCH_BOX(&qnn::gru<qnn::Scheme::dynamic>));
  qnn::serve(m, "int8_static_gru", TORCH_BOX(&qnn::int8_static_gru));
  qnn::serve(m, "int8_weight_gru", TORCH_BOX(&qnn::gru<qnn::Scheme::weight>));
  m.impl("cpu_recurrent", TORCH_BOX(&qnn::cpu_recurrent));
}
