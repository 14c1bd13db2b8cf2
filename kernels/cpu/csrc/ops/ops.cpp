// The ops of kernels/int8.py, and those of kernels/float_ops.py over a float weight, on the CPU,
// registered through torch's stable interface.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/arguments.h"
#include "ops/threads.h"
#include "tiers/tier_choice.h"

namespace qnn {
namespace {

constexpr const char* kActivations[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};

void run_parallel(const Arguments& args, const Kernel& kernel, const Linear& p) {
  // A thread more is worth its start, some µs, from about so many products, or so many bytes of w,
  // to each.
  constexpr int64_t kProducts = 1 << 20, kBytes = 1 << 17;
  const int64_t worth = std::max(p.m * p.n * p.k / kProducts, p.n * p.k / kBytes);
  const size_t bytes = kernel.scratch_bytes(p);
  with_memory(args, [&] {
    share(worth,
          [&](int part, int parts) { kernel.run(p, part, parts, scratch_of_this_thread(bytes)); });
  });
}

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
  const Tensor *sx = nullptr, *zx = nullptr;  // of a fixed grid
};

Tensor linear(const Signature& op, const Kernel& kernel, const Int8Linear& a) {
  Arguments args(op, a.x, a.scale, a.w, a.sw, a.sx, a.zx, a.bias, a.residual, a.activation,
                 a.dtype);
  const ScalarType dtype = a.dtype == nullptr ? a.x.scalar_type() : *a.dtype;
  Linear p{};
  p.n = a.w.size(0), p.k = p.w_stride = a.w.size(1);
  p.x_dtype = p.y_dtype = float_format(dtype);
  Tensor y = result(args, p, a.x, dtype);
  if (p.m == 0) return y;
  p.x = args.data(a.x), p.w = args.data<int8_t>(a.w), p.sw = args.data<float>(a.sw);
  p.row_scale = args.data<float>(a.scale);
  if (a.sx != nullptr) {
    const float sx = *args.data<float>(*a.sx);
    const bool usable = sx >= std::numeric_limits<float>::min() && std::isfinite(sx);
    p.fixed = true;
    p.grid_scale = usable ? sx : std::numeric_limits<float>::quiet_NaN();
    p.zero_point = *args.data<int8_t>(*a.zx);
  }
  p.bias = args.data(a.bias), p.residual = args.data(a.residual);
  if (p.bias != nullptr) p.bias_dtype = float_format(*a.bias);
  const auto* named = std::find(std::begin(kActivations), std::end(kActivations), a.activation);
  p.activation = static_cast<Activation>(named - std::begin(kActivations));
  run_parallel(args, kernel, p);
  return y;
}

// The layers over a float weight: of e4m3 with a scale a row, or, where `gw` is given, of e2m1 with
// a scale a block and one divisor.
Tensor float_linear(const Signature& op, const Tier& tier, const Tensor& x, const Tensor& wq,
                    const Tensor& sw, const Tensor* gw, const Maybe& bias) {
  Arguments args(op, x, wq, sw, gw, bias);
  Linear p{};
  p.n = wq.size(0), p.w_stride = wq.size(1), p.k = x.size(x.dim() - 1);
  p.x_dtype = p.y_dtype = float_format(x);
  Tensor y = result(args, p, x, x.scalar_type());
  if (p.m == 0) return y;
  p.x = args.data(x), p.w = args.data<int8_t>(wq);
  float scale = 1.0f;
  if (gw == nullptr) {
    p.weight = Weight::e4m3, p.sw = args.data<float>(sw);
  } else {
    p.weight = Weight::e2m1, p.block_scale = args.data<uint8_t>(sw);
    scale = 1.0f / *args.data<float>(*gw);
    p.sw = &scale;
  }
  p.bias = args.data(bias);
  if (p.bias != nullptr) p.bias_dtype = float_format(*bias);
  run_parallel(args, tier.weight_only, p);
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

Tensor fp8_weight_linear(Tensor x, Tensor wq, Tensor sw, Maybe bias) {
  static const Signature& op = signature_of("fp8_weight_linear");
  return float_linear(op, best_tier(), x, wq, sw, nullptr, bias);
}

Tensor nvfp4_weight_linear(Tensor x, Tensor wq, Tensor sw, Tensor gw, Maybe bias) {
  static const Signature& op = signature_of("nvfp4_weight_linear");
  return float_linear(op, best_tier(), x, wq, sw, &gw, bias);
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
  const Quantize p{scales.numel(),
                   k,
                   args.data(x),
                   float_format(x),
                   static_cast<int8_t*>(codes.data_ptr()),
                   static_cast<float*>(scales.data_ptr())};
  constexpr int64_t kValues =
      1 << 16;  // a thread more is worth its start from so many values to each
  share(p.m * k / kValues, [&](int part, int parts) { best_tier().quantize(p, part, parts); });
  return {codes, scales};
}

// For tests and benchmarks: `scheme` is int8 or int8_weight, and the tier is the named one.
Tensor cpu_linear(Tensor x, Tensor w, Tensor sw, Maybe bias, Maybe residual, std::string activation,
                  std::string scheme, std::string tier) {
  const bool weight_only = scheme == "int8_weight";
  if (!weight_only && scheme != "int8") {
    throw std::invalid_argument(
        "qnn::cpu_linear: scheme must be one of 'int8', 'int8_weight', got '" + scheme + "'.");
  }
  const Tier& named = tier_called(tier);
  return linear(signature_of(scheme + "_linear"), weight_only ? named.weight_only : named.int8,
                {x, w, sw, bias, residual, activation});
}

Tensor cpu_static_linear(Tensor x, Tensor w, Tensor sw, Tensor sx, Tensor zx, Maybe bias,
                         Maybe residual, std::string activation, std::string tier) {
  return linear(signature_of("int8_static_linear"), tier_called(tier).int8,
                {x, w, sw, bias, residual, activation, nullptr, nullptr, &sx, &zx});
}

// The same for a float weight: of nvfp4 where `gw` is given, else of fp8.
Tensor cpu_float_linear(Tensor x, Tensor wq, Tensor sw, Maybe gw, Maybe bias, std::string tier) {
  return float_linear(signature_of(gw.has_value() ? "nvfp4_weight_linear" : "fp8_weight_linear"),
                      tier_called(tier), x, wq, sw, gw.has_value() ? &*gw : nullptr, bias);
}

[[maybe_unused]] const bool added = add_ops({
    {"int8_quantize", TORCH_BOX(&int8_quantize)},
    {"int8_linear", TORCH_BOX(&int8_linear)},
    {"int8_weight_linear", TORCH_BOX(&int8_weight_linear)},
    {"int8_static_linear", TORCH_BOX(&int8_static_linear)},
    {"int8_rows_linear", TORCH_BOX(&int8_rows_linear)},
    {"fp8_weight_linear", TORCH_BOX(&fp8_weight_linear)},
    {"nvfp4_weight_linear", TORCH_BOX(&nvfp4_weight_linear)},
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
      "cpu_static_linear(Tensor x, Tensor w, Tensor sw, Tensor sx, Tensor zx, Tensor? bias, "
      "Tensor? residual, str activation, str tier) -> Tensor");
  m.def(
      "cpu_float_linear(Tensor x, Tensor wq, Tensor sw, Tensor? gw, Tensor? bias, str tier) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CompositeExplicitAutograd, m) {
  m.impl("cpu_tiers", TORCH_BOX(&qnn::cpu_tiers));
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CPU, m) {
  m.impl("cpu_linear", TORCH_BOX(&qnn::cpu_linear));
  m.impl("cpu_static_linear", TORCH_BOX(&qnn::cpu_static_linear));
  m.impl("cpu_float_linear", TORCH_BOX(&qnn::cpu_float_linear));
}
