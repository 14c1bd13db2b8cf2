// The transposed convolutions of kernels/declare/conv.py on the CPU.
//
// Along an axis with stride s, every s-th value of y is the result of a plain convolution over x,
// with stride 1 and every s-th tap or fewer, from the last to the first. So a call is a plain one
// for each such phase of y, and each product is made once. Codes of x are made once too.
#include <cstring>
#include <numeric>

#include "ops/conv_call.h"

namespace qnn {
namespace {

struct TransposedArguments {
  const Tensor &x, &w, &sw;
  const Tensor *sx, *zx;
  const Ints &stride, &padding, &dilation;
  const int64_t& groups;
  const Maybe &bias, &residual;
  const std::string &activation, &last;
};

// The axes that are functions of others, and then `_rule`; the sizes of the call into p.
void require_rules(const Arguments& args, const TransposedArguments& a, int64_t limit, Conv& p) {
  const Ints image = sizes_of(a.x), w = sizes_of(a.w);
  p.batch = image[0], p.channels = image[1], p.outputs = w[1] * a.groups, p.groups = a.groups;
  args.require_axis(a.sw, 0, p.outputs, 1);
  if (a.bias.has_value()) args.require_axis(*a.bias, 0, p.outputs, 1);
  Ints out;
  for (int axis = 0; axis < 3; ++axis) {
    p.in[axis] = image[axis + 2], p.kernel[axis] = w[axis + 2];
    out.push_back((p.in[axis] - 1) * a.stride[axis] + a.dilation[axis] * (p.kernel[axis] - 1) + 1 -
                  a.padding[2 * axis] - a.padding[2 * axis + 1]);
    p.out[axis] = out.back();
  }
  if (a.residual.has_value()) {
    args.require_axis(*a.residual, 1, p.outputs, 1);
    for (int axis = 0; axis < 3; ++axis) args.require_axis(*a.residual, axis + 2, out[axis]);
  }
  require_geometry(args, a.stride, a.dilation, a.groups);
  const int64_t products = w[0] / a.groups * p.taps();
  require_products(args, image, w, a.groups, products, limit);
  require_result(args, image, w, a.stride, a.padding, a.dilation, out);
}

// The values of y along an axis that lie `stride` apart, and which taps they are made of.
struct Phase {
  int64_t begin, outputs;                  // of y
  int64_t taps, last_tap, step, dilation;  // the taps from `last_tap` on, each `step` before
  int64_t before;

  Phase(int64_t begin, int64_t size, int64_t stride, int64_t kernel, int64_t cut, int64_t wide)
      : begin(begin), outputs(div_up(size - begin, stride)), taps(0) {
    const int64_t divisor = std::gcd(stride, wide), at = begin + cut;
    step = stride / divisor, dilation = wide / divisor;
    int64_t first = 0;
    while (first < smaller(step, kernel) && (at - first * wide) % stride != 0) ++first;
    if (first < smaller(step, kernel)) taps = div_up(kernel - first, step);
    last_tap = first + (taps - 1) * step;
    before = (taps - 1) * dilation - (at - first * wide) / stride;
    // No tap: one of zeros, beyond the image.
    if (taps == 0) before = outputs;
  }
};

// The weight of a phase as that of a plain convolution, [outputs, taps…, depth].
void fill_weight(const Tensor& w, const Conv& p, const Phase* phase, int64_t first, int64_t end,
                 int8_t* to) {
  const int64_t depth = p.depth(), own = w.size(1);
  const int64_t taps = p.taps(), zeros = phase[0].taps * phase[1].taps * phase[2].taps;
  if (zeros == 0) {
    std::memset(to + first * depth * taps, 0, (end - first) * depth * taps);
    return;
  }
  Ints at;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t of_axis[] = {tap / (p.kernel[1] * p.kernel[2]), tap / p.kernel[2] % p.kernel[1],
                               tap % p.kernel[2]};
    at.push_back(0);
    for (int axis = 0; axis < 3; ++axis)
      at.back() += (phase[axis].last_tap - of_axis[axis] * phase[axis].step) * w.stride(axis + 2);
  }
  // Some outputs at a time, so that what is written stays in the first-level cache.
  constexpr int64_t kLines = 128;
  const auto* from = static_cast<const int8_t*>(w.data_ptr());
  for (int64_t n = first; n < end;) {
    const int64_t within = n % own,
                  some = smaller(smaller(end - n, own - within), larger(1, kLines / taps));
    const int8_t* c = from + n / own * depth * w.stride(0) + within * w.stride(1);
    for (int64_t i = 0; i < depth; ++i, c += w.stride(0)) {
      int8_t* mine = to + n * taps * depth + i;
      for (int64_t j = 0; j < some; ++j) {
        const int8_t* output = c + j * w.stride(1);
        for (const int64_t tap : at) *mine = output[tap], mine += depth;
      }
    }
    n += some;
  }
}

// Pieces of `size` bytes, side by side on the one side and `step` of them apart on the other.
template <bool kGather>
void spread(char* dense, char* wide, int64_t count, int64_t step, int64_t size) {
  const auto move = [&](auto each) {
    using Each = decltype(each);
    auto* near = reinterpret_cast<Each*>(dense);
    auto* far = reinterpret_cast<Each*>(wide);
    for (int64_t i = 0; i < count; ++i) {
      if (kGather) {
        near[i] = far[i * step];
      } else {
        far[i * step] = near[i];
      }
    }
  };
  if (size == 2) return move(int16_t{});
  if (size == 4) return move(int32_t{});
  for (int64_t i = 0; i < count; ++i, dense += size, wide += size * step) {
    if (kGather) {
      std::memcpy(dense, wide, size);
    } else {
      std::memcpy(wide, dense, size);
    }
  }
}

// A phase, between an image of its own and the whole one.
template <bool kGather>
void move_phase(const Conv& whole, const Conv& part, const Phase* phase, const Ints& stride,
                void* dense, void* all, int64_t element) {
  const int64_t images = whole.batch * (whole.y_last ? 1 : whole.outputs);
  const int64_t piece = element * (whole.y_last ? whole.outputs : 1);
  const int64_t rows = images * part.out[0] * part.out[1], row_bytes = part.out[2] * piece;
  constexpr int64_t kBytes = 1 << 18;
  share(rows * row_bytes / kBytes, [&](int share, int shares) {
    for (int64_t row = rows * share / shares; row < rows * (share + 1) / shares; ++row) {
      const int64_t z = row / part.out[1] % part.out[0], y = row % part.out[1];
      const int64_t image = row / (part.out[0] * part.out[1]);
      const int64_t of_whole =
          (image * whole.out[0] + phase[0].begin + z * stride[0]) * whole.out[1] + phase[1].begin +
          y * stride[1];
      spread<kGather>(static_cast<char*>(dense) + row * row_bytes,
                      static_cast<char*>(all) + (of_whole * whole.out[2] + phase[2].begin) * piece,
                      part.out[2], stride[2], piece);
    }
  });
}

// The codes of x and the scale of each sample: what `int8_codes_conv` takes.
void quantize(Arguments& args, const ConvKernel& kernel, const TransposedArguments& a, Conv& p,
              std::vector<Tensor>& held, std::vector<float>& scales) {
  held.push_back(args.empty(sizes_of(a.x), ScalarType::Byte, p.x_last));
  p.codes = static_cast<uint8_t*>(held.back().data_ptr());
  constexpr int64_t kValues = 1 << 16;
  const auto run = [&](const Conv& some) {
    share(some.batch * some.sample() / kValues,
          [&](int part, int parts) { kernel.quantize(some, part, parts); });
  };
  std::vector<int32_t> odd(p.batch);
  if (p.input == ConvInput::fixed) {
    const float sx = *args.data<float>(*a.sx);
    p.grid_scale = usable(sx) ? sx : kNan, p.odd = odd.data();
    run(p);
    mark_odd(odd, sx, p.zero_point, p.sample(), p.codes, scales.data());
  } else {
    const std::vector<int32_t> most = magnitudes(kernel, p);
    const int64_t size = p.sample(), bytes = size * a.x.element_size();
    Conv one = p;
    one.batch = 1, one.odd = odd.data();
    for (int64_t i = 0; i < p.batch; ++i, one.codes += size) {
      scales[i] = most[i] < kInfinite ? kernel.scale(most[i]) : kNan;
      one.x = static_cast<const char*>(p.x) + i * bytes, one.grid_scale = scales[i];
      if (std::isfinite(scales[i])) {
        run(one);
      } else {
        std::memset(one.codes, 128, size);
      }
    }
  }
  p.x = p.codes, p.codes = nullptr, p.input = ConvInput::codes;
}

Tensor conv_transpose(const Signature& op, const ConvKernel& kernel, ConvInput input, int64_t limit,
                      const TransposedArguments& a, int64_t parts = 0) {
  Arguments args(op, a.x, a.w, a.sw, a.sx, a.zx, a.stride, a.padding, a.dilation, a.groups, a.bias,
                 a.residual, a.activation, a.last);
  Conv p{};
  require_rules(args, a, limit, p);
  const ScalarType dtype = a.x.scalar_type();
  p.x_last = p.y_last = is_channels_last(a.x) && !a.x.is_contiguous();
  const auto image = [&](const Tensor& t) {
    return p.x_last ? args.channels_last(t) : args.data(t);
  };
  Tensor y = args.empty({p.batch, p.outputs, p.out[0], p.out[1], p.out[2]}, dtype, p.y_last);
  if (p.batch == 0) return y;
  p.y_dtype = p.x_dtype = float_format(dtype);
  p.input = input, p.x = image(a.x), p.sw = args.data<float>(a.sw);
  p.bias = args.data(a.bias);
  if (p.bias != nullptr) p.bias_dtype = float_format(*a.bias);
  p.activation = activation_called(a.activation), p.last_relu = a.last == "relu";
  p.residual = a.residual.has_value() ? image(*a.residual) : nullptr;
  p.y = y.data_ptr();
  if (a.zx != nullptr) p.zero_point = *args.data<int8_t>(*a.zx);
  std::vector<Tensor> held;
  std::vector<float> scales(p.batch);
  if (input != ConvInput::floats) p.sample_scale = scales.data();
  if (kernel.quantize != nullptr) {
    quantize(args, kernel, a, p, held, scales);
  } else if (input != ConvInput::floats) {
    const std::vector<int32_t> most = magnitudes(kernel, p);
    const float sx = a.sx == nullptr ? 0 : *args.data<float>(*a.sx);
    p.grid_scale = usable(sx) ? sx : kNan;
    for (int64_t i = 0; i < p.batch; ++i)
      scales[i] = most[i] >= kInfinite ? kNan
                  : a.sx == nullptr    ? kernel.scale(most[i])
                                       : p.grid_scale;
  }

  std::vector<Phase> of_axis[3];
  int64_t most_values = p.batch * p.outputs, most_taps = 1;
  for (int axis = 0; axis < 3; ++axis) {
    for (int64_t i = 0; i < smaller(a.stride[axis], p.out[axis]); ++i)
      of_axis[axis].emplace_back(i, p.out[axis], a.stride[axis], p.kernel[axis],
                                 a.padding[2 * axis], a.dilation[axis]);
    most_values *= of_axis[axis][0].outputs;
    most_taps *=
        div_up(p.kernel[axis], a.stride[axis] / std::gcd(a.stride[axis], a.dilation[axis]));
  }
  held.push_back(args.empty({p.outputs * p.depth() * most_taps}, ScalarType::Char));
  auto* const w = static_cast<int8_t*>(held.back().data_ptr());
  const bool whole = of_axis[0].size() * of_axis[1].size() * of_axis[2].size() == 1;
  void *piece = nullptr, *residual = nullptr;
  for (void** buffer : {&piece, &residual}) {
    if (whole || (buffer == &residual && p.residual == nullptr)) continue;
    held.push_back(args.empty({most_values}, dtype));
    *buffer = held.back().data_ptr();
  }
  for (const Phase& t : of_axis[0]) {
    for (const Phase& h : of_axis[1]) {
      for (const Phase& v : of_axis[2]) {
        const Phase phase[] = {t, h, v};
        Conv q = p;
        std::vector<int32_t> odd(p.batch);
        q.odd = odd.data(), q.w = w;
        for (int axis = 0; axis < 3; ++axis) {
          q.out[axis] = phase[axis].outputs, q.kernel[axis] = larger(1, phase[axis].taps);
          q.stride[axis] = 1, q.dilation[axis] = phase[axis].dilation;
          q.before[axis] = phase[axis].before;
        }
        constexpr int64_t kBytes = 1 << 16;
        share(q.outputs * q.depth() * q.taps() / kBytes, [&](int part, int all) {
          fill_weight(a.w, q, phase, q.outputs * part / all, q.outputs * (part + 1) / all, w);
        });
        if (!whole) q.y = piece, q.residual = residual;
        const auto element = static_cast<int64_t>(a.x.element_size());
        if (residual != nullptr)
          move_phase<true>(p, q, phase, a.stride, residual, const_cast<void*>(p.residual), element);
        run_in_parts(args, kernel, q, parts);
        if (!whole) move_phase<false>(p, q, phase, a.stride, piece, p.y, element);
      }
    }
  }
  return y;
}

// -- ops

Tensor int8_conv_transpose(Tensor x, Tensor w, Tensor sw, Ints stride, Ints padding, Ints dilation,
                           int64_t groups, Maybe bias, Maybe residual, std::string activation,
                           std::string last) {
  static const Signature& op = signature_of("int8_conv_transpose");
  return conv_transpose(op, best_tier().conv, ConvInput::dynamic, kLimit,
                        {x, w, sw, nullptr, nullptr, stride, padding, dilation, groups, bias,
                         residual, activation, last});
}

Tensor int8_weight_conv_transpose(Tensor x, Tensor w, Tensor sw, Ints stride, Ints padding,
                                  Ints dilation, int64_t groups, Maybe bias, Maybe residual,
                                  std::string activation, std::string last) {
  static const Signature& op = signature_of("int8_weight_conv_transpose");
  return conv_transpose(op, best_tier().conv_weight, ConvInput::floats, kAny,
                        {x, w, sw, nullptr, nullptr, stride, padding, dilation, groups, bias,
                         residual, activation, last});
}

Tensor int8_static_conv_transpose(Tensor x, Tensor w, Tensor sw, Tensor sx, Tensor zx, Ints stride,
                                  Ints padding, Ints dilation, int64_t groups, Maybe bias,
                                  Maybe residual, std::string activation, std::string last) {
  static const Signature& op = signature_of("int8_static_conv_transpose");
  return conv_transpose(
      op, best_tier().conv, ConvInput::fixed, kFixedLimit,
      {x, w, sw, &sx, &zx, stride, padding, dilation, groups, bias, residual, activation, last});
}

Tensor int16_conv_transpose(Tensor x, Tensor w, Tensor sw, Ints stride, Ints padding, Ints dilation,
                            int64_t groups, Maybe bias, Maybe residual, std::string activation,
                            std::string last) {
  static const Signature& op = signature_of("int16_conv_transpose");
  return conv_transpose(op, best_tier().conv_int16, ConvInput::dynamic, kAny,
                        {x, w, sw, nullptr, nullptr, stride, padding, dilation, groups, bias,
                         residual, activation, last});
}

Tensor int16_static_conv_transpose(Tensor x, Tensor w, Tensor sw, Tensor sx, Ints stride,
                                   Ints padding, Ints dilation, int64_t groups, Maybe bias,
                                   Maybe residual, std::string activation, std::string last) {
  static const Signature& op = signature_of("int16_static_conv_transpose");
  return conv_transpose(op, best_tier().conv_int16, ConvInput::fixed, kAny,
                        {x, w, sw, &sx, nullptr, stride, padding, dilation, groups, bias, residual,
                         activation, last});
}

// For tests and benchmarks: as `cpu_conv`.
Tensor cpu_conv_transpose(Tensor x, Tensor w, Tensor sw, Maybe sx, Maybe zx, Ints stride,
                          Ints padding, Ints dilation, int64_t groups, Maybe bias, Maybe residual,
                          std::string activation, std::string last, std::string scheme,
                          std::string tier, int64_t parts) {
  const Tier& named = tier_called(tier);
  const bool fixed = sx.has_value(), weight = scheme == "int8_weight", wide = scheme == "int16";
  const ConvInput input = fixed    ? ConvInput::fixed
                          : weight ? ConvInput::floats
                                   : ConvInput::dynamic;
  const Signature& op = signature_of(scheme + (fixed ? "_static" : "") + "_conv_transpose");
  const ConvKernel& kernel = weight ? named.conv_weight : wide ? named.conv_int16 : named.conv;
  const int64_t limit = weight || wide ? kAny : fixed ? kFixedLimit : kLimit;
  return conv_transpose(op, kernel, input, limit,
                        {x, w, sw, fixed ? &*sx : nullptr, zx.has_value() ? &*zx : nullptr, stride,
                         padding, dilation, groups, bias, residual, activation, last},
                        parts);
}

[[maybe_unused]] const bool added = add_ops({
    {"int8_conv_transpose", TORCH_BOX(&int8_conv_transpose), true},
    {"int8_weight_conv_transpose", TORCH_BOX(&int8_weight_conv_transpose), true},
    {"int8_static_conv_transpose", TORCH_BOX(&int8_static_conv_transpose), true},
    {"int16_conv_transpose", TORCH_BOX(&int16_conv_transpose), true},
    {"int16_static_conv_transpose", TORCH_BOX(&int16_static_conv_transpose), true},
});

}  // namespace
}  // namespace qnn

STABLE_TORCH_LIBRARY_FRAGMENT(qnn, m) {
  m.def(
      "cpu_conv_transpose(Tensor x, Tensor w, Tensor sw, Tensor? sx, Tensor? zx, int[] stride, "
      "int[] padding, int[] dilation, int groups, Tensor? bias, Tensor? residual, str activation, "
      "str last, str scheme, str tier, int parts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qnn, CPU, m) {
  m.impl("cpu_conv_transpose", TORCH_BOX(&qnn::cpu_conv_transpose));
}
