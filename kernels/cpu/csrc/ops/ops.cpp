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

#include "linear/describe.h"
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
  if (const char* why = why_not(p))
    throw std::logic_error("qnn: a weight of " + text(p.weight) + ": " + why + ".");
  const size_t bytes = kernel.scratch_bytes(p);
  with_memory(args, [&] {
    share(worth,
          [&](int part, int parts) { kernel.run(p, part, parts, scratch_of_this_thread(bytes)); });
  });
}

struct Call {
  const char* op;
  bool weight_only;
  ScalarType dtype;                           // of y
  const Tensor* row_scale;                    // where the rows are codes
  const Tensor *sx = nullptr, *zx = nullptr;  // of a fixed grid
};

Tensor linear(const Call& call, const Tier& tier, const Tensor& x, const Tensor& w,
              const Tensor& sw, const Maybe& bias, const Maybe& residual,
              const std::string& activation) {
  const bool codes = call.row_scale != nullptr, fixed = call.sx != nullptr;
  const char* first = codes ? "q" : "x";
  std::vector<std::pair<const char*, const Tensor*>> tensors{{first, &x}};
  const auto add = [&](const char* name, const Tensor* t) {
    tensors.emplace_back(name, t);
    return tensors.size() - 1;
  };
  const size_t at_scale = codes ? add("scale", call.row_scale) : 0, at_w = add("w", &w),
               at_sw = add("sw", &sw);
  const size_t at_sx = fixed ? add("sx", call.sx) : 0, at_zx = fixed ? add("zx", call.zx) : 0;
  const size_t at_bias = bias.has_value() ? add("bias", &*bias) : 0;
  const size_t at_residual = residual.has_value() ? add("residual", &*residual) : 0;
  const Arguments args(call.op, std::move(tensors),
                       activation == "none" ? "" : ", activation='" + activation + "'");

  Linear p{};
  // Which dtypes, then which sizes, in the order of the arguments.
  if (codes) {
    args.dtype(0, ScalarType::Char);
  } else {
    p.x_dtype = args.float_dtype(0);
  }
  args.shape(0, x.dim() >= 1, "[..., k]");
  const int64_t last = x.dim() - 1;
  p.k = x.size(last);
  if (!call.weight_only) args.int32_sum("k", p.k, codes ? 128 : fixed ? 255 : 127);
  if (codes) {
    args.dtype(at_scale, ScalarType::Float);
    args.shape(at_scale, same_lead(x, *call.row_scale) && call.row_scale->size(last) == 1,
               "[..., 1] with the leading sizes of q");
  }
  args.dtype(at_w, ScalarType::Char);
  args.shape(at_w, w.dim() == 2, "[n, k]");
  args.shape(at_w, w.size(1) == p.k, "[n, k]", "k", p.k, first);
  p.n = w.size(0);
  args.dtype(at_sw, ScalarType::Float);
  args.shape(at_sw, sw.dim() == 2 && sw.size(1) == 1, "[n, 1]");
  args.shape(at_sw, sw.size(0) == p.n, "[n, 1]", "n", p.n, "w");
  if (fixed) {
    args.dtype(at_sx, ScalarType::Float);
    args.shape(at_sx, call.sx->dim() == 1 && call.sx->size(0) == 1, "[1]");
    args.dtype(at_zx, ScalarType::Char);
    args.shape(at_zx, call.zx->dim() == 1 && call.zx->size(0) == 1, "[1]");
  }
  if (bias.has_value()) {
    p.bias_dtype = args.float_dtype(at_bias);
    args.shape(at_bias, bias->dim() == 1, "[n]");
    args.shape(at_bias, bias->size(0) == p.n, "[n]", "n", p.n, "w");
  }
  const auto y_dtype = float_format(call.dtype);
  if (!y_dtype.has_value())
    args.fail("dtype must be one of torch.float32, torch.bfloat16, torch.float16, torch.float64");
  p.y_dtype = *y_dtype;
  if (residual.has_value()) {
    args.dtype(at_residual, call.dtype);
    args.shape(at_residual, same_lead(x, *residual),
               "[..., n] with the leading sizes of the first argument");
    args.shape(at_residual, residual->size(last) == p.n, "[..., n]", "n", p.n, "w");
  }
  const auto named = std::find(std::begin(kActivations), std::end(kActivations), activation);
  if (named == std::end(kActivations))
    args.fail("activation must be one of 'none', 'relu', 'gelu', 'gelu_tanh', 'silu'");
  p.activation = static_cast<Activation>(named - std::begin(kActivations));

  // Dense operands, alive until the end of the call.
  const Tensor dense_x = args.dense(0), dense_w = args.dense(at_w), dense_sw = args.dense(at_sw);
  const Tensor dense_scale = codes ? args.dense(at_scale) : dense_x,
               dense_bias = bias.has_value() ? args.dense(at_bias) : dense_x;
  const Tensor dense_residual = residual.has_value() ? args.dense(at_residual) : dense_x;
  p.m = 1;
  std::vector<int64_t> sizes(x.dim(), p.n);
  for (int64_t i = 0; i < last; ++i) p.m *= sizes[i] = x.size(i);
  Tensor y = args.empty(sizes, call.dtype);
  if (p.m == 0 || p.n == 0) return y;
  p.x = dense_x.data_ptr(), p.w = static_cast<const int8_t*>(dense_w.data_ptr()),
  p.y = y.data_ptr();
  p.weight = kInt8;
  p.sw = static_cast<const float*>(dense_sw.data_ptr());
  if (codes) p.row_scale = static_cast<const float*>(dense_scale.data_ptr());
  if (fixed) {
    const Tensor dense_sx = args.dense(at_sx), dense_zx = args.dense(at_zx);
    const float sx = *static_cast<const float*>(dense_sx.data_ptr());
    const bool usable = sx >= std::numeric_limits<float>::min() && std::isfinite(sx);
    p.fixed = true;
    p.grid_scale = usable ? sx : std::numeric_limits<float>::quiet_NaN();
    p.zero_point = *static_cast<const int8_t*>(dense_zx.data_ptr());
  }
  if (bias.has_value()) p.bias = dense_bias.data_ptr();
  if (residual.has_value()) p.residual = dense_residual.data_ptr();
  run_parallel(args, call.weight_only ? tier.weight_only : tier.int8, p);
  return y;
}

// The layers over a float weight: of e4m3 with a scale a row, or, where `gw` is given, of e2m1 with
// a scale a block and one divisor.
Tensor float_weight_linear(const char* op, const Tier& tier, const Tensor& x, const Tensor& wq,
                           const Tensor& sw, const Tensor* gw, const Maybe& bias) {
  std::vector<std::pair<const char*, const Tensor*>> tensors{{"x", &x}, {"wq", &wq}, {"sw", &sw}};
  if (gw != nullptr) tensors.emplace_back("gw", gw);
  if (bias.has_value()) tensors.emplace_back("bias", &*bias);
  const size_t at_bias = tensors.size() - 1;
  const Arguments args(op, std::move(tensors));

  Linear p{};
  p.x_dtype = p.y_dtype = args.float_dtype(0);
  args.shape(0, x.dim() >= 1, "[..., k]");
  const int64_t last = x.dim() - 1;
  p.k = x.size(last);
  if (gw == nullptr) {
    p.weight = kE4m3;
    args.dtype(1, ScalarType::Float8_e4m3fn);
    args.shape(1, wq.dim() == 2, "[n, k]");
    args.shape(1, wq.size(1) == p.k, "[n, k]", "k", p.k, "x");
    p.n = wq.size(0);
    args.dtype(2, ScalarType::Float);
    args.shape(2, sw.dim() == 2 && sw.size(1) == 1, "[n, 1]");
    args.shape(2, sw.size(0) == p.n, "[n, 1]", "n", p.n, "wq");
  } else {
    p.weight = kE2m1;
    const int64_t blocks = p.weight.groups(p.k), bytes = p.weight.row_bytes(p.k);
    args.dtype(1, ScalarType::Byte);
    args.shape(1, wq.dim() == 2, "[n, k/16*8]");
    args.shape(1, wq.size(1) == bytes, "[n, k/16*8]", "k/16*8", bytes, "x");
    p.n = wq.size(0);
    args.dtype(2, ScalarType::Float8_e4m3fn);
    args.shape(2, sw.dim() == 2, "[n, k/16]");
    args.shape(2, sw.size(0) == p.n, "[n, k/16]", "n", p.n, "wq");
    args.shape(2, sw.size(1) == blocks, "[n, k/16]", "k/16", blocks, "x");
    args.dtype(3, ScalarType::Float);
    args.shape(3, gw->dim() == 1 && gw->size(0) == 1, "[1]");
  }
  if (bias.has_value()) {
    p.bias_dtype = args.float_dtype(at_bias);
    args.shape(at_bias, bias->dim() == 1, "[n]");
    args.shape(at_bias, bias->size(0) == p.n, "[n]", "n", p.n, "wq");
  }

  // Dense operands, alive until the end of the call.
  const Tensor dense_x = args.dense(0), dense_wq = args.dense(1), dense_sw = args.dense(2);
  const Tensor dense_gw = gw != nullptr ? args.dense(3) : dense_x,
               dense_bias = bias.has_value() ? args.dense(at_bias) : dense_x;
  p.m = 1;
  std::vector<int64_t> sizes(x.dim(), p.n);
  for (int64_t i = 0; i < last; ++i) p.m *= sizes[i] = x.size(i);
  Tensor y = args.empty(sizes, x.scalar_type());
  if (p.m == 0 || p.n == 0) return y;
  float scale = 1.0f;
  p.x = dense_x.data_ptr(), p.y = y.data_ptr();
  p.w = static_cast<const int8_t*>(dense_wq.data_ptr());
  if (gw == nullptr) {
    p.sw = static_cast<const float*>(dense_sw.data_ptr());
  } else {
    p.group_scale = dense_sw.data_ptr();
    scale = 1.0f / *static_cast<const float*>(dense_gw.data_ptr());
    p.sw = &scale;
  }
  if (bias.has_value()) p.bias = dense_bias.data_ptr();
  run_parallel(args, tier.weight_only, p);
  return y;
}

// -- ops
// ---------------------------------------------------------------------------------------------------------------

Tensor int8_linear(Tensor x, Tensor w, Tensor sw, Maybe bias, Maybe residual,
                   std::string activation) {
  return linear({"int8_linear", false, x.scalar_type(), nullptr}, best_tier(), x, w, sw, bias,
                residual, activation);
}

Tensor int8_weight_linear(Tensor x, Tensor w, Tensor sw, Maybe bias, Maybe residual,
                          std::string activation) {
  return linear({"int8_weight_linear", true, x.scalar_type(), nullptr}, best_tier(), x, w, sw, bias,
                residual, activation);
}

Tensor int8_static_linear(Tensor x, Tensor w, Tensor sw, Tensor sx, Tensor zx, Maybe bias,
                          Maybe residual, std::string activation) {
  return linear({"int8_static_linear", false, x.scalar_type(), nullptr, &sx, &zx}, best_tier(), x,
                w, sw, bias, residual, activation);
}

Tensor int8_rows_linear(Tensor q, Tensor scale, Tensor w, Tensor sw, Maybe bias, Maybe residual,
                        std::string activation, ScalarType dtype) {
  return linear({"int8_rows_linear", false, dtype, &scale}, best_tier(), q, w, sw, bias, residual,
                activation);
}

Tensor fp8_weight_linear(Tensor x, Tensor wq, Tensor sw, Maybe bias) {
  return float_weight_linear("fp8_weight_linear", best_tier(), x, wq, sw, nullptr, bias);
}

Tensor nvfp4_weight_linear(Tensor x, Tensor wq, Tensor sw, Tensor gw, Maybe bias) {
  return float_weight_linear("nvfp4_weight_linear", best_tier(), x, wq, sw, &gw, bias);
}

std::tuple<Tensor, Tensor> int8_quantize(Tensor x) {
  const Arguments args("int8_quantize", {{"x", &x}});
  const DType dtype = args.float_dtype(0);
  args.shape(0, x.dim() >= 1, "[..., k]");
  const Tensor dense = args.dense(0);
  std::vector<int64_t> sizes(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  const Tensor codes = args.empty(sizes, ScalarType::Char);
  const int64_t k = sizes.back();
  sizes.back() = 1;
  const Tensor scales = args.empty(sizes, ScalarType::Float);
  const Quantize p{scales.numel(),
                   k,
                   dense.data_ptr(),
                   dtype,
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
  return linear({"cpu_linear", weight_only, x.scalar_type(), nullptr}, tier_called(tier), x, w, sw,
                bias, residual, activation);
}

Tensor cpu_static_linear(Tensor x, Tensor w, Tensor sw, Tensor sx, Tensor zx, Maybe bias,
                         Maybe residual, std::string activation, std::string tier) {
  return linear({"cpu_static_linear", false, x.scalar_type(), nullptr, &sx, &zx}, tier_called(tier),
                x, w, sw, bias, residual, activation);
}

// The same for a float weight: of nvfp4 where `gw` is given, else of fp8.
Tensor cpu_float_linear(Tensor x, Tensor wq, Tensor sw, Maybe gw, Maybe bias, std::string tier) {
  return float_weight_linear("cpu_float_linear", tier_called(tier), x, wq, sw,
                             gw.has_value() ? &*gw : nullptr, bias);
}

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
  qnn::serve(m, "int8_quantize", TORCH_BOX(&qnn::int8_quantize));
  qnn::serve(m, "int8_linear", TORCH_BOX(&qnn::int8_linear));
  qnn::serve(m, "int8_weight_linear", TORCH_BOX(&qnn::int8_weight_linear));
  qnn::serve(m, "int8_static_linear", TORCH_BOX(&qnn::int8_static_linear));
  qnn::serve(m, "int8_rows_linear", TORCH_BOX(&qnn::int8_rows_linear));
  qnn::serve(m, "fp8_weight_linear", TORCH_BOX(&qnn::fp8_weight_linear));
  qnn::serve(m, "nvfp4_weight_linear", TORCH_BOX(&qnn::nvfp4_weight_linear));
  m.impl("cpu_linear", TORCH_BOX(&qnn::cpu_linear));
  m.impl("cpu_static_linear", TORCH_BOX(&qnn::cpu_static_linear));
  m.impl("cpu_float_linear", TORCH_BOX(&qnn::cpu_float_linear));
}
