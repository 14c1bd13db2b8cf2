// The grouped linear layers: a stack of weights [e, n, k], and rows that are sorted by the weight
// that they meet. A call of the linear kernel for each group that has rows.
#include <cstring>
#include <iterator>
#include <string>
#include <utility>

#include "ops/arguments.h"
#include "ops/linear_call.h"
#include "tiers/tier_choice.h"

namespace qnn {
namespace {

struct Grouped {
  const Tensor &x, &w, &sw;
  const Tensor* extra;  // the divisors or the zero points
  const Tensor& ends;   // of the groups, in rows
  const Tensor *sx, *zx;
  const Maybe& bias;
};

std::string text_of(const int32_t* ends, int64_t groups) {
  constexpr int64_t kShown = 8;
  std::string text;
  for (int64_t e = 0; e < groups && e < kShown; ++e)
    text += (e > 0 ? ", " : "") + std::to_string(ends[e]);
  return "[" + text + (groups > kShown ? ", ...]" : "]");
}

// The words of `spans` in kernels/reference/grouped.py.
void require_ends(const Arguments& args, const int32_t* ends, int64_t groups, int64_t rows) {
  int64_t begin = 0;
  for (int64_t e = 0; e < groups; begin = ends[e++]) {
    if (ends[e] < begin || ends[e] > rows)
      args.fail("offsets must be the end of each group, from 0 to at most " + std::to_string(rows) +
                " and never less than the one before, got " + text_of(ends, groups));
  }
}

Tensor grouped(const Signature& op, const WeightFormat& weight, const Kernel& kernel,
               const Grouped& a) {
  Arguments args(op, a.x, a.w, a.sw, a.extra, a.ends, a.sx, a.zx, a.bias);
  const int64_t rows = a.x.size(0), k = a.x.size(1), groups = a.w.size(0), n = a.w.size(1);
  const Tensor y = args.empty({rows, n}, a.x.scalar_type());
  const auto* ends = args.data<int32_t>(a.ends);
  require_ends(args, ends, groups, rows);

  Linear p{};
  p.n = n, p.k = k, p.weight = weight;
  p.x_dtype = p.y_dtype = float_format(a.x);
  const auto* x = args.data<char>(a.x);
  const auto* w = args.data<int8_t>(a.w);
  const auto* sw = args.data<char>(a.sw);
  const auto* extra = args.data<char>(a.extra);
  const auto* bias = args.data<char>(a.bias);
  auto* out = static_cast<char*>(y.data_ptr());
  if (bias != nullptr) p.bias_dtype = float_format(*a.bias);
  set_grid(p, args, a.sx, a.zx);
  const int64_t row_in = k * a.x.element_size(), row_out = n * a.x.element_size();
  const int64_t scales = n * weight.groups(k), bytes_of_scales = scales * a.sw.element_size();

  int64_t begin = 0;
  for (int64_t e = 0; e < groups; begin = ends[e++]) {
    p.m = ends[e] - begin;
    if (p.m == 0 || n == 0) continue;
    p.x = x + begin * row_in, p.y = out + begin * row_out;
    p.w = w + e * n * weight.row_bytes(k);
    const char* scale = sw + e * bytes_of_scales;
    float all = 1.0f;
    if (weight.divisor) std::memcpy(&all, extra + e * sizeof all, sizeof all), all = 1.0f / all;
    p.sw = weight.grouped() ? &all : reinterpret_cast<const float*>(scale);
    if (weight.grouped()) p.group_scale = scale;
    if (weight.zero_points) p.zero_points = reinterpret_cast<const uint8_t*>(extra) + e * scales;
    if (bias != nullptr) p.bias = bias + e * n * a.bias->element_size();
    run_parallel(args, kernel, p);
  }
  std::memset(out + begin * row_out, 0, (rows - begin) * row_out);  // rows of no group
  return y;
}

// -- ops

Tensor int8_grouped_linear(Tensor x, Tensor w, Tensor sw, Tensor offsets, Maybe bias) {
  static const Signature& op = signature_of("int8_grouped_linear");
  return grouped(op, kInt8, best_tier().int8, {x, w, sw, nullptr, offsets, nullptr, nullptr, bias});
}

Tensor int8_weight_grouped_linear(Tensor x, Tensor w, Tensor sw, Tensor offsets, Maybe bias) {
  static const Signature& op = signature_of("int8_weight_grouped_linear");
  return grouped(op, kInt8, best_tier().weight_only,
                 {x, w, sw, nullptr, offsets, nullptr, nullptr, bias});
}

Tensor int8_static_grouped_linear(Tensor x, Tensor w, Tensor sw, Tensor offsets, Tensor sx,
                                  Tensor zx, Maybe bias) {
  static const Signature& op = signature_of("int8_static_grouped_linear");
  return grouped(op, kInt8, best_tier().int8, {x, w, sw, nullptr, offsets, &sx, &zx, bias});
}

Tensor int16_grouped_linear(Tensor x, Tensor w, Tensor sw, Tensor offsets, Maybe bias) {
  static const Signature& op = signature_of("int16_grouped_linear");
  return grouped(op, kInt8, best_tier().int16,
                 {x, w, sw, nullptr, offsets, nullptr, nullptr, bias});
}

Tensor int16_static_grouped_linear(Tensor x, Tensor w, Tensor sw, Tensor offsets, Tensor sx,
                                   Maybe bias) {
  static const Signature& op = signature_of("int16_static_grouped_linear");
  return grouped(op, kInt8, best_tier().int16, {x, w, sw, nullptr, offsets, &sx, nullptr, bias});
}

// `fp8_weight_linear` as `fp8_weight_grouped_linear`.
std::string name_of(const WeightOp& op) {
  const std::string name = op.name, tail = "linear";
  return name.substr(0, name.size() - tail.size()) + "grouped_" + tail;
}

// Over the weights of kWeightOps, by their place there.
template <size_t kIndex>
Tensor weight_linear(Tensor x, Tensor wq, Tensor sw, Tensor offsets, Maybe bias) {
  static const Signature& op = signature_of(name_of(kWeightOps[kIndex]));
  return grouped(op, kWeightOps[kIndex].weight, kernel_of(best_tier(), kWeightOps[kIndex]),
                 {x, wq, sw, nullptr, offsets, nullptr, nullptr, bias});
}

template <size_t kIndex>
Tensor weight_linear_extra(Tensor x, Tensor wq, Tensor sw, Tensor extra, Tensor offsets,
                           Maybe bias) {
  static const Signature& op = signature_of(name_of(kWeightOps[kIndex]));
  return grouped(op, kWeightOps[kIndex].weight, kernel_of(best_tier(), kWeightOps[kIndex]),
                 {x, wq, sw, &extra, offsets, nullptr, nullptr, bias});
}

template <size_t kIndex>
bool add_weight_op() {
  constexpr WeightFormat weight = kWeightOps[kIndex].weight;
  const std::string name = name_of(kWeightOps[kIndex]);
  if constexpr (weight.divisor || weight.zero_points) {
    return add_ops({{name.c_str(), TORCH_BOX(&weight_linear_extra<kIndex>)}});
  } else {
    return add_ops({{name.c_str(), TORCH_BOX(&weight_linear<kIndex>)}});
  }
}

template <size_t... kIndex>
bool add_weight_ops(std::index_sequence<kIndex...>) {
  return (add_weight_op<kIndex>() && ...);
}

[[maybe_unused]] const bool added_over_weights =
    add_weight_ops(std::make_index_sequence<std::size(kWeightOps)>());
[[maybe_unused]] const bool added = add_ops({
    {"int8_grouped_linear", TORCH_BOX(&int8_grouped_linear)},
    {"int8_weight_grouped_linear", TORCH_BOX(&int8_weight_grouped_linear)},
    {"int8_static_grouped_linear", TORCH_BOX(&int8_static_grouped_linear)},
    {"int16_grouped_linear", TORCH_BOX(&int16_grouped_linear)},
    {"int16_static_grouped_linear", TORCH_BOX(&int16_static_grouped_linear)},
});

}  // namespace
}  // namespace qnn
