// Lookups in tables, of rows and of bags, for kernel_test.cpp.
#pragma once

namespace {

using qnn::Bag;
using qnn::Lookup;

struct LookupCase {
  Call table;  // its weight, y_dtype, parts and at_end
  bool wide = false;
  std::vector<int64_t> ids, offsets;  // without offsets: rows
  std::vector<double> weights;        // empty, or given
  Bag mode{};
  int64_t padding = -1;

  size_t results() const { return offsets.empty() ? ids.size() : offsets.size() - 1; }

  std::string text() const {
    static const char* const kModes[] = {"sum", "mean", "max"};
    char line[300];
    std::snprintf(line, sizeof line,
                  "%s of %zu ids of %s in a table of %s n=%lld k=%lld weights=%s padding=%lld "
                  "y=%s parts=%d, operands %s (repeat with 1 case and seed %llu)",
                  offsets.empty() ? "rows" : kModes[static_cast<int>(mode)], ids.size(),
                  wide ? "int64" : "int32", qnn::text(table.weight).c_str(),
                  static_cast<long long>(table.n), static_cast<long long>(table.k),
                  weights.empty() ? "none" : "given", static_cast<long long>(padding),
                  format_of(table.y_dtype).name, table.parts,
                  table.at_end ? "end at a page" : "begin at a page",
                  static_cast<unsigned long long>(table.seed));
    return line;
  }
};

class LookupDraw : Draw {
 public:
  using Draw::Draw;

  LookupCase next(uint64_t seed) {
    LookupCase c;
    Call& t = c.table;
    t.seed = seed, t.n = size(100), t.k = size(1200);
    format(t);
    if (t.weight.grouped()) t.k = (t.k + t.weight.group - 1) / t.weight.group * t.weight.group;
    t.at_end = !one_in(3), t.parts = one_in(2) ? 1 : between(2, 5), t.y_dtype = dtype();
    weight(t);
    c.wide = one_in(2);
    c.ids.resize(one_in(20) ? 0 : between(1, 40));
    const int count = static_cast<int>(c.ids.size());
    for (int64_t& id : c.ids) id = between(0, static_cast<int>(t.n) - 1);
    if (one_in(3)) return c;
    c.offsets.resize(between(0, 12) + 1);
    for (int64_t& offset : c.offsets) offset = between(0, count);
    std::sort(c.offsets.begin(), c.offsets.end());
    if (one_in(2)) c.offsets.back() = count;
    c.offsets[0] = 0;
    c.mode = static_cast<Bag>(between(0, 2));
    if (one_in(2)) c.weights = floats(count, format_of(t.y_dtype));
    if (count > 0 && one_in(2)) c.padding = c.ids[between(0, count - 1)];
    return c;
  }
};

// As kernels/reference/embedding.py says it: a value of row or bag `i`.
Bounds expected(const LookupCase& c, size_t i, int64_t column) {
  const Call& t = c.table;
  const auto single = [](double x) { return static_cast<float>(x); };
  const auto value = [&](int64_t id) {
    const int64_t at = id * t.k + column;
    return single(t.values.empty() ? t.w[at] : t.values[at]) * t.sw[id];
  };
  Bounds y{};
  if (c.offsets.empty()) {
    y.low = y.high = value(c.ids[i]);
  } else {
    double sum = 0, most = -HUGE_VAL, magnitude = 0;
    int number = 0;
    for (int64_t j = c.offsets[i]; j < c.offsets[i + 1]; ++j) {
      if (c.ids[j] == c.padding) continue;
      const float v = value(c.ids[j]) * (c.weights.empty() ? 1.0f : single(c.weights[j]));
      sum += v, ++number;
      if (std::isfinite(v)) magnitude += std::fabs(v);
      if (!(v <= most) && !std::isnan(most)) most = v;
    }
    if (c.mode == Bag::max) {
      y.low = y.high = number == 0 ? 0 : most;
    } else {
      const double error = number * (std::ldexp(magnitude, -24) + std::ldexp(1, -150));
      y = {single(sum - error), single(sum + error), magnitude > FLT_MAX / 2};
      const int divisor = c.mode == Bag::mean ? std::max(number, 1) : 1;
      y.apply([&](double v) { return single(v) / static_cast<float>(divisor); });
    }
  }
  y.apply([&](double v) { return rounded(v, format_of(t.y_dtype)); });
  return y;
}

void run(const Tier& tier, const LookupCase& c, char* y) {
  const Call& t = c.table;
  Operands operands(t.at_end);
  Lookup p{};
  p.table.n = t.n, p.table.k = t.k, p.table.y = y, p.table.y_dtype = t.y_dtype;
  operands.place_weight(t, p.table);
  const std::vector<int32_t> narrow(c.ids.begin(), c.ids.end());
  p.ids = c.wide ? operands.place(c.ids.data(), c.ids.size() * 8)
                 : operands.place(narrow.data(), narrow.size() * 4);
  p.wide = c.wide, p.count = static_cast<int64_t>(c.ids.size());
  if (!c.offsets.empty()) {
    p.offsets =
        reinterpret_cast<const int64_t*>(operands.place(c.offsets.data(), c.offsets.size() * 8));
    p.bags = static_cast<int64_t>(c.offsets.size()) - 1;
  }
  if (!c.weights.empty()) p.weights = operands.place_floats(c.weights, t.y_dtype);
  p.mode = c.mode, p.padding = c.padding;
  std::vector<std::thread> threads;
  for (int part = 1; part < t.parts; ++part)
    threads.emplace_back([&tier, &p, &t, part] { tier.look_up(p, part, t.parts); });
  tier.look_up(p, 0, t.parts);
  for (std::thread& thread : threads) thread.join();
}

bool passes(const Tier& tier, const LookupCase& c, const std::vector<Bounds>& want) {
  std::snprintf(running, sizeof running, "%s: %s", tier.name, c.text().c_str());
  return passes(want, c.table.y_dtype, c.table.at_end, c.table.k,
                [&](char* y) { run(tier, c, y); });
}

}  // namespace
