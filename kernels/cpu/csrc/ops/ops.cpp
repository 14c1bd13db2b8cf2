// The ops of kernels/int8.py, and those of kernels/float_ops.py over a float weight, on the CPU,
// registered through torch's stable interface.
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/arguments.h"
#include "ops/linear_call.h"
#include "tiers/tier_choice.h"

namespace qnn {
namespace {

// y of the leading sizes of x and n columns, or nothing to compute: then m is 0.
Tensor result(const Arguments& args, Linear& p, const Tensor& x, ScalarType dtype) {
  std::vector<int64_t> sizes(x.dim(), p.n);
  p.m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) p.m *= sizes[i] = x.size(i);
  Tensor y = args.empty(sizes, dtype);
  p.y = y.data_ptr();
  if (p.n == 0) p.m = 0;
  return y;
}

// A layer over an int8 weight.
struct Int8Linear {
  const Tensor &x, &w, &sw;
  const Maybe &bias, &residual;
  const std::string& activation;
  const Tensor* scale = nullptr;              // where x is codes
  const ScalarType* dtype = nullptr;          // of y then
  const Tensor *sx = nullptr, *zx = nullptr;  // of a fixed grid; of codes the latter alone
};

Tensor linear(const Signature& op, const Kernel& kernel, const Int8Linear& a) {
  Arguments args(op, a.x, a.scale, a.w, a.sw, a.sx, a.zx, a.bias, a.residual, a.activation,
                 a.dtype);
  const ScalarType dtype = a.dtype == nullptr ? a.x.scalar_type() : *a.dtype;
  Linear p{};
  p.n = a.w.size(0), p.k = a.w.size(1), p.weight = kInt8;
  p.x_dtype = p.y_dtype = float_format(dtype);
  Tensor y = result(args, p, a.x, dtype);
  if (p.m == 0) return y;
  p.x = args.data(a.x), p.w = args.data<int8_t>(a.w), p.sw = args.data<float>(a.sw);
  p.row_scale = args.data<float>(a.scale);
  set_grid(p, args, a.sx, a.zx);
  if (a.sx == nullptr && a.zx != nullptr) p.zero_point = *args.data<int8_t>(*a.zx);
  p.bias = args.data(a.bias), p.residual = args.data(a.residual);
  if (p.bias != nullptr) p.bias_dtype = float_format(*a.bias);
  p.activation = activation_called(a.activation);
  run_parallel(args, kernel, p);
  return y;
}

// A layer over a weight in any other format; `extra` is its divisor or its zero points.
Tensor linear(const WeightOp& op, const Signature& signature, const Tier& tier, const Tensor& x,
              const Tensor& wq, const Tensor& sw, const Tensor* extra, const Maybe& bias) {
  Arguments args(signature, x, wq, sw, extra, bias);
  Linear p{};
  p.n = wq.size(0), p.k = x.size(x.dim() - 1), p.weight = op.weight;
  p.x_dtype = p.y_dtype = float_format(x);
  Tensor y = result(args, p, x, x.scalar_type());
  if (p.m == 0) return y;
  p.x = args.data(x), p.w = args.data<int8_t>(wq);
  if (p.weight.zero_points) p.zero_points = args.data<uint8_t>(*extra);
  const float all = p.weight.divisor ? 1.0f / *args.data<float>(*extra) : 1.0f;
  p.sw = p.weight.grouped() ? &all : args.data<float>(sw);
  if (p.weight.grouped()) p.group_scale = args.data(sw);
  p.bias = args.data(bias);
  if (p.bias != nullptr) p.bias_dtype = float_format(*bias);
  run_parallel(args, kernel_of(tier, op), p);
  return y;
}

// -- ops

Tensor int8_linear(Tensor x, Tensor w, Tensor sw, Maybe bias, Maybe residual,
                   std::string activation) {
  static const Signature& op = signature_of("int8_linear");
  return linear(op, best_tier().int8, {x, w, sw, bias, residual, activation});
}

Tensor int8_weight_linear(Tensor x, Tensor w, Tensor sw, Maybe bias, Maybe residual,
                          std::string activation) {
  static const Signature& op = signature_of("int8_weight_linear");
  return linear(op, best_tier().weight_only, {x, w, sw, bias, residual, activation});
}

Tensor int8_static_linear(Tensor x, Tensor w, Tensor sw, Tensor sx, Tensor zx, Maybe bias,
                          Maybe residual, std::string activation) {
  static const Signature& op = signature_of("int8_static_linear");
  return linear(op, best_tier().int8,
                {x, w, sw, bias, residual, activation, nullptr, nullptr, &sx, &zx});
}

Tensor int8_rows_linear(Tensor q, Tensor scale, Tensor w, Tensor sw, Maybe bias, Maybe residual,
                        std::string activation, ScalarType dtype) {
  static const Signature& op = signature_of("int8_rows_linear");
  return linear(op, best_tier().int8, {q, w, sw, bias, residual, activation, &scale, &dtype});
}

Tensor int8_static_rows_linear(Tensor q, Tensor scale, Tensor w, Tensor sw, Tensor zx, Maybe bias,
                               Maybe residual, std::string activation, ScalarType dtype) {
  static const Signature& op = signature_of("int8_static_rows_linear");
  return linear(op, best_tier().int8,
                {q, w, sw, bias, residual, activation, &scale, &dtype, nullptr, &zx});
}

Tensor int16_linear(Tensor x, Tensor w, Tensor sw, Maybe bias, Maybe residual,
                    std::string activation) {
  static const Signature& op = signature_of("int16_linear");
  return linear(op, best_tier().int16, {x, w, sw, bias, residual, activation});
}

Tensor int16_static_linear(Tensor x, Tensor w, Tensor sw, Tensor sx, Maybe bias, Maybe residual,
                           std::string activation) {
  static const Signature& op = signature_of("int16_static_linear");
  return linear(op, best_tier().int16,
                {x, w, sw, bias, residual, activation, nullptr, nullptr, &sx, nullptr});
}

// The ops of kWeightOps, by their place there.
template <size_t kIndex>
Tensor weight_linear(Tensor x, Tensor wq, Tensor sw, Maybe bias) {
  static const Signature& signature = signature_of(kWeightOps[kIndex].name);
  return linear(kWeightOps[kIndex], signature, best_tier(), x, wq, sw, nullptr, bias);
}

template <size_t kIndex>
Tensor weight_linear_extra(Tensor x, Tensor wq, Tensor sw, Tensor extra, Maybe bias) {
  static const Signature& signature = signature_of(kWeightOps[kIndex].name);
  return linear(kWeightOps[kIndex], signature, best_tier(), x, wq, sw, &extra, bias);
}

template <size_t kIndex>
NativeOp weight_op() {
  constexpr WeightFormat weight = kWeightOps[kIndex].weight;
  if constexpr (weight.divisor || weight.zero_points) {
    return {kWeightOps[kIndex].name, TORCH_BOX(&weight_linear_extra<kIndex>)};
  } else {
    return {kWeightOps[kIndex].name, TORCH_BOX(&weight_linear<kIndex>)};
  }
}

template <size_t... kIndex>
bool add_weight_ops(std::index_sequence<kIndex...>) {
  return add_ops({weight_op<kIndex>()...});
}

std::tuple<Tensor, Tensor> int8_quantize(Tensor x) {
  static const Signature& op = signature_of("int8_quantize");
  Arguments args(op, x);
  std::vector<int64_t> sizes(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  const Tensor codes = args.empty(sizes, ScalarType::Char);
  const int64_t k = sizes.back();
  sizes.back() = 1;
  const Tensor scales = args.empty(sizes, ScalarType::Float);
  Quantize p{scales.numel(),
             k,
             args.data(x),
             float_format(x),
             static_cast<int8_t*>(codes.data_ptr()),
             static_cast<float*>(scales.data_ptr())};
  std::optional<Tensor> single;
  if (p.x_dtype == DType::float64) {
    single = args.empty({p.m * k}, ScalarType::Float);
    p.x = to_single(p.x, p.m * k, static_cast<float*>(single->data_ptr()));
    p.x_dtype = DType::float32;
  }
  constexpr int64_t kValues =
      1 << 16;  // a thread more is worth its start from so many values to each
  share(p.m * k / kValues, [&](int part, int parts) { best_tier().quantize(p, part, parts); });
  return {codes, scales};
}

// For tests and benchmarks: `scheme` is int8, int16 or int8_weight, and the tier is the named one.
Tensor cpu_linear(Tensor x, Tensor w, Tensor sw, Maybe bias, Maybe residual, std::string activation,
                  std::string scheme, std::string tier) {
  const std::pair<const char*, Kernel Tier::*> kernels[] = {
      {"int8", &Tier::int8}, {"int16", &Tier::int16}, {"int8_weight", &Tier::weight_only}};
  for (const auto& [name, kernel] : kernels) {
    if (scheme != name) continue;
    return linear(signature_of(scheme + "_linear"), tier_called(tier).*kernel,
                  {x, w, sw, bias, residual, activation});
  }
  throw std::invalid_argument(
      "qnn::cpu_linear: scheme must be one of 'int8', 'int16', 'int8_weight', got '" + scheme +
      "'.");
}

// int8_static, or, without a zero point, int16_static.
Tensor cpu_static_linear(Tensor x, Tensor w, Tensor sw, Tensor sx, Maybe zx, Maybe bias,
                         Maybe residual, std::string activation, std::string tier) {
  if (!zx.has_value()) {
    return linear(signature_of("int16_static_linear"), tier_called(tier).int16,
                  {x, w, sw, bias, residual, activation, nullptr, nullptr, &sx, nullptr});
  }
  return linear(signature_of("int8_static_linear"), tier_called(tier).int8,
                {x, w, sw, bias, residual, activation, nullptr, nullptr, &sx, &*zx});
}

// The same for an op of kWeightOps.
Tensor cpu_weight_linear(Tensor x, Tensor wq, Tensor sw, Maybe extra, Maybe bias, std::string op,
                         std::string tier) {
  for (const WeightOp& known : kWeightOps) {
    if (op != known.name) continue;
    return linear(known, signature_of(op), tier_called(tier), x, wq, sw,
                  extra.has_value() ? &*extra : nullptr, bias);
  }
  throw std::invalid_argument("qnn::cpu_weight_linear: no op '" + op + "'.");
}

[[maybe_unused]] const bool added_over_weights =
    add_weight_ops(std::make_index_sequence<std::size(kWeightOps)>());
[[maybe_unused]] const bool added = add_ops({
    {"int8_quantize", TORCH_BOX(&int8_quantize)},
    {"int8_linear", TORCH_BOX(&int8_linear)},
    {"int8_weight_linear", TORCH_BOX(&int8_weight_linear)},
    {"int8_static_linear", TORCH_BOX(&int8_static_linear)},
    {"int16_linear", TORCH_BOX(&int16_linear)},
    {"int16_static_linear", TORCH_BOX(&int16_static_linear)},
    {"int8_rows_linear", TORCH_BOX(&int8_rows_linear)},
    {"int8_static_rows_linear", TORCH_BOX(&int8_static_rows_linear)},
});

}  // namespace
}  // namespace qnn

STABLE_TORCH_LIBRARY_FRAGMENT(qnn, m) {
  m.def("cpu_tiers() -> str");
  m.def(
      "cpu_linear(Tensor x, Tensor w, Tensor sw, Tensor? bias, Tensor? residual, str activation, "
      "str scheme, str tier) "
      "-> Tensor");
  m.def(
      "cpu_static_linear(Tensor x, Tensor w, Tensor sw, Tensor sx, Tensor? zx, Tensor? bias, "
      "Tensor? residual, str activation, str tier) -> Tensor");
  m.def(
      "cpu_weight_linear(Tensor x, Tensor wq, Tensor sw, Tensor? extra, Tensor? bias, str op, "
      "str tier) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CompositeExplicitAutograd, m) {
  m.impl("cpu_tiers", TORCH_BOX(&qnn::cpu_tiers));
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CPU, m) {
  m.impl("cpu_linear", TORCH_BOX(&qnn::cpu_linear));
  m.impl("cpu_static_linear", TORCH_BOX(&qnn::cpu_static_linear));
  m.impl("cpu_weight_linear", TORCH_BOX(&qnn::cpu_weight_linear));
}
