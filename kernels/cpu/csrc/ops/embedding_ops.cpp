// The ops of kernels/declare/embedding.py on the CPU: lookups in a table in each format of weights.
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "embedding/lookup.h"
#include "ops/arguments.h"
#include "ops/threads.h"
#include "tiers/tier_choice.h"

namespace qnn {
namespace {

constexpr const char* kModes[] = {"sum", "mean", "max"};

// The formats of tables: int8, and those of the layers over other weights.
constexpr size_t kTables = std::size(kWeightOps) + 1;
constexpr WeightOp table_at(size_t index) {
  return index == 0 ? WeightOp{"int8_weight_linear", kInt8} : kWeightOps[index - 1];
}
constexpr bool has_extra(size_t index) {
  return table_at(index).weight.divisor || table_at(index).weight.zero_points;
}
std::string op_of(size_t index, const char* kind) {
  const std::string layer = table_at(index).name;
  return layer.substr(0, layer.rfind('_') + 1) + kind;
}

// An op over one format.
struct Op {
  Op(size_t index, const char* kind)
      : name(op_of(index, kind)), signature(signature_of(name)), format(table_at(index).weight) {}
  std::string name;
  const Signature& signature;
  WeightFormat format;
};

// What both ops take.
struct Table {
  const Tensor &ids, &codes, &scales;
  const Tensor* extra;  // the divisor or the zero points of a format that has them
  ScalarType dtype;     // of the result
};

// The words of `checked` in kernels/reference/embedding.py; torch makes an IndexError of it.
void require_rows(const Op& op, const Lookup& p) {
  const auto count = static_cast<uint64_t>(p.table.n);
  for (int64_t i = 0; i < p.count; ++i) {
    if (static_cast<uint64_t>(p.id(i)) < count) continue;
    throw std::out_of_range("qnn::" + op.name + ": the id " + std::to_string(p.id(i)) +
                            ", at position " + std::to_string(i) + ", is not in a table of " +
                            std::to_string(p.table.n) + " rows.");
  }
}

// As `why_not_bags` there.
void require_bags(const Arguments& args, const int64_t* offsets, int64_t bags, int64_t count) {
  bool good = bags >= 0 && offsets[0] == 0 && offsets[bags] <= count;
  for (int64_t b = 0; good && b < bags; ++b) good = offsets[b] <= offsets[b + 1];
  if (!good)
    args.fail("offsets must begin with 0, not fall, and end at " + std::to_string(count) +
              ", the number of ids, or before");
}

// The rows `ids` of a table, or bags of them.
class Call {
 public:
  Call(Arguments& args, const Op& op, const Table& t) : args_(args), op_(op), table_(t) {
    p.ids = args.data(t.ids), p.wide = t.ids.scalar_type() == ScalarType::Long;
    p.count = t.ids.numel(), p.padding = -1;
    Linear& w = p.table;
    w.weight = op.format, w.n = t.codes.size(0), w.y_dtype = float_format(t.dtype);
    w.k = t.codes.size(1) * static_cast<int64_t>(t.codes.element_size()) * 8 / op.format.bits;
    require_rows(op, p);
  }
  Call(const Call&) = delete;

  Tensor run(std::vector<int64_t> sizes, const Tier& tier) {
    sizes.push_back(p.table.k);
    Tensor y = args_.empty(sizes, table_.dtype);
    if (y.numel() == 0) return y;
    Linear& w = p.table;
    w.w = args_.data<int8_t>(table_.codes), w.y = y.data_ptr();
    if (w.weight.zero_points) w.zero_points = args_.data<uint8_t>(*table_.extra);
    const float all = w.weight.divisor ? 1.0f / *args_.data<float>(*table_.extra) : 1.0f;
    w.sw = w.weight.grouped() ? &all : args_.data<float>(table_.scales);
    if (w.weight.grouped()) w.group_scale = args_.data(table_.scales);
    // A thread more is worth its start, some µs, from about so many values to each.
    constexpr int64_t kValues = 1 << 16;
    share(p.count * w.k / kValues, [&](int part, int parts) { tier.look_up(p, part, parts); });
    return y;
  }

  Lookup p{};

 private:
  Arguments& args_;
  const Op& op_;
  const Table& table_;
};

Tensor embedding(const Op& op, const Tier& tier, const Table& t) {
  Arguments args(op.signature, t.ids, t.codes, t.scales, t.extra, &t.dtype);
  const auto lead = t.ids.sizes();
  std::vector<int64_t> sizes;
  sizes.reserve(lead.size() + 1);
  sizes.assign(lead.begin(), lead.end());
  return Call(args, op, t).run(std::move(sizes), tier);
}

struct Bags {
  const Tensor& offsets;
  const Maybe& weights;
  const std::string& mode;
  int64_t padding;
};

Tensor embedding_bag(const Op& op, const Tier& tier, const Table& t, const Bags& b) {
  Arguments args(op.signature, t.ids, b.offsets, t.codes, t.scales, t.extra, b.weights, b.mode,
                 b.padding, &t.dtype);
  Call call(args, op, t);
  Lookup& p = call.p;
  p.bags = b.offsets.size(0) - 1, p.offsets = args.data<int64_t>(b.offsets);
  require_bags(args, p.offsets, p.bags, p.count);
  p.weights = args.data(b.weights), p.padding = b.padding;
  const auto* mode = std::find(std::begin(kModes), std::end(kModes), b.mode);
  p.mode = static_cast<Bag>(mode - std::begin(kModes));
  return call.run({p.bags}, tier);
}

// -- ops

template <size_t kIndex>
const Op& embedding_op() {
  static const Op op(kIndex, "embedding");
  return op;
}
template <size_t kIndex>
const Op& bag_op() {
  static const Op op(kIndex, "embedding_bag");
  return op;
}

template <size_t kIndex>
Tensor embedding_of(const Tensor& ids, const Tensor& wq, const Tensor& sw, ScalarType dtype) {
  return embedding(embedding_op<kIndex>(), best_tier(), {ids, wq, sw, nullptr, dtype});
}

template <size_t kIndex>
Tensor embedding_of_extra(const Tensor& ids, const Tensor& wq, const Tensor& sw,
                          const Tensor& extra, ScalarType dtype) {
  return embedding(embedding_op<kIndex>(), best_tier(), {ids, wq, sw, &extra, dtype});
}

template <size_t kIndex>
Tensor bag_of(const Tensor& ids, const Tensor& offsets, const Tensor& wq, const Tensor& sw,
              const Maybe& weights, const std::string& mode, int64_t padding, ScalarType dtype) {
  return embedding_bag(bag_op<kIndex>(), best_tier(), {ids, wq, sw, nullptr, dtype},
                       {offsets, weights, mode, padding});
}

template <size_t kIndex>
Tensor bag_of_extra(const Tensor& ids, const Tensor& offsets, const Tensor& wq, const Tensor& sw,
                    const Tensor& extra, const Maybe& weights, const std::string& mode,
                    int64_t padding, ScalarType dtype) {
  return embedding_bag(bag_op<kIndex>(), best_tier(), {ids, wq, sw, &extra, dtype},
                       {offsets, weights, mode, padding});
}

template <size_t kIndex>
bool add_table() {
  const std::string rows = op_of(kIndex, "embedding"), bags = op_of(kIndex, "embedding_bag");
  if constexpr (has_extra(kIndex)) {
    return add_ops({{rows.c_str(), TORCH_BOX(&embedding_of_extra<kIndex>)},
                    {bags.c_str(), TORCH_BOX(&bag_of_extra<kIndex>)}});
  } else {
    return add_ops({{rows.c_str(), TORCH_BOX(&embedding_of<kIndex>)},
                    {bags.c_str(), TORCH_BOX(&bag_of<kIndex>)}});
  }
}

template <size_t... kIndex>
bool add_tables(std::index_sequence<kIndex...>) {
  return (add_table<kIndex>() && ...);
}

// For tests: of the table of the op `name`, in the named tier.
Tensor cpu_embedding(Tensor ids, Tensor wq, Tensor sw, Maybe extra, std::string name,
                     ScalarType dtype, std::string tier) {
  for (size_t i = 0; i < kTables; ++i) {
    const Op op(i, "embedding");
    if (op.name != name) continue;
    return embedding(op, tier_called(tier),
                     {ids, wq, sw, extra.has_value() ? &*extra : nullptr, dtype});
  }
  throw std::invalid_argument("qnn::cpu_embedding: no op '" + name + "'.");
}

[[maybe_unused]] const bool added = add_tables(std::make_index_sequence<kTables>());

}  // namespace
}  // namespace qnn

STABLE_TORCH_LIBRARY_FRAGMENT(qnn, m) {
  m.def(
      "cpu_embedding(Tensor ids, Tensor wq, Tensor sw, Tensor? extra, str name, ScalarType dtype, "
      "str tier) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CPU, m) { m.impl("cpu_embedding", TORCH_BOX(&qnn::cpu_embedding)); }
