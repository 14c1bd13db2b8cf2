// Random calls of the convolution kernels against plain loops, for kernel_test.cpp, which includes
// this behind its formats and its memory. Where sums are integers, and the activation is exact, the
// results are equal to the bit.
#pragma once

namespace {

using qnn::Conv;
using qnn::ConvInput;

struct ConvCase {
  uint64_t seed = 0;
  Conv p{};                           // sizes, formats and grids; the operands are below
  bool at_end = false, wide = false;  // codes of 16 bits
  int parts = 1;
  bool gives_y = true, gives_codes = false;
  std::vector<double> x, bias, residual;
  std::vector<uint8_t> codes, residual_codes;
  std::vector<int8_t> w;
  std::vector<float> sw, scales, residual_scales;

  std::string text() const {
    static const char* const kInputs[] = {"int8", "int8_static", "codes", "int8_weight"};
    const auto three = [](const int64_t* v) {
      return std::to_string(v[0]) + "x" + std::to_string(v[1]) + "x" + std::to_string(v[2]);
    };
    return std::string(wide ? "wide " : "") + kInputs[static_cast<int>(p.input)] +
           " conv b=" + std::to_string(p.batch) + " c=" + std::to_string(p.channels) +
           " n=" + std::to_string(p.outputs) + " groups=" + std::to_string(p.groups) + " image " +
           three(p.in) + " to " + three(p.out) + " kernel " + three(p.kernel) + " stride " +
           three(p.stride) + " dilation " + three(p.dilation) + " padding " + three(p.before) +
           " from " + std::to_string(p.zero_point) + (p.x_last ? " x last" : " x first") +
           (p.y_last ? " y last" : " y first") + " x=" + format_of(p.x_dtype).name +
           " bias=" + (bias.empty() ? "none" : format_of(p.bias_dtype).name) +
           " y=" + (gives_codes ? gives_y ? "codes and " : "codes of " : "") +
           format_of(p.y_dtype).name + (residual.empty() ? "" : " residual") +
           (residual_codes.empty() ? "" : " residual codes") + " activation " +
           qnn::kActivations[static_cast<int>(p.activation)] + (p.last_relu ? ", relu" : "") +
           " parts=" + std::to_string(parts) +
           (at_end ? ", operands end at a page" : ", operands begin at a page") +
           " (repeat with kind conv, 1 case and seed " + std::to_string(seed) + ")";
  }
};

class ConvDraw {
 public:
  explicit ConvDraw(uint64_t seed) : random_(seed) {}

  ConvCase next(uint64_t seed) {
    ConvCase c;
    Conv& p = c.p;
    c.seed = seed;
    do {
      sizes(p);
    } while (p.out[0] < 1 || p.out[1] < 1 || p.out[2] < 1 ||
             p.pixels() * p.outputs * p.depth() * p.taps() > 3'000'000);
    p.input = static_cast<ConvInput>(between(0, 3));
    p.x_last = one_in(2), p.y_last = one_in(8) ? one_in(2) : p.x_last;
    c.at_end = !one_in(3), c.parts = one_in(2) ? 1 : between(2, 5);
    p.x_dtype = dtype(), p.y_dtype = p.input == ConvInput::codes ? dtype() : p.x_dtype;
    p.bias_dtype = dtype();
    p.activation = one_in(3) ? Activation::none : static_cast<Activation>(between(1, 7));
    p.last_relu = one_in(4);
    if (p.input == ConvInput::fixed || p.input == ConvInput::codes)
      p.zero_point = one_in(3) ? (one_in(2) ? -128 : 127) : between(-128, 127);
    c.wide = (p.input == ConvInput::dynamic || p.input == ConvInput::fixed) && one_in(2);
    if (c.wide) p.zero_point = 0;
    p.grid_scale = one_in(20) ? NAN : 0.01f + 0.1f * static_cast<float>(unit());
    if (c.wide) p.grid_scale /= 256;
    values(c);
    weight(c);
    if (!one_in(3)) c.bias = floats(p.outputs, p.bias_dtype);
    const int64_t results = p.pixels() * p.outputs;
    if (one_in(3)) c.residual = floats(results, p.y_dtype);
    if (p.input == ConvInput::codes) {
      if (one_in(3)) {
        c.residual_codes = bytes(results);
        p.residual_zero_point = between(-128, 127);
        for (int64_t i = 0; i < p.batch; ++i)
          c.residual_scales.push_back(one_in(20) ? NAN : 0.05f * static_cast<float>(unit()));
      }
      c.gives_codes = one_in(2), c.gives_y = !c.gives_codes || one_in(2);
      p.y_inverse = 1 / (0.02f + static_cast<float>(unit()));
      p.y_zero_point = between(-128, 127);
    }
    return c;
  }

 private:
  int between(int first, int last) {
    return std::uniform_int_distribution<int>(first, last)(random_);
  }
  bool one_in(int n) { return between(1, n) == 1; }
  DType dtype() { return static_cast<DType>(between(0, 3)); }
  double unit() { return std::uniform_real_distribution<double>(0, 1)(random_); }

  int64_t channels(int most) {
    return one_in(2) ? between(1, std::min(most, 9)) : between(1, most);
  }

  void sizes(Conv& p) {
    p.batch = one_in(2) ? 1 : between(1, 4);
    if (one_in(4)) {
      p.channels = p.outputs = p.groups = channels(130);
    } else {
      p.groups = one_in(3) ? between(2, 4) : 1;
      const int most = 130 / static_cast<int>(p.groups);
      p.channels = p.groups * channels(most), p.outputs = p.groups * channels(most);
    }
    const int axes = one_in(4) ? 3 : one_in(3) ? 1 : 2;
    for (int axis = 0; axis < 3; ++axis) {
      p.in[axis] = p.kernel[axis] = p.stride[axis] = p.dilation[axis] = 1;
      p.before[axis] = 0;
      int64_t after = 0;
      if (axis >= 3 - axes) {
        p.in[axis] = one_in(3) ? between(1, 8) : between(1, axes == 1 ? 300 : 30);
        p.kernel[axis] = one_in(3) ? 1 : between(1, 7);
        p.stride[axis] = one_in(2) ? 1 : between(1, 4);
        p.dilation[axis] = one_in(2) ? 1 : between(1, 3);
        p.before[axis] = one_in(3) ? 0 : between(-3, 7), after = one_in(3) ? 0 : between(0, 7);
      }
      const int64_t whole =
          p.in[axis] + p.before[axis] + after - (p.kernel[axis] - 1) * p.dilation[axis] - 1;
      p.out[axis] = whole < 0 ? 0 : whole / p.stride[axis] + 1;
    }
  }

  std::vector<double> floats(int64_t count, DType of) {
    std::vector<double> all(count);
    for (double& v : all)
      v = rounded(std::normal_distribution<double>()(random_) * 3, format_of(of));
    if (one_in(12)) all[between(0, static_cast<int>(count) - 1)] = one_in(2) ? NAN : HUGE_VAL;
    return all;
  }

  std::vector<uint8_t> bytes(int64_t count) {
    std::vector<uint8_t> all(count);
    const bool extreme = one_in(6);
    for (uint8_t& v : all) v = extreme ? 255 * between(0, 1) : between(0, 255);
    return all;
  }

  void values(ConvCase& c) {
    const Conv& p = c.p;
    const int64_t count = p.batch * p.sample();
    if (p.input == ConvInput::codes) {
      c.codes = bytes(count);
      for (int64_t i = 0; i < p.batch; ++i) c.scales.push_back(one_in(20) ? NAN : p.grid_scale);
      return;
    }
    c.x.resize(count);
    for (int64_t i = 0; i < p.batch; ++i) {
      const int kind = between(0, 12);
      const double scale = kind == 0 ? 0 : kind == 1 ? 1e30 : kind == 2 ? 1e-39 : 1 + 5 * unit();
      for (int64_t j = 0; j < p.sample(); ++j)
        c.x[i * p.sample() + j] = std::normal_distribution<double>()(random_) * scale;
      double& one = c.x[i * p.sample() + between(0, static_cast<int>(p.sample()) - 1)];
      if (kind == 3) one = one_in(2) ? NAN : -HUGE_VAL;
    }
    for (double& v : c.x) v = rounded(v, format_of(p.x_dtype));
  }

  void weight(ConvCase& c) {
    const int64_t window = c.p.depth() * c.p.taps();
    c.w.resize(c.p.outputs * window), c.sw.resize(c.p.outputs);
    for (int64_t j = 0; j < c.p.outputs; ++j) {
      const int kind = between(0, 9);
      for (int64_t l = 0; l < window; ++l)
        c.w[j * window + l] = static_cast<int8_t>(kind == 0   ? -128
                                                  : kind == 1 ? 127
                                                              : between(-128, 127));
      c.sw[j] = static_cast<float>((0.1 + unit()) * 0.05 / std::sqrt(window + 1.0));
    }
  }

  std::mt19937_64 random_;
};

// -- plain loops ----------------------------------------------------------------------------------

class PlainConv {
 public:
  explicit PlainConv(const ConvCase& c) : c_(c), p_(c.p) {
    for (int64_t i = 0; i < p_.batch; ++i) scales_.push_back(quantized(i));
    odd_.assign(p_.batch, false);
  }

  // y, in its memory; of codes the values of which they are made first decide about NaN.
  std::vector<Bounds> run() {
    std::vector<Bounds> want(p_.pixels() * p_.outputs);
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t z = 0; z < p_.out[0]; ++z) {
        for (int64_t y = 0; y < p_.out[1]; ++y) {
          for (int64_t x = 0; x < p_.out[2]; ++x) {
            for (int64_t n = 0; n < p_.outputs; ++n) {
              const int64_t at = place(p_.y_last, b, n, z, y, x, p_.outputs, p_.out);
              want[at] = value(b, n, {z, y, x}, at);
              odd_[b] = odd_[b] || !std::isfinite(static_cast<float>(want[at].low));
            }
          }
        }
      }
    }
    return want;
  }
  bool odd(int64_t sample) const { return odd_[sample]; }
  bool input_odd(int64_t sample) const { return std::isnan(scales_[sample]); }

 private:
  static int64_t place(bool last, int64_t b, int64_t c, int64_t z, int64_t y, int64_t x,
                       int64_t channels, const int64_t* size) {
    return last ? (((b * size[0] + z) * size[1] + y) * size[2] + x) * channels + c
                : (((b * channels + c) * size[0] + z) * size[1] + y) * size[2] + x;
  }

  // The scale of a sample; the codes of all of x, less the zero point, or its floats.
  float quantized(int64_t sample) {
    const int64_t size = p_.sample(), from = sample * size;
    values_.resize(p_.batch * size);
    double* to = values_.data() + from;
    float scale = p_.grid_scale, amax = 0;
    bool finite = true;
    if (p_.input == ConvInput::codes) {
      for (int64_t i = 0; i < size; ++i) to[i] = c_.codes[from + i] - 128 - p_.zero_point;
      return c_.scales[sample];
    }
    for (int64_t i = 0; i < size; ++i) {
      const auto v = static_cast<float>(c_.x[from + i]);
      finite = finite && std::isfinite(v);
      amax = std::max(amax, std::fabs(v));
      to[i] = v;
    }
    if (p_.input == ConvInput::floats) return 1;
    const bool dynamic = p_.input == ConvInput::dynamic;
    const float most = c_.wide ? 32767 : 127;
    if (dynamic) scale = amax == 0 ? 1 : std::max(amax / most, FLT_MIN);
    if (!finite || std::isnan(scale)) scale = NAN;
    const float inverse = 1 / scale;
    for (int64_t i = 0; i < size; ++i) {
      const float low = dynamic || c_.wide ? -most : -128 - p_.zero_point,
                  high = dynamic || c_.wide ? most : 127 - p_.zero_point;
      to[i] = std::isnan(scale)
                  ? 0
                  : std::nearbyint(std::clamp(static_cast<float>(to[i]) * inverse, low, high));
    }
    return scale;
  }

  Bounds value(int64_t b, int64_t n, const std::vector<int64_t>& o, int64_t at) const {
    const int64_t group = n / (p_.outputs / p_.groups), depth = p_.depth();
    const int8_t* w = c_.w.data() + n * p_.taps() * depth;
    double sum = 0, magnitude = 0;
    int64_t whole = 0;
    for (int64_t tap = 0; tap < p_.taps(); ++tap) {
      const int64_t k[3] = {tap / (p_.kernel[1] * p_.kernel[2]), tap / p_.kernel[2] % p_.kernel[1],
                            tap % p_.kernel[2]};
      int64_t i[3];
      bool inside = true;
      for (int axis = 0; axis < 3; ++axis) {
        i[axis] = o[axis] * p_.stride[axis] - p_.before[axis] + k[axis] * p_.dilation[axis];
        inside = inside && i[axis] >= 0 && i[axis] < p_.in[axis];
      }
      for (int64_t c = 0; inside && c < depth; ++c) {
        const double v = values_[place(p_.x_last, b, group * depth + c, i[0], i[1], i[2],
                                       p_.channels, p_.in)],
                     product = v * w[tap * depth + c];
        if (p_.input != ConvInput::floats) whole += static_cast<int64_t>(product);
        sum += product;
        if (std::isfinite(product)) magnitude += std::fabs(product);
      }
    }
    const Format& f = format_of(p_.y_dtype);
    const auto single = [](double x) { return static_cast<float>(x); };
    Bounds y{single(static_cast<double>(whole)), single(static_cast<double>(whole))};
    if (p_.input == ConvInput::floats) {
      const double error = static_cast<double>(depth * p_.taps() + 1) *
                           (std::ldexp(magnitude, -24) + std::ldexp(1, -150));
      y = {single(sum - error), single(sum + error), magnitude > FLT_MAX / 4};
    }
    y.apply([&](double v) { return single(v) * c_.sw[n]; });
    if (p_.input != ConvInput::floats) y.apply([&](double v) { return single(v) * scales_[b]; });
    if (!c_.bias.empty()) y.apply([&](double v) { return single(v) + single(c_.bias[n]); });
    y.apply([&](double v) { return rounded(v, f); });
    activate(y, p_.activation, f);
    if (!c_.residual.empty() || !c_.residual_codes.empty()) {
      double more = c_.residual.empty() ? 0 : c_.residual[at];
      if (!c_.residual_codes.empty()) {
        const float other =
            static_cast<float>(c_.residual_codes[at] - 128 - p_.residual_zero_point) *
            c_.residual_scales[b];
        const double cast = rounded(other, f);
        more = c_.residual.empty() ? cast
               : f.bytes == 8      ? more + cast
                                   : rounded(single(more) + single(cast), f);
      }
      y.apply(
          [&](double v) { return f.bytes == 8 ? v + more : rounded(single(v) + single(more), f); });
    }
    if (p_.last_relu) y.apply([](double v) { return v < 0 ? 0 : v; });
    return y;
  }

  const ConvCase& c_;
  const Conv& p_;
  std::vector<float> scales_;
  std::vector<double> values_;
  std::vector<bool> odd_;
};

double conv_code(const Conv& p, double value) {
  const float low = -128 - p.y_zero_point, high = 127 - p.y_zero_point;
  const float v = std::clamp(static_cast<float>(value) * p.y_inverse, low, high);
  return std::nearbyint(v) + p.y_zero_point + 128;
}

// -- running --------------------------------------------------------------------------------------

// The flags of the samples.
std::vector<int32_t> run_conv(const Tier& tier, const ConvCase& c, char* y, char* codes) {
  std::vector<std::unique_ptr<Memory>> operands;
  const auto place = [&](const void* data, size_t bytes) -> const void* {
    operands.push_back(std::make_unique<Memory>(bytes, c.at_end, 0xff));
    if (bytes > 0) std::memcpy(operands.back()->data(), data, bytes);
    operands.back()->make_read_only();
    return operands.back()->data();
  };
  const auto floats = [&](const std::vector<double>& values, DType dtype) -> const void* {
    if (values.empty()) return nullptr;
    const Format& f = format_of(dtype);
    std::vector<char> bytes(values.size() * f.bytes);
    for (size_t i = 0; i < values.size(); ++i) encode(values[i], f, bytes.data() + i * f.bytes);
    return place(bytes.data(), bytes.size());
  };
  const auto raw = [&](const auto& values) {
    using Value = typename std::decay_t<decltype(values)>::value_type;
    return values.empty()
               ? nullptr
               : static_cast<const Value*>(place(values.data(), values.size() * sizeof(Value)));
  };
  Conv p = c.p;
  std::vector<int32_t> odd(p.batch);
  std::vector<float> scales(p.batch);
  p.x = p.input == ConvInput::codes ? raw(c.codes) : floats(c.x, p.x_dtype);
  p.sample_scale = raw(c.scales), p.odd = odd.data();
  p.w = raw(c.w), p.sw = raw(c.sw), p.bias = floats(c.bias, p.bias_dtype);
  p.residual = floats(c.residual, p.y_dtype), p.residual_codes = raw(c.residual_codes);
  p.residual_scale = raw(c.residual_scales);
  p.y = c.gives_y ? y : nullptr;
  p.codes = c.gives_codes ? reinterpret_cast<uint8_t*>(codes) : nullptr;
  if (const char* why = qnn::why_not(p)) {
    std::printf("%s\n  not a call: %s\n", running, why);
    std::exit(1);
  }
  const qnn::ConvKernel& kernel = p.input == ConvInput::floats ? tier.conv_weight
                                  : c.wide                     ? tier.conv_int16
                                                               : tier.conv;
  const auto all_parts = [&](const auto& work) {
    std::vector<std::thread> threads;
    for (int part = 1; part < c.parts; ++part) threads.emplace_back([&work, part] { work(part); });
    work(0);
    for (std::thread& thread : threads) thread.join();
  };
  if (p.input == ConvInput::dynamic) {
    std::vector<int32_t> most(p.batch * c.parts);
    all_parts([&](int part) { kernel.magnitudes(p, part, c.parts, &most[part * p.batch]); });
    for (int64_t i = 0; i < p.batch; ++i) {
      int32_t top = 0;
      for (int part = 0; part < c.parts; ++part) top = std::max(top, most[part * p.batch + i]);
      scales[i] = kernel.scale(top);
    }
    p.sample_scale = scales.data();
  }
  const size_t bytes = kernel.scratch_bytes(p, c.parts);
  std::vector<std::unique_ptr<Memory>> scratch;
  for (int part = 0; part < c.parts; ++part)
    scratch.push_back(std::make_unique<Memory>(bytes, c.at_end, 0xff));
  all_parts([&](int part) { kernel.run(p, part, c.parts, scratch[part]->data()); });
  return odd;
}

bool passes(const Tier& tier, const ConvCase& c) {
  const Conv& p = c.p;
  const Format& f = format_of(p.y_dtype);
  std::snprintf(running, sizeof running, "%s: %s", tier.name, c.text().c_str());
#if defined(QNN_HEAP)
  std::fprintf(stderr, "%s\n", running);
#endif
  PlainConv plain(c);
  const std::vector<Bounds> want = plain.run();
  const Memory y(c.gives_y ? want.size() * f.bytes : 0, c.at_end, 0xff),
      codes(c.gives_codes ? want.size() : 0, c.at_end, 0xff);
  const std::vector<int32_t> odd = run_conv(tier, c, y.data(), codes.data());
  const size_t of_sample = want.size() / p.batch;
  size_t wrong = 0;
  const auto is_wrong = [&](size_t i, double got, double low, double high) {
    if (wrong++ == 0)
      std::printf("%s\n  value %zu = %.17g, not from %.17g to %.17g\n", running, i, got, low, high);
  };
  for (size_t i = 0; i < want.size(); ++i) {
    const int64_t sample = i / of_sample;
    if (c.gives_codes && !plain.odd(sample)) {
      const double got = static_cast<uint8_t>(codes.data()[i]), low = conv_code(p, want[i].low),
                   high = conv_code(p, want[i].high);
      if (!want[i].any && !(low <= got && got <= high)) is_wrong(i, got, low, high);
    }
    if (!c.gives_y) continue;
    // Where NaN or inf is found on the way, the caller runs again with NaN for a scale.
    if (p.input == ConvInput::fixed && odd[sample] != 0 && plain.input_odd(sample)) continue;
    const double got = decode(y.data() + i * f.bytes, f);
    if (p.input == ConvInput::fixed && plain.input_odd(sample) && !std::isnan(p.grid_scale))
      continue;
    if (!holds(want[i], got)) is_wrong(i, got, want[i].low, want[i].high);
  }
  for (int64_t i = 0; c.gives_codes && i < p.batch; ++i) {
    if ((odd[i] != 0) != plain.odd(i)) is_wrong(i, odd[i], plain.odd(i), plain.odd(i));
  }
  if (wrong > 0) std::printf("  %zu of %zu values are wrong\n", wrong, want.size());
  return wrong == 0;
}

}  // namespace
