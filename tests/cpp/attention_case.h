// Calls of attention in integers, for kernel_test.cpp.
#pragma once

namespace {

using qnn::Attention;
using qnn::Rows;

struct AttentionCase {
  uint64_t seed = 0;
  int64_t b = 1, h = 1, g = 1, m = 1, n = 1, d = 1, e = 1;
  DType dtype{}, mask_dtype{};
  bool causal = false, masked = false, mask_is_bool = false, at_end = false;
  int parts = 1;
  float unit = 0;
  std::vector<double> q, k, v, mask;  // as they lie
  int64_t gap = 0;                    // between rows of q, k and v
  int64_t mask_sizes[4] = {1, 1, 1, 1};

  // Rows stand in the order [batch, row, head], as models have them.
  Rows rows(int64_t heads, int64_t count, int64_t columns) const {
    return {nullptr, heads * count * (columns + gap), columns + gap, heads * (columns + gap)};
  }
  int64_t size(int64_t heads, int64_t count, int64_t columns) const {
    return b * heads * count * (columns + gap);
  }
  Rows mask_rows() const {
    const int64_t* s = mask_sizes;
    return {nullptr, s[0] == 1 ? 0 : s[1] * s[2] * s[3], s[1] == 1 ? 0 : s[2] * s[3],
            s[2] == 1 ? 0 : s[3]};
  }
  double mask_at(int64_t batch, int64_t head, int64_t row, int64_t key) const {
    const Rows r = mask_rows();
    return mask[batch * r.batch + head * r.head + row * r.row + (mask_sizes[3] == 1 ? 0 : key)];
  }

  std::string text() const {
    char line[400];
    std::snprintf(
        line, sizeof line,
        "attention of %s b=%lld h=%lld g=%lld m=%lld n=%lld d=%lld e=%lld unit=%g%s "
        "mask=%s parts=%d, operands %s (repeat with 1 case, this seed and attention: "
        "%llu)",
        format_of(dtype).name, static_cast<long long>(b), static_cast<long long>(h),
        static_cast<long long>(g), static_cast<long long>(m), static_cast<long long>(n),
        static_cast<long long>(d), static_cast<long long>(e), unit, causal ? " causal" : "",
        !masked        ? "none"
        : mask_is_bool ? "bool"
                       : format_of(mask_dtype).name,
        parts, at_end ? "end at a page" : "begin at a page", static_cast<unsigned long long>(seed));
    return line;
  }
};

class AttentionDraw : Draw {
 public:
  using Draw::Draw;

  AttentionCase next(uint64_t seed) {
    AttentionCase c;
    c.seed = seed;
    c.b = between(1, 2), c.g = between(1, 3), c.h = c.g * between(1, 2);
    c.m = one_in(4) ? 1 : size(60), c.n = one_in(4) ? between(500, 1100) : size(200);
    c.d = size(140), c.e = size(140);
    c.dtype = dtype(), c.mask_dtype = dtype();
    c.at_end = !one_in(3), c.parts = one_in(2) ? 1 : between(2, 5);
    c.gap = one_in(2) ? 0 : between(1, 9);
    c.unit = one_in(20) ? -1e30f : static_cast<float>(normal() * 400);
    c.q = operand(c, c.h, c.m, c.d), c.k = operand(c, c.g, c.n, c.d);
    c.v = operand(c, c.g, c.n, c.e);
    c.causal = one_in(3), c.masked = !c.causal && one_in(2);
    if (c.masked) mask(c);
    return c;
  }

 private:
  // Few rows of zeros, of large numbers, of small ones, and with a NaN or inf.
  std::vector<double> operand(const AttentionCase& c, int64_t heads, int64_t rows,
                              int64_t columns) {
    const Format& f = format_of(c.dtype);
    std::vector<double> values(c.size(heads, rows, columns));
    const int64_t stride = columns + c.gap;
    for (size_t row = 0; row < values.size(); row += stride) {
      double size = one_in(8) ? std::ldexp(1, between(-140, 120)) : 1;
      if (one_in(12)) size = 0;
      for (int64_t i = 0; i < stride; ++i) values[row + i] = rounded(normal() * size, f);
      if (one_in(200))
        values[row + between(0, static_cast<int>(columns) - 1)] = one_in(2) ? NAN : -HUGE_VAL;
    }
    return values;
  }

  void mask(AttentionCase& c) {
    const int64_t all[] = {c.b, c.h, c.m, c.n};
    int64_t count = 1;
    for (int axis = 0; axis < 4; ++axis) count *= c.mask_sizes[axis] = one_in(3) ? 1 : all[axis];
    c.mask_is_bool = one_in(2);
    const int seen = between(1, 12);
    c.mask.resize(count);
    for (double& value : c.mask) {
      const bool sees = between(1, 12) <= seen;
      value = c.mask_is_bool ? (sees ? 1 : 0)
              : !sees        ? (one_in(9) ? -format_of(c.mask_dtype).most() : -HUGE_VAL)
              : one_in(999)  ? NAN
                             : rounded(normal() * 3, format_of(c.mask_dtype));
    }
  }
};

// As kernels/reference/attention.py says it, one row after the other.
class PlainAttention {
 public:
  explicit PlainAttention(const AttentionCase& c) : c_(c) {
    quantize(c.q, c.h, c.m, c.d, q_), quantize(c.k, c.g, c.n, c.d, k_);
    quantize(c.v, c.g, c.n, c.e, v_);
  }

  std::vector<Bounds> run() {
    std::vector<Bounds> y(c_.b * c_.m * c_.h * c_.e);
    for (int64_t batch = 0; batch < c_.b; ++batch) {
      for (int64_t head = 0; head < c_.h; ++head) this->head(batch, head, y);
    }
    return y;
  }

 private:
  struct Quantized {
    std::vector<int> codes;     // [batch, row, head, column]
    std::vector<float> scales;  // NaN with a NaN or inf, 0 of zeros
  };

  void quantize(const std::vector<double>& x, int64_t heads, int64_t rows, int64_t columns,
                Quantized& to) const {
    const int64_t stride = columns + c_.gap;
    for (int64_t row = 0; row < c_.b * rows * heads; ++row) {
      float amax = 0;
      bool finite = true;
      for (int64_t i = 0; i < columns; ++i) {
        const auto value = static_cast<float>(x[row * stride + i]);
        finite &= std::isfinite(value), amax = std::max(amax, std::fabs(value));
      }
      const float scale = std::max(amax / 127.0f, FLT_MIN), inverse = 1.0f / scale;
      to.scales.push_back(!finite ? NAN : amax == 0 ? 0 : scale);
      for (int64_t i = 0; i < columns; ++i) {
        const float value = static_cast<float>(x[row * stride + i]) * inverse;
        to.codes.push_back(finite && amax > 0 ? static_cast<int>(std::nearbyint(value)) : 0);
      }
    }
  }

  bool sees(int64_t batch, int64_t head, int64_t row, int64_t key) const {
    if (c_.causal) return key <= row;
    if (!c_.masked) return true;
    const auto value = static_cast<float>(c_.mask_at(batch, head, row, key));
    return c_.mask_is_bool ? value != 0 : value != -HUGE_VAL;
  }

  static int64_t mulhrs(int64_t a, int64_t b) { return (a * b + (1 << 14)) >> 15; }

  static int64_t weight(int64_t d) {
    d = std::min<int64_t>(d, 32767);
    const int64_t n = d >> 10, x = (d << 5) & 0x7fe0;
    const int64_t e = mulhrs(mulhrs(mulhrs(-1287, x) + 7537, x) - 22571, x) + 32640;
    return ((2 * e >> n) + 1) >> 1;
  }

  void head(int64_t batch, int64_t head, std::vector<Bounds>& y) const {
    const int64_t of_keys = head / (c_.h / c_.g), n = c_.n;
    const auto at = [&](int64_t key) { return (batch * n + key) * c_.g + of_keys; };
    std::vector<float> scale(n);
    float top = 0;
    for (int64_t key = 0; key < n; ++key) {
      bool seen = false;
      for (int64_t row = 0; row < c_.m && !seen; ++row) seen = sees(batch, head, row, key);
      scale[key] = seen && v_.scales[at(key)] > 0 ? v_.scales[at(key)] : 0;
      top = std::max(top, scale[key]);
    }
    std::vector<int64_t> gain(n), score(n);
    for (int64_t key = 0; key < n; ++key)
      gain[key] = top > 0 ? static_cast<int64_t>(std::nearbyint(scale[key] / top * 32767.0f)) : 0;
    for (int64_t row = 0; row < c_.m; ++row) {
      const int64_t query = (batch * c_.m + row) * c_.h + head;
      const int64_t hidden = -(int64_t{1} << 40);
      int64_t most = hidden;
      bool bad = false;
      for (int64_t key = 0; key < n; ++key) {
        score[key] = hidden;
        if (!sees(batch, head, row, key)) continue;
        int32_t sum = 0;
        for (int64_t i = 0; i < c_.d; ++i)
          sum += q_.codes[query * c_.d + i] * k_.codes[at(key) * c_.d + i];
        // Two steps each, so that no compiler joins them.
        volatile float value = static_cast<float>(sum) * k_.scales[at(key)];
        const float unit = q_.scales[query] * c_.unit;
        value = value * unit;
        if (c_.masked && !c_.mask_is_bool) {
          float added = static_cast<float>(c_.mask_at(batch, head, row, key));
          added = added * (1.44269504f * 1024);
          if (added == added) added = std::clamp(added, -FLT_MAX, FLT_MAX);
          value = value + added;
        }
        const float reached = value;
        if (std::isnan(reached) || std::isnan(v_.scales[at(key)])) {
          bad = true;
          continue;
        }
        score[key] =
            static_cast<int64_t>(std::nearbyint(std::clamp(reached, -536870912.0f, 536870912.0f)));
        most = std::max(most, score[key]);
      }
      std::vector<int64_t> sums(c_.e);
      int64_t total = 0;
      for (int64_t key = 0; key < n && most != hidden; ++key) {
        const int64_t a = weight(most - score[key]), w = mulhrs(a, gain[key]);
        total += a;
        for (int64_t i = 0; i < c_.e; ++i) sums[i] += w * v_.codes[at(key) * c_.e + i];
      }
      for (int64_t i = 0; i < c_.e; ++i) {
        Bounds& to = y[query * c_.e + i];
        volatile float value = static_cast<float>(sums[i]);
        value = value * (1.0f / static_cast<float>(total));
        value = value * (top * (32768.0f / 32767.0f));
        to = Bounds{};
        const float reached = bad ? NAN : most == hidden ? 0.0f : value;
        to.low = to.high = rounded(reached, format_of(c_.dtype));
      }
    }
  }

  const AttentionCase& c_;
  Quantized q_, k_, v_;
};

void run(const Tier& tier, const AttentionCase& c, char* y) {
  Operands operands(c.at_end);
  Attention p{};
  p.b = c.b, p.h = c.h, p.g = c.g, p.m = c.m, p.n = c.n, p.d = c.d, p.e = c.e;
  p.dtype = c.dtype, p.unit = c.unit, p.causal = c.causal, p.y = y;
  // Without the gap after the last row, which nothing may read.
  const auto placed = [&](const std::vector<double>& x, Rows rows) {
    rows.values = operands.place_floats({x.begin(), x.end() - c.gap}, c.dtype);
    return rows;
  };
  p.q = placed(c.q, c.rows(c.h, c.m, c.d)), p.k = placed(c.k, c.rows(c.g, c.n, c.d));
  p.v = placed(c.v, c.rows(c.g, c.n, c.e));
  if (c.masked) {
    p.mask = c.mask_rows(), p.mask_is_bool = c.mask_is_bool, p.mask_dtype = c.mask_dtype;
    p.mask_key = c.mask_sizes[3] == 1 ? 0 : 1;
    const std::vector<char> seen(c.mask.begin(), c.mask_is_bool ? c.mask.end() : c.mask.begin());
    p.mask.values = c.mask_is_bool ? operands.place(seen.data(), seen.size())
                                   : operands.place_floats(c.mask, c.mask_dtype);
  }
  const qnn::AttentionKernel& kernel = tier.attention;
  std::vector<std::unique_ptr<Memory>> packed, scratches;
  for (int64_t head = 0; head < c.b * c.g; ++head)
    packed.push_back(std::make_unique<Memory>(kernel.head_bytes(p), c.at_end, 0xff));
  for (int part = 0; part < c.parts; ++part)
    scratches.push_back(std::make_unique<Memory>(kernel.scratch_bytes(p), c.at_end, 0xff));
  const auto all = [&](const auto& work) {
    std::vector<std::thread> threads;
    for (int part = 0; part < c.parts; ++part) {
      char* scratch = scratches[part]->data();
      if (c.parts == 1) return work(0, scratch);
      threads.emplace_back([&work, part, scratch] { work(part, scratch); });
    }
    for (std::thread& thread : threads) thread.join();
  };
  all([&](int part, char* scratch) {
    for (int64_t head = part; head < c.b * c.g; head += c.parts)
      kernel.pack(p, head, packed[head]->data(), scratch);
  });
  // Rows in blocks of odd sizes.
  const int64_t block = std::max<int64_t>(1, c.m / 2 + 1), blocks = (c.m + block - 1) / block;
  all([&](int part, char* scratch) {
    for (int64_t i = part; i < c.b * c.h * blocks; i += c.parts) {
      const int64_t head = i / blocks, first = i % blocks * block;
      kernel.rows(p, head, first, std::min(block, c.m - first), packed[head / (c.h / c.g)]->data(),
                  scratch);
    }
  });
}

bool passes(const Tier& tier, const AttentionCase& c, const std::vector<Bounds>& want) {
  std::snprintf(running, sizeof running, "%s: %s", tier.name, c.text().c_str());
  return passes(want, c.dtype, c.at_end, c.e, [&](char* y) { run(tier, c, y); });
}

}  // namespace
