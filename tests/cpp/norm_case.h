// Norms whose result is quantised, for kernel_test.cpp.
#pragma once

namespace {

using qnn::Norm;
using qnn::NormKind;

struct NormCase {
  uint64_t seed = 0;
  int64_t m = 1, k = 1;
  NormKind kind{};
  float eps = 0;
  DType dtype{}, weight_dtype{}, bias_dtype{};
  bool fixed = false, gives_sum = false, gives_normed = false, at_end = false;
  float grid_scale = 0;
  int zero_point = 0, parts = 1;
  std::vector<double> x, residual, weight, bias;  // the last three: empty, or given

  std::string text() const {
    char line[400], grid[80] = "";
    if (fixed) std::snprintf(grid, sizeof grid, " on a grid of %g from %d", grid_scale, zero_point);
    std::snprintf(
        line, sizeof line,
        "%s norm of %s m=%lld k=%lld eps=%g residual=%s weight=%s bias=%s%s parts=%d, "
        "operands %s (repeat with 1 case and seed %llu)",
        qnn::kNorms[static_cast<int>(kind)], format_of(dtype).name, static_cast<long long>(m),
        static_cast<long long>(k), eps, residual.empty() ? "none" : "given",
        weight.empty() ? "none" : format_of(weight_dtype).name,
        bias.empty() ? "none" : format_of(bias_dtype).name, grid, parts,
        at_end ? "end at a page" : "begin at a page", static_cast<unsigned long long>(seed));
    return line;
  }
};

class NormDraw : Draw {
 public:
  using Draw::Draw;

  NormCase next(uint64_t seed) {
    NormCase c;
    c.seed = seed, c.m = between(1, 12), c.k = size(1100);
    c.kind = static_cast<NormKind>(between(0, 2));
    static const float kEps[] = {1e-5f, 1e-12f, 0};
    c.eps = kEps[between(0, 2)];
    c.dtype = static_cast<DType>(between(0, 2));
    c.weight_dtype = dtype(), c.bias_dtype = dtype();
    c.gives_sum = one_in(2), c.gives_normed = one_in(2), c.at_end = !one_in(3);
    c.parts = one_in(2) ? 1 : between(2, 5);
    if (one_in(2)) {
      Call drawn;
      grid(drawn);
      c.fixed = true, c.grid_scale = drawn.grid_scale, c.zero_point = drawn.zero_point;
    }
    c.x = values(c);
    if (one_in(2)) c.residual = values(c);
    if (!one_in(3)) c.weight = floats(c.k, format_of(c.weight_dtype));
    if (!one_in(3)) c.bias = floats(c.k, format_of(c.bias_dtype));
    return c;
  }

 private:
  // Rows far from zero, constant ones, and such as overflow.
  std::vector<double> values(const NormCase& c) {
    std::vector<double> all(c.m * c.k);
    for (int64_t i = 0; i < c.m; ++i) {
      const double middle = one_in(3) ? 50 * normal() : 0;
      const double spread = one_in(5) ? 0 : std::exp(one_in(4) ? 20 * normal() : normal());
      for (int64_t l = 0; l < c.k; ++l) all[i * c.k + l] = middle + spread * normal();
      if (one_in(10)) all[i * c.k + between(0, static_cast<int>(c.k) - 1)] = NAN;
      if (one_in(10)) all[i * c.k + between(0, static_cast<int>(c.k) - 1)] = -HUGE_VAL;
    }
    for (double& value : all) value = rounded(value, format_of(c.dtype));
    return all;
  }
};

// What a call gives, one after the other; NaN for what it does not give.
struct NormResults {
  std::vector<double> sum, y, scales, codes;
};

// As kernels/reference/norm.py says it, in plain loops.
class PlainNorm {
 public:
  explicit PlainNorm(const NormCase& c) : c_(c), row_(c.k) {}

  NormResults run() {
    NormResults all;
    for (int64_t i = 0; i < c_.m; ++i) {
      for (int64_t l = 0; l < c_.k; ++l) {
        float v = single(c_.x[i * c_.k + l]);
        if (!c_.residual.empty()) v = cast(v + single(c_.residual[i * c_.k + l]));
        row_[l] = v;
        all.sum.push_back(v);
      }
      norm();
      all.y.insert(all.y.end(), row_.begin(), row_.end());
      quantize(all);
    }
    return all;
  }

 private:
  static float single(double x) { return static_cast<float>(x); }
  float cast(float x) const { return single(rounded(x, format_of(c_.dtype))); }

  template <class Each>
  float sum(const Each& each) const {
    float parts[64] = {};
    for (int64_t l = 0; l < c_.k; ++l) parts[l % 64] = parts[l % 64] + each(row_[l]);
    for (int half = 32; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) parts[j] = parts[j] + parts[j + half];
    }
    return parts[0];
  }

  void norm() {
    const auto count = static_cast<float>(c_.k);
    if (c_.kind == NormKind::layer) {
      const float mean = sum([](float v) { return v; }) / count;
      for (float& v : row_) v = v - mean;
    }
    const float variance = sum([](float v) { return v * v; }) / count;
    const float by = 1.0f / std::sqrt(variance + c_.eps);
    for (int64_t l = 0; l < c_.k; ++l) {
      float v = row_[l] * by;
      if (c_.kind == NormKind::rms_rounded) v = cast(v);
      if (!c_.weight.empty()) v = v * single(c_.weight[l]);
      if (!c_.bias.empty()) v = v + single(c_.bias[l]);
      row_[l] = cast(v);
    }
  }

  void quantize(NormResults& all) const {
    float amax = 0;
    bool finite = true;
    for (const float v : row_) {
      finite = finite && std::isfinite(v);
      if (!(std::fabs(v) <= amax)) amax = std::fabs(v);
      if (std::isnan(amax)) break;
    }
    const float dynamic = amax == 0          ? 1
                          : std::isnan(amax) ? amax
                                             : std::max(amax / 127.0f, FLT_MIN);
    const float scale = !c_.fixed ? dynamic : finite ? c_.grid_scale : NAN;
    all.scales.push_back(scale);
    const auto zero = static_cast<float>(c_.fixed ? c_.zero_point : 0);
    const bool good = finite && std::isfinite(scale);
    const float inverse = 1.0f / scale, low = c_.fixed ? -128.0f : -127.0f;
    for (const float v : row_)
      all.codes.push_back(good ? std::clamp(std::nearbyint(v * inverse) + zero, low, 127.0f)
                               : zero);
  }

  const NormCase& c_;
  std::vector<float> row_;
};

NormResults run(const Tier& tier, const NormCase& c) {
  Operands operands(c.at_end);
  const Format& f = format_of(c.dtype);
  Norm p{};
  p.m = c.m, p.k = c.k, p.kind = c.kind, p.eps = c.eps, p.dtype = c.dtype;
  p.x = operands.place_floats(c.x, c.dtype);
  if (!c.residual.empty()) p.residual = operands.place_floats(c.residual, c.dtype);
  p.weight_dtype = c.weight_dtype, p.bias_dtype = c.bias_dtype;
  if (!c.weight.empty()) p.weight = operands.place_floats(c.weight, c.weight_dtype);
  if (!c.bias.empty()) p.bias = operands.place_floats(c.bias, c.bias_dtype);
  p.fixed = c.fixed, p.grid_scale = c.grid_scale, p.zero_point = c.zero_point;
  const int64_t count = c.m * c.k;
  const Memory sum(c.gives_sum ? count * f.bytes : 0, c.at_end, 0xff),
      y(c.gives_normed ? count * f.bytes : 0, c.at_end, 0xff), codes(count, c.at_end, 0x55),
      scales(c.m * sizeof(float), c.at_end, 0xff);
  if (c.gives_sum) p.sum = sum.data();
  if (c.gives_normed) p.y = y.data();
  p.codes = reinterpret_cast<int8_t*>(codes.data());
  p.scales = reinterpret_cast<float*>(scales.data());
  std::vector<std::unique_ptr<Memory>> scratches;
  std::vector<std::thread> threads;
  for (int part = 0; part < c.parts; ++part) {
    scratches.push_back(std::make_unique<Memory>(qnn::norm_bytes(p), c.at_end, 0xff));
    char* scratch = scratches.back()->data();
    threads.emplace_back([&tier, &p, &c, part, scratch] { tier.norm(p, part, c.parts, scratch); });
  }
  for (std::thread& thread : threads) thread.join();
  NormResults got;
  for (int64_t i = 0; i < count; ++i) {
    got.sum.push_back(c.gives_sum ? decode(sum.data() + i * f.bytes, f) : NAN);
    got.y.push_back(c.gives_normed ? decode(y.data() + i * f.bytes, f) : NAN);
    got.codes.push_back(p.codes[i]);
  }
  for (int64_t i = 0; i < c.m; ++i) got.scales.push_back(p.scales[i]);
  return got;
}

bool passes(const Tier& tier, const NormCase& c, const NormResults& want) {
  std::snprintf(running, sizeof running, "%s: %s", tier.name, c.text().c_str());
#if defined(QNN_HEAP)
  std::fprintf(stderr, "%s\n", running);
#endif
  const NormResults got = run(tier, c);
  const auto differs = [&](const char* name, const std::vector<double>& a,
                           const std::vector<double>& b) {
    for (size_t i = 0; i < a.size(); ++i) {
      const bool equal = a[i] == b[i] && std::signbit(a[i]) == std::signbit(b[i]);
      if (equal || (std::isnan(a[i]) && std::isnan(b[i]))) continue;
      std::printf("%s\n  %s[%zu] = %.17g, not %.17g\n", running, name, i, a[i], b[i]);
      return true;
    }
    return false;
  };
  return !((c.gives_sum && differs("sum", got.sum, want.sum)) ||
           (c.gives_normed && differs("y", got.y, want.y)) ||
           differs("scales", got.scales, want.scales) || differs("codes", got.codes, want.codes));
}

}  // namespace
