// Random calls of the recurrent kernels against plain loops, for kernel_test.cpp, which includes
// this behind its formats and its memory. Where sums are integers the results are equal to the bit.
#pragma once

namespace {

using qnn::Cell;
using qnn::Recurrent;
using qnn::Scheme;

struct RecurrentCase {
  uint64_t seed = 0;
  Cell cell{};
  Scheme scheme{};
  bool wide = false;  // 16 bits for what enters a product
  bool projected = false, reverse = false, at_end = false, with_lengths = false;
  int parts = 1;
  int64_t steps = 0, batch = 0, inputs = 0, hidden = 0, outputs = 0;
  DType dtype{}, b_ih_dtype{}, b_hh_dtype{};
  std::vector<double> x, h0, c0, b_ih, b_hh;
  std::vector<int8_t> w_ih, w_hh, w_hr;
  std::vector<float> sw_ih, sw_hh, sw_hr, table;
  std::vector<int64_t> lengths;

  int64_t gates() const { return cell == Cell::lstm ? 4 : 3; }
  int64_t table_parts() const { return cell == Cell::lstm ? 17 : 11; }

  std::string text() const {
    static const char* const kSchemes[] = {"int8", "int8_static", "int8_weight", "int16",
                                           "int16_static"};
    char line[400];
    std::snprintf(
        line, sizeof line,
        "%s %s T=%lld B=%lld I=%lld H=%lld P=%lld%s %s%s x=%s biases %s %s parts=%d, "
        "operands %s (repeat with 1 case and seed %llu)",
        kSchemes[static_cast<int>(scheme) + (wide ? 3 : 0)], cell == Cell::lstm ? "lstm" : "gru",
        static_cast<long long>(steps), static_cast<long long>(batch),
        static_cast<long long>(inputs), static_cast<long long>(hidden),
        static_cast<long long>(outputs), projected ? " projected" : "",
        reverse ? "reverse" : "forward", with_lengths ? " with lengths" : "", format_of(dtype).name,
        b_ih.empty() ? "none" : format_of(b_ih_dtype).name,
        b_hh.empty() ? "none" : format_of(b_hh_dtype).name, parts,
        at_end ? "end at a page" : "begin at a page", static_cast<unsigned long long>(seed));
    return line;
  }
};

class RecurrentDraw {
 public:
  explicit RecurrentDraw(uint64_t seed) : random_(seed) {}

  RecurrentCase next(uint64_t seed) {
    RecurrentCase c;
    c.seed = seed;
    c.cell = one_in(2) ? Cell::lstm : Cell::gru;
    c.scheme = static_cast<Scheme>(between(0, 4) % 3);
    c.wide = c.scheme != Scheme::weight && one_in(2);
    c.projected = c.cell == Cell::lstm && one_in(3);
    c.reverse = one_in(2), c.at_end = !one_in(3);
    c.parts = between(1, 4);
    c.steps = one_in(3) ? 1 : between(0, 5);
    c.batch = one_in(2) ? between(1, 9) : between(1, 40);
    c.inputs = one_in(30) ? 0 : size(), c.hidden = size();
    c.outputs = c.projected ? size() : c.hidden;
    while (c.steps * c.batch * c.gates() * c.hidden * (c.inputs + c.outputs) > 4'000'000) {
      c.batch = c.batch / 2 + 1, c.hidden = c.hidden / 2 + 1;
      if (!c.projected) c.outputs = c.hidden;
    }
    c.dtype = dtype(), c.b_ih_dtype = dtype(), c.b_hh_dtype = dtype();
    const int64_t rows = c.gates() * c.hidden;
    const bool odd = c.scheme != Scheme::weight && one_in(3);
    c.x = floats(c.steps * c.batch * c.inputs, c.dtype, odd);
    c.h0 = floats(c.batch * c.outputs, c.dtype, odd);
    if (c.cell == Cell::lstm) c.c0 = floats(c.batch * c.hidden, c.dtype, odd);
    if (!one_in(3)) c.b_ih = floats(rows, c.b_ih_dtype, false);
    if (!one_in(3)) c.b_hh = floats(rows, c.b_hh_dtype, false);
    weight(c.w_ih, c.sw_ih, rows, c.inputs);
    weight(c.w_hh, c.sw_hh, rows, c.outputs);
    if (c.projected) weight(c.w_hr, c.sw_hr, c.outputs, c.hidden);
    c.with_lengths = one_in(3);
    if (c.with_lengths) {
      for (int64_t b = 0; b < c.batch; ++b)
        c.lengths.push_back(between(0, static_cast<int>(c.steps)));
    }
    if (c.scheme == Scheme::fixed) {
      for (int64_t part = 0; part < c.table_parts(); ++part) {
        const bool enters = part < 2 || part == 16;
        enters&& c.wide && !one_in(3) ? wide_grid(c.table) : grid(c.table, enters);
      }
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

  int64_t size() {
    static const int kBlocks[] = {4, 8, 16, 64, 128};
    return one_in(2) ? between(1, 20)
                     : std::max(1, between(1, 2) * kBlocks[between(0, 4)] + between(-1, 1));
  }

  std::vector<double> floats(int64_t count, DType of, bool odd) {
    static const double kOdd[] = {NAN, HUGE_VAL, 1e300, 1e-45, 0};
    std::vector<double> values(count);
    for (double& v : values) {
      v = odd && one_in(200) ? kOdd[between(0, 4)] : std::normal_distribution<double>()(random_);
      v = rounded(v, format_of(of));
    }
    return values;
  }

  void weight(std::vector<int8_t>& w, std::vector<float>& sw, int64_t n, int64_t k) {
    w.resize(n * k), sw.resize(n);
    for (int64_t j = 0; j < n; ++j) {
      const int kind = between(0, 20);
      for (int64_t l = 0; l < k; ++l)
        w[j * k + l] = static_cast<int8_t>(kind == 0 ? -128 : kind == 1 ? 127 : between(-128, 127));
      sw[j] = static_cast<float>((0.1 + unit()) * 0.03 / std::sqrt(k + 1.0));
    }
  }

  void wide_grid(std::vector<float>& table) {
    for (const double v : {(0.2 + unit()) / 16384, 0.0, -32767.0, 32767.0})
      table.push_back(static_cast<float>(v));
  }

  void grid(std::vector<float>& table, bool enters) {
    const bool eight = enters || one_in(2), symmetric = one_in(2);
    const double most = eight ? 255 : 65535, low = symmetric || !eight ? -(most - 1) / 2 - 0.5 : 0;
    const double qmin = std::ceil(low), qmax = qmin + most - (symmetric ? 1 : 0);
    const double zero_point = symmetric ? 0 : std::floor(qmin + unit() * (most + 1));
    const double scale = !enters && one_in(6) ? 0 : (0.2 + unit()) * 4 / most;
    for (const double v : {scale, std::min(zero_point, qmax), qmin, qmax})
      table.push_back(static_cast<float>(v));
  }

  std::mt19937_64 random_;
};

// -- plain loops ----------------------------------------------------------------------------------

float plain_tanh(float x) {
  const float c = x < -8 ? -8 : x > 8 ? 8 : x, z = c * c;
  static const float kP[] = {1.0f,
                             0.13124364614486694f,
                             0.0031493804417550564f,
                             1.1642605386441574e-05f,
                             -2.2315303070513437e-08f,
                             6.365833618762423e-11f,
                             -1.1565058922756906e-13f};
  static const float kQ[] = {1.0f, 0.46457695960998535f, 0.02467506378889084f,
                             0.00026129968464374542f};
  float p = kP[6], q = kQ[3];
  for (int i = 5; i >= 0; --i) p = p * z + kP[i];
  for (int i = 2; i >= 0; --i) q = q * z + kQ[i];
  return c * p / q;
}

float plain_sigmoid(float x) { return plain_tanh(x * 0.5f) * 0.5f + 0.5f; }

float code_on(const float* row, float v) {
  const float low = row[2] - row[1], high = row[3] - row[1];
  float q = v * (1 / row[0]);
  q = q < low ? low : q;
  q = q > high ? high : q;
  return std::nearbyint(q);
}

class PlainRecurrent {
 public:
  explicit PlainRecurrent(const RecurrentCase& c) : c_(c) {}

  // y, h_n, c_n.
  std::vector<double> run() {
    const int64_t states = c_.cell == Cell::lstm ? 2 : 1, gates = c_.gates();
    const int64_t in = 1 + states, hid = in + gates, act = hid + gates;
    std::vector<float> h = entering(c_.h0, 1), cell = entering(c_.c0, 2);
    std::vector<double> result(c_.steps * c_.batch * c_.outputs);
    for (int64_t i = 0; i < c_.steps; ++i) {
      const int64_t t = c_.reverse ? c_.steps - 1 - i : i;
      for (int64_t b = 0; b < c_.batch; ++b) {
        if (c_.with_lengths && t >= c_.lengths[b]) continue;
        const double* row = c_.x.data() + (t * c_.batch + b) * c_.inputs;
        const std::vector<double> x(row, row + c_.inputs),
            state(h.begin() + b * c_.outputs, h.begin() + (b + 1) * c_.outputs);
        const std::vector<float> of_x = linear(x, 0, c_.w_ih, c_.sw_ih, c_.b_ih),
                                 of_h = linear(state, 1, c_.w_hh, c_.sw_hh, c_.b_hh);
        std::vector<double> out(c_.hidden);
        for (int64_t u = 0; u < c_.hidden; ++u) {
          const auto gx = [&](int64_t g) { return on(in + g, of_x[g * c_.hidden + u]); };
          const auto gh = [&](int64_t g) { return on(hid + g, of_h[g * c_.hidden + u]); };
          if (c_.cell == Cell::lstm) {
            const float i_gate = on(act, plain_sigmoid(gx(0) + gh(0))),
                        f = on(act + 1, plain_sigmoid(gx(1) + gh(1))),
                        g = on(act + 2, plain_tanh(gx(2) + gh(2))),
                        o = on(act + 3, plain_sigmoid(gx(3) + gh(3)));
            float& at = cell[b * c_.hidden + u];
            at = on(2, f * at + i_gate * g);
            out[u] = o * on(act + 4, plain_tanh(at));
          } else {
            const float r = on(act, plain_sigmoid(gx(0) + gh(0))),
                        z = on(act + 1, plain_sigmoid(gx(1) + gh(1))),
                        n = on(act + 2, plain_tanh(gx(2) + r * gh(2)));
            out[u] = (static_cast<float>(state[u]) - n) * z + n;
          }
        }
        if (c_.projected) {
          const std::vector<float> p = linear(out, act + 5, c_.w_hr, c_.sw_hr, {});
          out.assign(p.begin(), p.end());
        }
        for (int64_t j = 0; j < c_.outputs; ++j) {
          const float on_grid = on(1, static_cast<float>(out[j]));
          const double v = rounded(on_grid, format_of(c_.dtype));
          h[b * c_.outputs + j] = static_cast<float>(v);
          result[(t * c_.batch + b) * c_.outputs + j] = v;
        }
      }
    }
    for (const auto* state : {&h, &cell}) {
      for (const float v : *state) result.push_back(rounded(v, format_of(c_.dtype)));
    }
    return result;
  }

 private:
  const float* row(int64_t part) const { return c_.table.data() + 4 * part; }

  float on(int64_t part, float v) const {
    if (c_.table.empty() || row(part)[0] == 0) return v;
    return code_on(row(part), v) * row(part)[0];
  }

  std::vector<float> entering(const std::vector<double>& state, int64_t part) const {
    std::vector<float> values;
    for (const double v : state) {
      const auto single = static_cast<float>(v);
      values.push_back(!c_.table.empty() && !std::isfinite(single) ? NAN : on(part, single));
    }
    return values;
  }

  std::vector<float> linear(const std::vector<double>& x, int64_t part,
                            const std::vector<int8_t>& w, const std::vector<float>& sw,
                            const std::vector<double>& bias) const {
    const auto k = static_cast<int64_t>(x.size());
    std::vector<double> values(x);
    float scale = 1;
    if (c_.scheme == Scheme::fixed) {
      scale = row(part)[0];
      for (double& v : values) {
        const bool finite = std::isfinite(v);
        v = finite ? code_on(row(part), static_cast<float>(v)) : 0;
        if (!finite) scale = NAN;
      }
    } else if (c_.scheme == Scheme::dynamic) {
      float amax = 0;
      for (const double v : values) {
        const float magnitude = std::fabs(static_cast<float>(v));
        if (!(magnitude <= amax)) amax = magnitude;
        if (std::isnan(amax)) break;
      }
      if (amax != 0)
        scale = std::isnan(amax) ? amax : std::max(amax / (c_.wide ? 32767.0f : 127.0f), FLT_MIN);
      for (double& v : values)
        v = std::isfinite(scale) ? std::nearbyint(static_cast<float>(v) * (1 / scale)) : 0;
    }
    std::vector<float> y;
    for (size_t j = 0; j < sw.size(); ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += values[l] * w[j * k + l];
      float v = static_cast<float>(sum) * sw[j];
      if (c_.scheme != Scheme::weight) v = v * scale;
      if (!bias.empty()) v = v + static_cast<float>(bias[j]);
      y.push_back(v);
    }
    return y;
  }

  const RecurrentCase& c_;
};

// -- running --------------------------------------------------------------------------------------

void run_recurrent(const Tier& tier, const RecurrentCase& c, char* y) {
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
  const size_t value = format_of(c.dtype).bytes;
  const int64_t out = c.steps * c.batch * c.outputs, last = c.batch * c.outputs;
  Recurrent p{};
  p.cell = c.cell, p.scheme = c.scheme, p.wide = c.wide;
  p.steps = c.steps, p.batch = c.batch, p.inputs = c.inputs, p.hidden = c.hidden;
  p.outputs = c.outputs, p.dtype = c.dtype, p.reverse = c.reverse;
  p.x = floats(c.x, c.dtype), p.h0 = floats(c.h0, c.dtype), p.c0 = floats(c.c0, c.dtype);
  p.w_ih = raw(c.w_ih), p.w_hh = raw(c.w_hh), p.w_hr = raw(c.w_hr);
  p.sw_ih = raw(c.sw_ih), p.sw_hh = raw(c.sw_hh), p.sw_hr = raw(c.sw_hr);
  p.table = raw(c.table), p.lengths = raw(c.lengths);
  p.b_ih = floats(c.b_ih, c.b_ih_dtype), p.b_hh = floats(c.b_hh, c.b_hh_dtype);
  p.b_ih_dtype = c.b_ih_dtype, p.b_hh_dtype = c.b_hh_dtype;
  p.y = y, p.h_n = y + out * value, p.c_n = y + (out + last) * value;

  const qnn::RecurrentKernel& kernel = qnn::kernel_of(tier, p);
  const Memory scratch(kernel.scratch_bytes(p, c.parts), c.at_end, 0xff);
  qnn::Meeting meeting;
  // Every third time the first thread has two parts.
  std::vector<std::thread> threads;
  const int first = c.seed % 3 == 0 ? std::min(2, c.parts) : 1;
  for (int part = first; part < c.parts; ++part) {
    threads.emplace_back(
        [&, part] { kernel.run(p, {part, part + 1, c.parts, &meeting}, scratch.data()); });
  }
  kernel.run(p, {0, first, c.parts, &meeting}, scratch.data());
  for (std::thread& thread : threads) thread.join();
}

bool passes(const Tier& tier, const RecurrentCase& c, const std::vector<double>& want) {
  const Format& f = format_of(c.dtype);
  std::snprintf(running, sizeof running, "%s: %s", tier.name, c.text().c_str());
#if defined(QNN_HEAP)
  std::fprintf(stderr, "%s\n", running);
#endif
  const Memory y(want.size() * f.bytes, c.at_end, 0xff);
  run_recurrent(tier, c, y.data());
  // Sums of floats differ in their last bits, and a cast of 16 bits makes a step of that.
  const double error = c.scheme != Scheme::weight ? 0 : f.bytes == 2 ? 0.05 : 1e-4;
  size_t wrong = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double got = decode(y.data() + i * f.bytes, f);
    if (got == want[i] || (std::isnan(got) && std::isnan(want[i]))) continue;
    if (std::fabs(got - want[i]) <= error * (1 + std::fabs(want[i]))) continue;
    if (wrong++ == 0) std::printf("%s\n  value %zu = %.17g, not %.17g\n", running, i, got, want[i]);
  }
  if (wrong > 0) std::printf("  %zu of %zu values are wrong\n", wrong, want.size());
  return wrong == 0;
}

}  // namespace
