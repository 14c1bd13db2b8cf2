// The ops of kernels/declare/conv.py on the CPU, but for the transposed ones.
#include <tuple>

#include "ops/conv_call.h"

namespace qnn {
namespace {

// What a call may have; the ops differ in which of these.
struct ConvArguments {
  const Tensor& x;  // or codes
  const Tensor *scale, *sx, *zx;
  const Tensor &w, &sw;
  const Tensor *so, *zo;
  const Ints &stride, &padding, &dilation;
  const int64_t& groups;
  const Maybe &bias, &residual;
  const Maybe *rq, *rscale, *rz;
  const std::string &activation, &last;
  const ScalarType* dtype;
  bool keeps_y = false;  // beside its codes
};

// The axes that are functions of others, and then `_rule`, as in kernels/declare/conv.py.
void require_rules(const Arguments& args, const ConvArguments& a, int64_t limit, Conv& p) {
  const Ints image = sizes_of(a.x), w = sizes_of(a.w);
  p.batch = image[0], p.channels = image[1], p.outputs = w[0], p.groups = a.groups;
  args.require_axis(a.w, 1, a.groups > 0 ? p.channels / a.groups : 0);
  Ints out;
  for (int axis = 0; axis < 3; ++axis) {
    p.in[axis] = image[axis + 2], p.kernel[axis] = w[axis + 2];
    p.stride[axis] = a.stride[axis], p.dilation[axis] = a.dilation[axis];
    p.before[axis] = a.padding[2 * axis];
    const int64_t whole = p.in[axis] + p.before[axis] + a.padding[2 * axis + 1] -
                          p.dilation[axis] * (p.kernel[axis] - 1) - 1;
    // Rounded down, also where the kernel is larger than the image.
    out.push_back(p.stride[axis] <= 0 ? 0
                  : whole >= 0        ? whole / p.stride[axis] + 1
                                      : 1 - div_up(-whole, p.stride[axis]));
    p.out[axis] = out.back();
  }
  for (const Maybe* t : {&a.residual, a.rq}) {
    for (int axis = 0; t != nullptr && t->has_value() && axis < 3; ++axis)
      args.require_axis(**t, axis + 2, out[axis]);
  }
  if (a.rq != nullptr &&
      (a.rq->has_value() != a.rscale->has_value() || a.rq->has_value() != a.rz->has_value()))
    args.fail("rq, rscale and rz belong together");
  require_geometry(args, a.stride, a.dilation, a.groups);
  if (least(a.padding) < 0) args.fail("padding must not be negative, got " + listed(a.padding));
  require_products(args, image, w, a.groups, p.depth() * p.taps(), limit);
  require_result(args, image, w, a.stride, a.padding, a.dilation, out);
}

// Whether every value of x along an axis is in some window.
bool covered(const Conv& p, int axis) {
  const int64_t k = p.kernel[axis], d = p.dilation[axis], s = p.stride[axis];
  const int64_t last = (p.out[axis] - 1) * s + (k - 1) * d - p.before[axis];
  const bool dense = k == 1 || d == 1 ? s <= k : s == 1 && p.out[axis] >= d;
  return dense && last >= p.in[axis] - 1;
}

// What a call gives: y, or its codes and their scales, or all three.
struct Convolved {
  Maybe y, codes, scale;
};

Convolved conv(const Signature& op, const ConvKernel& kernel, ConvInput input, int64_t limit,
               const ConvArguments& a, int64_t parts = 0) {
  Arguments args(op, a.x, a.scale, a.scale == nullptr ? nullptr : a.zx, a.w, a.sw, a.sx,
                 a.scale == nullptr ? a.zx : nullptr, a.so, a.zo, a.stride, a.padding, a.dilation,
                 a.groups, a.bias, a.residual, a.rq, a.rscale, a.rz, a.activation, a.last, a.dtype);
  Conv p{};
  require_rules(args, a, limit, p);
  const ScalarType dtype = a.dtype == nullptr ? a.x.scalar_type() : *a.dtype;
  const Ints y_sizes{p.batch, p.outputs, p.out[0], p.out[1], p.out[2]};
  p.input = input;
  p.x_last = p.y_last = is_channels_last(a.x) && !a.x.is_contiguous();
  const auto image = [&](const Tensor& t) {
    return p.x_last ? args.channels_last(t) : args.data(t);
  };
  const auto image_of = [&](const Maybe* t) {
    return t != nullptr && t->has_value() ? image(**t) : nullptr;
  };
  Convolved result;
  if (a.so == nullptr || a.keeps_y) result.y = args.empty(y_sizes, dtype, p.y_last);
  if (a.so != nullptr) {
    result.codes = args.empty(y_sizes, ScalarType::Byte, p.y_last);
    result.scale = args.empty({p.batch, 1, 1, 1, 1}, ScalarType::Float);
  }
  if (p.batch == 0) return result;
  if (result.y.has_value()) p.y = result.y->data_ptr();
  p.y_dtype = float_format(dtype);
  p.x = image(a.x);
  if (input != ConvInput::codes) p.x_dtype = float_format(a.x);
  p.w = static_cast<const int8_t*>(args.channels_last(a.w)), p.sw = args.data<float>(a.sw);
  p.bias = args.data(a.bias);
  if (p.bias != nullptr) p.bias_dtype = float_format(*a.bias);
  p.activation = activation_called(a.activation), p.last_relu = a.last == "relu";
  p.residual = image_of(&a.residual);
  p.residual_codes = static_cast<const uint8_t*>(image_of(a.rq));
  if (p.residual_codes != nullptr) {
    p.residual_scale = args.data<float>(*a.rscale);
    p.residual_zero_point = *args.data<int8_t>(*a.rz);
  }
  if (a.zx != nullptr) p.zero_point = *args.data<int8_t>(*a.zx);
  std::vector<float> scales(p.batch);
  std::vector<int32_t> odd(p.batch);
  p.odd = odd.data();
  bool all_covered = true;
  if (input == ConvInput::codes) p.sample_scale = args.data<float>(a.scale);
  if (input == ConvInput::fixed) {
    const float sx = *args.data<float>(a.sx);
    p.grid_scale = usable(sx) ? sx : kNan;
    for (int axis = 0; axis < 3; ++axis) all_covered = all_covered && covered(p, axis);
  }
  if (input == ConvInput::dynamic || !all_covered) {
    const std::vector<int32_t> most = magnitudes(kernel, p);
    for (int64_t i = 0; i < p.batch; ++i)
      scales[i] = input == ConvInput::dynamic ? kernel.scale(most[i])
                  : most[i] < kInfinite       ? p.grid_scale
                                              : kNan;
    p.sample_scale = scales.data();
  }
  float so = kNan;
  if (result.codes.has_value()) {
    p.codes = static_cast<uint8_t*>(result.codes->data_ptr());
    so = usable(*args.data<float>(a.so)) ? *args.data<float>(a.so) : kNan;
    p.y_inverse = 1.0f / so, p.y_zero_point = *args.data<int8_t>(a.zo);
  }

  run_in_parts(args, kernel, p, parts);
  if (input == ConvInput::fixed && p.sample_scale == nullptr &&
      std::count(odd.begin(), odd.end(), 0) < p.batch) {
    // Some samples hold NaN or inf, which was seen on the way: once more, with their scale.
    for (int64_t i = 0; i < p.batch; ++i) scales[i] = odd[i] == 0 ? p.grid_scale : kNan;
    p.sample_scale = scales.data();
    run_in_parts(args, kernel, p, parts);
  }
  if (result.codes.has_value())
    mark_odd(odd, so, p.y_zero_point, p.pixels() / p.batch * p.outputs, p.codes,
             static_cast<float*>(result.scale->data_ptr()));
  return result;
}

// -- ops

Tensor int8_conv(Tensor x, Tensor w, Tensor sw, Ints stride, Ints padding, Ints dilation,
                 int64_t groups, Maybe bias, Maybe residual, std::string activation,
                 std::string last) {
  static const Signature& op = signature_of("int8_conv");
  return *conv(op, best_tier().conv, ConvInput::dynamic, kLimit,
               {x,       nullptr, nullptr, nullptr,    w,      sw,     nullptr,
                nullptr, stride,  padding, dilation,   groups, bias,   residual,
                nullptr, nullptr, nullptr, activation, last,   nullptr})
              .y;
}

Tensor int8_weight_conv(Tensor x, Tensor w, Tensor sw, Ints stride, Ints padding, Ints dilation,
                        int64_t groups, Maybe bias, Maybe residual, std::string activation,
                        std::string last) {
  static const Signature& op = signature_of("int8_weight_conv");
  return *conv(op, best_tier().conv_weight, ConvInput::floats, kAny,
               {x,       nullptr, nullptr, nullptr,    w,      sw,     nullptr,
                nullptr, stride,  padding, dilation,   groups, bias,   residual,
                nullptr, nullptr, nullptr, activation, last,   nullptr})
              .y;
}

Tensor int8_static_conv(Tensor x, Tensor w, Tensor sw, Tensor sx, Tensor zx, Ints stride,
                        Ints padding, Ints dilation, int64_t groups, Maybe bias, Maybe residual,
                        std::string activation, std::string last) {
  static const Signature& op = signature_of("int8_static_conv");
  return *conv(op, best_tier().conv, ConvInput::fixed, kFixedLimit,
               {x,       nullptr, &sx,     &zx,        w,      sw,     nullptr,
                nullptr, stride,  padding, dilation,   groups, bias,   residual,
                nullptr, nullptr, nullptr, activation, last,   nullptr})
              .y;
}

Tensor int16_conv(Tensor x, Tensor w, Tensor sw, Ints stride, Ints padding, Ints dilation,
                  int64_t groups, Maybe bias, Maybe residual, std::string activation,
                  std::string last) {
  static const Signature& op = signature_of("int16_conv");
  return *conv(op, best_tier().conv_int16, ConvInput::dynamic, kAny,
               {x,       nullptr, nullptr, nullptr,    w,      sw,     nullptr,
                nullptr, stride,  padding, dilation,   groups, bias,   residual,
                nullptr, nullptr, nullptr, activation, last,   nullptr})
              .y;
}

Tensor int16_static_conv(Tensor x, Tensor w, Tensor sw, Tensor sx, Ints stride, Ints padding,
                         Ints dilation, int64_t groups, Maybe bias, Maybe residual,
                         std::string activation, std::string last) {
  static const Signature& op = signature_of("int16_static_conv");
  return *conv(op, best_tier().conv_int16, ConvInput::fixed, kAny,
               {x,       nullptr, &sx,     nullptr,    w,      sw,     nullptr,
                nullptr, stride,  padding, dilation,   groups, bias,   residual,
                nullptr, nullptr, nullptr, activation, last,   nullptr})
              .y;
}

Tensor int8_codes_conv(Tensor q, Tensor scale, Tensor zx, Tensor w, Tensor sw, Ints stride,
                       Ints padding, Ints dilation, int64_t groups, Maybe bias, Maybe residual,
                       Maybe rq, Maybe rscale, Maybe rz, std::string activation, std::string last,
                       ScalarType dtype) {
  static const Signature& op = signature_of("int8_codes_conv");
  return *conv(op, best_tier().conv, ConvInput::codes, kFixedLimit,
               {q,       &scale,  nullptr, &zx,        w,      sw,    nullptr,
                nullptr, stride,  padding, dilation,   groups, bias,  residual,
                &rq,     &rscale, &rz,     activation, last,   &dtype})
              .y;
}

// Of int8_chain_conv and, where y is kept, of int8_fork_conv.
Convolved to_codes(const Signature& op, bool keeps_y, const Tensor& q, const Tensor& scale,
                   const Tensor& zx, const Tensor& w, const Tensor& sw, const Tensor& so,
                   const Tensor& zo, const Ints& stride, const Ints& padding, const Ints& dilation,
                   const int64_t& groups, const Maybe& bias, const Maybe& residual, const Maybe& rq,
                   const Maybe& rscale, const Maybe& rz, const std::string& activation,
                   const std::string& last, const ScalarType& dtype) {
  return conv(
      op, best_tier().conv, ConvInput::codes, kFixedLimit,
      {q,      &scale, nullptr,  &zx, w,       sw,  &so,        &zo,  stride, padding, dilation,
       groups, bias,   residual, &rq, &rscale, &rz, activation, last, &dtype, keeps_y});
}

std::tuple<Tensor, Tensor> int8_chain_conv(Tensor q, Tensor scale, Tensor zx, Tensor w, Tensor sw,
                                           Tensor so, Tensor zo, Ints stride, Ints padding,
                                           Ints dilation, int64_t groups, Maybe bias,
                                           Maybe residual, Maybe rq, Maybe rscale, Maybe rz,
                                           std::string activation, std::string last,
                                           ScalarType dtype) {
  static const Signature& op = signature_of("int8_chain_conv");
  const Convolved y = to_codes(op, false, q, scale, zx, w, sw, so, zo, stride, padding, dilation,
                               groups, bias, residual, rq, rscale, rz, activation, last, dtype);
  return {*y.codes, *y.scale};
}

std::tuple<Tensor, Tensor, Tensor> int8_fork_conv(Tensor q, Tensor scale, Tensor zx, Tensor w,
                                                  Tensor sw, Tensor so, Tensor zo, Ints stride,
                                                  Ints padding, Ints dilation, int64_t groups,
                                                  Maybe bias, Maybe residual, Maybe rq,
                                                  Maybe rscale, Maybe rz, std::string activation,
                                                  std::string last, ScalarType dtype) {
  static const Signature& op = signature_of("int8_fork_conv");
  const Convolved y = to_codes(op, true, q, scale, zx, w, sw, so, zo, stride, padding, dilation,
                               groups, bias, residual, rq, rscale, rz, activation, last, dtype);
  return {*y.y, *y.codes, *y.scale};
}

std::tuple<Tensor, Tensor> int8_static_quantize(Tensor x, Tensor sx, Tensor zx) {
  static const Signature& op = signature_of("int8_static_quantize");
  Arguments args(op, x, sx, zx);
  Conv p{};
  p.batch = x.size(0), p.channels = x.size(1);
  for (int axis = 0; axis < 3; ++axis) p.in[axis] = x.size(axis + 2);
  const bool last = is_channels_last(x) && !x.is_contiguous();
  const Tensor codes = args.empty(sizes_of(x), ScalarType::Byte, last);
  const Tensor scales = args.empty({p.batch, 1, 1, 1, 1}, ScalarType::Float);
  if (p.batch == 0) return {codes, scales};
  const float scale = *args.data<float>(sx);
  std::vector<int32_t> odd(p.batch);
  p.x = last ? args.channels_last(x) : args.data(x), p.x_dtype = float_format(x);
  p.grid_scale = usable(scale) ? scale : kNan, p.zero_point = *args.data<int8_t>(zx);
  p.odd = odd.data(), p.codes = static_cast<uint8_t*>(codes.data_ptr());
  constexpr int64_t kValues = 1 << 16;
  share(p.batch * p.sample() / kValues,
        [&](int part, int parts) { best_tier().conv.quantize(p, part, parts); });
  mark_odd(odd, scale, p.zero_point, p.sample(), p.codes, static_cast<float*>(scales.data_ptr()));
  return {codes, scales};
}

// For tests and benchmarks: `scheme`, int8, int16 or int8_weight, in its static form where sx is
// given; the tier is the named one, and the parts so many, 0 for as many as the work is worth.
Tensor cpu_conv(Tensor x, Tensor w, Tensor sw, Maybe sx, Maybe zx, Ints stride, Ints padding,
                Ints dilation, int64_t groups, Maybe bias, Maybe residual, std::string activation,
                std::string last, std::string scheme, std::string tier, int64_t parts) {
  const Tier& named = tier_called(tier);
  const bool fixed = sx.has_value(), weight = scheme == "int8_weight", wide = scheme == "int16";
  const ConvInput input = fixed    ? ConvInput::fixed
                          : weight ? ConvInput::floats
                                   : ConvInput::dynamic;
  const Signature& op = signature_of(scheme + (fixed ? "_static_conv" : "_conv"));
  const ConvKernel& kernel = weight ? named.conv_weight : wide ? named.conv_int16 : named.conv;
  return *conv(op, kernel, input,
               weight || wide ? kAny
               : fixed        ? kFixedLimit
                              : kLimit,
               {x,
                nullptr,
                fixed ? &*sx : nullptr,
                zx.has_value() ? &*zx : nullptr,
                w,
                sw,
                nullptr,
                nullptr,
                stride,
                padding,
                dilation,
                groups,
                bias,
                residual,
                nullptr,
                nullptr,
                nullptr,
                activation,
                last,
                nullptr},
               parts)
              .y;
}

[[maybe_unused]] const bool added = add_ops({
    {"int8_conv", TORCH_BOX(&int8_conv), true},
    {"int8_weight_conv", TORCH_BOX(&int8_weight_conv), true},
    {"int8_static_conv", TORCH_BOX(&int8_static_conv), true},
    {"int16_conv", TORCH_BOX(&int16_conv), true},
    {"int16_static_conv", TORCH_BOX(&int16_static_conv), true},
    {"int8_codes_conv", TORCH_BOX(&int8_codes_conv), true},
    {"int8_chain_conv", TORCH_BOX(&int8_chain_conv), true},
    {"int8_fork_conv", TORCH_BOX(&int8_fork_conv), true},
    {"int8_static_quantize", TORCH_BOX(&int8_static_quantize)},
});

}  // namespace
}  // namespace qnn

STABLE_TORCH_LIBRARY_FRAGMENT(qnn, m) {
  m.def(
      "cpu_conv(Tensor x, Tensor w, Tensor sw, Tensor? sx, Tensor? zx, int[] stride, int[] "
      "padding, int[] dilation, int groups, Tensor? bias, Tensor? residual, str activation, str "
      "last, str scheme, str tier, int parts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CPU, m) { m.impl("cpu_conv", TORCH_BOX(&qnn::cpu_conv)); }
