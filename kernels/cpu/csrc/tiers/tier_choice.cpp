// The tiers, their known-answer tests, and the choice among them.
#include "tiers/tier_choice.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace qnn {
namespace {

void run_alone(const Kernel& kernel, const Linear& p) {
  const size_t bytes = kernel.scratch_bytes(p);
  std::vector<char> scratch(bytes + 64);
  void* aligned = scratch.data();
  size_t space = scratch.size();
  kernel.run(p, 0, 1, static_cast<char*>(std::align(64, bytes, aligned, space)));
}

const std::array<Tier, std::size(kTiers)>& tiers() {
  static const auto all = [] {
    std::array<Tier, std::size(kTiers)> found;
    std::transform(std::begin(kTiers), std::end(kTiers), found.begin(),
                   [](const Tier* tier) { return whole(*tier); });
    return found;
  }();
  return all;
}

// Full-range operands whose product plain loops know, in both forms of the kernel.
bool known_integers(const Tier& tier) {
  for (const auto& [m, k, n] : {std::array<int64_t, 3>{3, 301, 50}, {40, 1100, 33}}) {
    std::vector<int8_t> x(m * k), w(n * k);
    uint32_t state = 1;
    const auto next = [&] {
      return static_cast<int>((state = state * 1664525 + 1013904223) >> 24);
    };
    for (auto& v : x) v = static_cast<int8_t>(std::max(next() - 128, -127));
    for (auto& v : w) v = static_cast<int8_t>(next() - 128);
    std::fill_n(x.begin(), k, int8_t{127});
    std::fill_n(w.begin(), k, int8_t{127});
    std::fill_n(w.end() - k, k, int8_t{-128});
    const std::vector<float> ones(std::max(m, n), 1.0f);
    std::vector<float> y(m * n);
    Linear p{};
    p.m = m, p.k = k, p.n = n;
    p.x = x.data(), p.row_scale = ones.data();
    p.weight = kInt8, p.w = w.data(), p.sw = ones.data();
    p.y = y.data();
    for (const int32_t zero_point : {0, -77}) {
      p.zero_point = zero_point;
      run_alone(tier.int8, p);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          int32_t sum = 0;
          for (int64_t l = 0; l < k; ++l) sum += (x[i * k + l] - zero_point) * w[j * k + l];
          if (y[i * n + j] != static_cast<float>(sum)) return false;
        }
      }
    }
  }
  return true;
}

// Codes of 16 bits, given as floats whose scale is 1, and sums that 32 bits do not hold.
bool known_int16(const Tier& tier) {
  for (const auto& [m, k, n] : {std::array<int64_t, 3>{3, 8300, 9}, {40, 1100, 33}}) {
    std::vector<float> x(m * k), y(m * n);
    std::vector<int8_t> w(n * k);
    uint32_t state = 1;
    const auto next = [&] {
      return static_cast<int>((state = state * 1664525 + 1013904223) >> 16);
    };
    for (auto& v : x) v = static_cast<float>(std::max(next() - 32768, -32767));
    for (auto& v : w) v = static_cast<int8_t>((next() >> 8) - 128);
    std::fill_n(x.begin(), k, 32767.0f);
    for (int64_t i = 0; i < m; ++i) x[i * k] = -32767.0f;
    std::fill_n(w.begin(), k, int8_t{127});
    std::fill_n(w.end() - k, k, int8_t{-128});
    const std::vector<float> ones(n, 1.0f);
    Linear p{};
    p.m = m, p.k = k, p.n = n;
    p.x = x.data();
    p.weight = kInt8, p.w = w.data(), p.sw = ones.data();
    p.y = y.data();
    run_alone(tier.int16, p);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        int64_t sum = 0;
        for (int64_t l = 0; l < k; ++l) sum += static_cast<int64_t>(x[i * k + l]) * w[j * k + l];
        if (y[i * n + j] != static_cast<float>(sum)) return false;
      }
    }
  }
  return true;
}

// Groups of int4, whose sums are integers, to the bit.
bool known_int8_int4(const Tier& tier) {
  for (const auto& [m, k, n] : {std::array<int64_t, 3>{3, 352, 20}, {15, 64, 5}}) {
    for (const bool zero_points : {false, true}) {
      const WeightFormat format = int4_in_groups(32, zero_points);
      const int64_t groups = format.groups(k), stride = format.row_bytes(k);
      std::vector<float> x(m * k), y(m * n), scales(n * groups);
      std::vector<uint8_t> w(n * stride), points(n * groups);
      uint32_t state = 1;
      const auto next = [&] {
        return static_cast<int>((state = state * 1664525 + 1013904223) >> 24);
      };
      for (auto& v : x) v = static_cast<float>(std::max(next() - 128, -127));
      for (auto& v : w) v = static_cast<uint8_t>(next());
      for (auto& v : points) v = static_cast<uint8_t>(next() & 15);
      for (auto& v : scales) v = static_cast<float>(next() + 1) / 192;
      std::fill_n(x.begin(), k, 127.0f);
      for (int64_t i = 0; i < m; ++i) x[i * k] = -127.0f;
      std::fill_n(w.begin(), stride, uint8_t{255});
      const float one = 1;
      Linear p{};
      p.m = m, p.k = k, p.n = n;
      p.x = x.data();
      p.weight = format, p.w = reinterpret_cast<const int8_t*>(w.data()), p.sw = &one;
      p.group_scale = scales.data(), p.zero_points = zero_points ? points.data() : nullptr;
      p.y = y.data();
      run_alone(tier.int8_int4, p);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          float total = 0;
          for (int64_t group = j * groups; group < (j + 1) * groups; ++group) {
            int32_t sum = 0;
            for (int64_t l = (group - j * groups) * 32, end = l + 32; l < end; ++l) {
              const int code = w[j * stride + l / 2] >> 4 * (l % 2) & 15;
              sum +=
                  static_cast<int32_t>(x[i * k + l]) * (code - (zero_points ? points[group] : 8));
            }
            total = total + static_cast<float>(sum) * scales[group];
          }
          if (y[i * n + j] != total) return false;
        }
      }
    }
  }
  return true;
}

double value_of_e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = (code & 127) == 127 ? std::nan("")
                           : exponent == 0     ? std::ldexp(mantissa, -9)
                                               : std::ldexp(8 + mantissa, exponent - 10);
  return code & 128 ? -magnitude : magnitude;
}

double value_of_e2m1(int code) {
  const double magnitude =
      (code & 7) < 2 ? 0.5 * (code & 7) : std::ldexp(2 + (code & 1), (code >> 1 & 3) - 2);
  return code & 8 ? -magnitude : magnitude;
}

// All codes of the formats whose decoders a tier has, in both forms of the kernel, times float32
// and bfloat16, which some tiers multiply as such. Two rows of w hold a NaN; the other sums may err
// by the order of their terms, and x by its rounding for int4. 1 ms a tier, when the library is
// loaded.
bool known_floats(const Tier& tier) {
  const WeightFormat formats[] = {kInt8, kE4m3, kE2m1, int4_in_groups(32, true)};
  for (const auto& [m, most, n] : {std::array<int64_t, 3>{3, 301, 20}, {20, 560, 9}}) {
    for (const WeightFormat& format : formats) {
      const int64_t k = format.decoder == Decoder::int4 ? most / 32 * 32 : most;
      const int64_t groups = format.groups(k), stride = format.row_bytes(k);
      const bool e2m1 = format.decoder == Decoder::e2m1, int4 = format.decoder == Decoder::int4,
                 int8 = format.decoder == Decoder::int8;
      std::vector<float> x(m * k), y(m * n), scales(n * groups);
      std::vector<uint8_t> w(n * stride), bytes(n * groups);  // of e4m3 scales, or of zero points
      uint32_t state = 1;
      const auto next = [&] {
        return static_cast<uint8_t>((state = state * 1664525 + 1013904223) >> 24);
      };
      for (auto& v : x) v = static_cast<float>(next() - 128) / 64;
      for (auto& v : w) {
        do {
          v = next();
        } while (format.decoder == Decoder::e4m3 && (v & 127) == 127);
      }
      for (auto& v : bytes) v = static_cast<uint8_t>(next() & (int4 ? 15 : 126));
      for (auto& v : scales) v = static_cast<float>(next() + 1) / 64;
      auto& holds_nan = e2m1 ? bytes : w;
      if (int4) {
        scales.front() = scales.back() = std::nanf("");
      } else if (!int8) {
        holds_nan.front() = 127;
        holds_nan.back() = 255;
      }
      std::vector<uint16_t> halves(m * k);  // x in bfloat16, which holds it exactly
      for (size_t i = 0; i < halves.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, &x[i], sizeof bits);
        halves[i] = static_cast<uint16_t>(bits >> 16);
      }
      const std::vector<float> ones(n, 1.0f);
      Linear p{};
      p.m = m, p.k = k, p.n = n;
      p.x = x.data();
      p.weight = format, p.w = reinterpret_cast<const int8_t*>(w.data());
      p.sw = ones.data();
      if (e2m1) p.group_scale = bytes.data();
      if (int4) p.group_scale = scales.data(), p.zero_points = bytes.data();
      std::vector<float> also(m * n);
      p.y = also.data(), p.x = halves.data(), p.x_dtype = DType::bfloat16;
      run_alone(tier.weight_only, p);
      p.y = y.data(), p.x = x.data(), p.x_dtype = DType::float32;
      run_alone(tier.weight_only, p);
      for (int64_t j = 0; j < n; ++j) {
        std::vector<double> values(k);
        for (int64_t l = 0; l < k; ++l) {
          const int64_t group = j * groups + (format.grouped() ? l / format.group : 0);
          const int code =
              format.bits == 8 ? w[j * stride + l] : w[j * stride + l / 2] >> 4 * (l % 2) & 15;
          values[l] = int4   ? (code - bytes[group]) * static_cast<double>(scales[group])
                      : e2m1 ? value_of_e2m1(code) * value_of_e4m3(bytes[group])
                      : int8 ? static_cast<int8_t>(code)
                             : value_of_e4m3(static_cast<uint8_t>(code));
        }
        for (int64_t i = 0; i < m; ++i) {
          double sum = 0, size = 0;
          for (int64_t l = 0; l < k; ++l) {
            sum += x[i * k + l] * values[l];
            size += std::fabs(x[i * k + l] * values[l]);
          }
          for (const float got : {y[i * n + j], also[i * n + j]}) {
            if (std::isnan(sum) ? !std::isnan(got) : !(std::fabs(got - sum) <= 1e-5 * size))
              return false;
          }
        }
      }
    }
  }
  return true;
}

// A step or two of every kind of layer, to the bit as in the portable tier, whose products are
// plain C++: full-range operands, in both forms of AMX's product. 0.1 ms a tier.
bool known_steps(const Tier& tier) {
  for (const int all : {0, 1, 2, 3, 4, 5, 6, 7}) {
    const int kind = all % 4;
    Recurrent p{};
    p.cell = kind % 2 == 0 ? Cell::lstm : Cell::gru;
    p.scheme = kind < 2 ? Scheme::dynamic : Scheme::fixed;
    p.wide = all >= 4;
    const CellParts& parts = parts_of(p.cell);
    const int64_t gates = parts.gates;
    p.steps = 2, p.batch = kind < 2 ? 9 : 3, p.inputs = p.wide ? 530 : 70,
    p.hidden = p.outputs = 18;
    uint32_t state = 1;
    const auto next = [&] {
      return static_cast<int>((state = state * 1664525 + 1013904223) >> 24) - 128;
    };
    std::vector<int8_t> w_ih(gates * p.hidden * p.inputs), w_hh(gates * p.hidden * p.outputs);
    for (auto* codes : {&w_ih, &w_hh}) {
      for (auto& v : *codes) v = static_cast<int8_t>(next());
      std::fill_n(codes->begin(), p.outputs, int8_t{-128});
    }
    std::vector<float> x(p.steps * p.batch * p.inputs), h0(p.batch * p.outputs), c0(h0.size());
    for (auto* values : {&x, &h0, &c0}) {
      for (auto& v : *values) v = static_cast<float>(next()) / 64;
    }
    const std::vector<float> sw(gates * p.hidden, 1e-4f);
    std::vector<float> table;
    for (int64_t part = 0; part < parts.count; ++part) {
      const bool bytes = part == 0 && !p.wide;
      const float most = p.wide ? 32767.0f : 127.0f;
      table.insert(table.end(), {p.wide ? 1.0f / 16384 : 1.0f / 64, bytes ? 128.0f : 0.0f,
                                 bytes ? 0.0f : -most, bytes ? 255.0f : most});
    }
    p.x = x.data(), p.h0 = h0.data(), p.c0 = c0.data();
    p.w_ih = w_ih.data(), p.w_hh = w_hh.data(), p.sw_ih = p.sw_hh = sw.data();
    if (p.scheme == Scheme::fixed) p.table = table.data();
    const auto result = [&](const RecurrentKernel& kernel) {
      const int64_t last = p.batch * p.outputs;
      std::vector<float> y((p.steps + 2) * last);
      p.y = y.data(), p.h_n = y.data() + p.steps * last, p.c_n = y.data() + (p.steps + 1) * last;
      std::vector<char> memory(kernel.scratch_bytes(p, 1) + 64);
      void* aligned = memory.data();
      size_t space = memory.size();
      std::align(64, space - 64, aligned, space);
      kernel.run(p, {0, 1, 1, nullptr}, static_cast<char*>(aligned));
      return y;
    };
    if (result(kernel_of(tier, p)) != result(kernel_of(portable, p))) return false;
  }
  return true;
}

// Small convolutions, dense and depthwise, to the bit as in the portable tier: codes over their
// full range, codes of 16 bits in sums that 32 bits do not hold, and whole numbers as floats, whose
// sums are exact. The weights of one have few pairs that saturate 16 bits. 0.3 ms a tier.
bool known_convolutions(const Tier& tier) {
  for (const int kind : {0, 1, 2}) {
    const bool depthwise = kind == 1, calm = kind == 2;
    Conv p{};
    p.batch = 1, p.channels = 61, p.outputs = depthwise ? 61 : 70, p.groups = depthwise ? 61 : 1;
    for (int axis = 0; axis < 3; ++axis) {
      p.in[axis] = axis == 0 ? 1 : 3 + 2 * axis, p.kernel[axis] = axis == 0 ? 1 : 3;
      p.before[axis] = axis == 0 ? 0 : 1, p.stride[axis] = p.dilation[axis] = 1;
      p.out[axis] = p.in[axis];
    }
    uint32_t state = 1;
    const auto next = [&] {
      return static_cast<int>((state = state * 1664525 + 1013904223) >> 24) - 128;
    };
    std::vector<uint8_t> codes(p.sample());
    std::vector<float> x(codes.size()), wide(codes.size());
    std::vector<int8_t> w(p.outputs * p.depth() * p.taps());
    for (auto& v : codes) v = static_cast<uint8_t>(next());
    for (auto& v : x) v = static_cast<float>(next());
    for (auto& v : wide) v = static_cast<float>(std::max(256 * next() + next(), -32767));
    for (auto& v : w) v = static_cast<int8_t>(next() / (calm ? 4 : 1));
    std::fill_n(codes.begin(), 1000, uint8_t{255});
    std::fill_n(wide.begin(), 1000, 32767.0f);
    std::fill_n(w.begin(), calm ? 9 : p.depth() * p.taps(), int8_t{-128});
    std::fill_n(w.end() - 3, 3, int8_t{127});
    const std::vector<float> ones(p.outputs, 1.0f);
    p.w = w.data(), p.sw = p.sample_scale = ones.data();
    p.x_last = true;
    const auto differ = [&](ConvInput input, const void* values, ConvKernel Tier::* field) {
      p.input = input, p.x = values, p.zero_point = input == ConvInput::codes ? -77 : 0;
      const auto result = [&](const ConvKernel& kernel) {
        std::vector<float> y(p.pixels() * p.outputs);
        p.y = y.data();
        std::vector<char> memory(kernel.scratch_bytes(p, 1) + 64);
        void* aligned = memory.data();
        size_t space = memory.size();
        std::align(64, space - 64, aligned, space);
        kernel.run(p, 0, 1, static_cast<char*>(aligned));
        return y;
      };
      return result(tier.*field) != result(portable.*field);
    };
    if (differ(ConvInput::codes, codes.data(), &Tier::conv) ||
        differ(ConvInput::dynamic, wide.data(), &Tier::conv_int16) ||
        differ(ConvInput::floats, x.data(), &Tier::conv_weight))
      return false;
  }
  return true;
}

// A head of attention, to the bit as in the portable tier: more keys than one block of sums takes,
// a mask, rows of extremes, and tails along each axis. 0.2 ms a tier.
bool known_attention(const Tier& tier) {
  Attention p{};
  p.b = p.h = p.g = 1, p.m = 9, p.n = 533, p.d = 21, p.e = 19;
  std::vector<float> q(p.m * p.d), k(p.n * p.d), v(p.n * p.e), mask(p.n);
  uint32_t state = 1;
  const auto next = [&] {
    return static_cast<float>(static_cast<int>((state = state * 1664525 + 1013904223) >> 16) -
                              32768) /
           16384;
  };
  for (auto* values : {&q, &k, &v, &mask}) {
    for (auto& value : *values) value = next();
  }
  std::fill_n(v.begin(), 200 * p.e, 2.0f);
  std::fill_n(mask.begin() + 250, 60, -INFINITY);
  p.q = {q.data(), 0, 0, p.d}, p.k = {k.data(), 0, 0, p.d}, p.v = {v.data(), 0, 0, p.e};
  p.unit = 300.0f;
  for (const bool masked : {false, true}) {
    p.mask = {masked ? mask.data() : nullptr, 0, 0, 0}, p.mask_key = 1;
    const auto result = [&](const AttentionKernel& kernel) {
      std::vector<float> y(p.m * p.e);
      p.y = y.data();
      const size_t bytes = kernel.head_bytes(p), all = bytes + kernel.scratch_bytes(p);
      std::vector<char> memory(all + 64);
      void* aligned = memory.data();
      size_t space = memory.size();
      auto* packed = static_cast<char*>(std::align(64, all, aligned, space));
      kernel.pack(p, 0, packed, packed + bytes);
      kernel.rows(p, 0, 0, p.m, packed, packed + bytes);
      return y;
    };
    if (result(tier.attention) != result(portable.attention)) return false;
  }
  return true;
}

// Rows of every kind of norm, to the bit as in the portable tier: with a tail, and onto a grid.
bool known_norms(const Tier& tier) {
  constexpr int64_t kRows = 3, kColumns = 213;
  std::vector<float> x(kRows * kColumns), more(x.size()), weight(kColumns), bias(kColumns);
  uint32_t state = 1;
  const auto next = [&] {
    return static_cast<float>(static_cast<int>((state = state * 1664525 + 1013904223) >> 16) -
                              32768) /
           8192;
  };
  for (auto* values : {&x, &more, &weight, &bias}) {
    for (auto& value : *values) value = next();
  }
  Norm p{};
  p.m = kRows, p.k = kColumns, p.eps = 1e-5f, p.grid_scale = 0.04f, p.zero_point = -77;
  p.x = x.data(), p.residual = more.data(), p.weight = weight.data(), p.bias = bias.data();
  for (const int all : {0, 1, 2, 3, 4, 5}) {
    p.kind = static_cast<NormKind>(all % 3), p.fixed = all >= 3;
    const auto result = [&](const NormKernel& kernel) {
      std::vector<float> sum(x.size()), y(x.size()), scales(kRows);
      std::vector<int8_t> codes(x.size());
      p.sum = sum.data(), p.y = y.data(), p.codes = codes.data(), p.scales = scales.data();
      const size_t bytes = norm_bytes(p);
      std::vector<char> memory(bytes + 64);
      void* aligned = memory.data();
      size_t space = memory.size();
      kernel(p, 0, 1, static_cast<char*>(std::align(64, bytes, aligned, space)));
      return std::make_tuple(sum, y, scales, codes);
    };
    if (result(tier.norm) != result(portable.norm)) return false;
  }
  return true;
}

// A cache that tokens are appended to, and its queries, to the bit as in the portable tier: one
// query and many, more keys than one block of sums takes, places that no token has. 0.2 ms a tier.
bool known_cache(const Tier& tier) {
  constexpr int64_t kPlaces = 600, kHeads = 2;
  const int64_t length = 0, tokens = 533;
  CacheAppend a{};
  a.b = 1, a.g = kHeads, a.n = tokens, a.d = 69, a.e = 67;
  std::vector<float> q(2 * kHeads * 5 * a.d), k(kHeads * tokens * a.d), v(kHeads * tokens * a.e);
  uint32_t state = 1;
  for (auto* floats : {&q, &k, &v}) {
    for (auto& value : *floats)
      value = static_cast<float>(static_cast<int>((state = state * 1664525 + 1013904223) >> 16) -
                                 32768) /
              16384;
  }
  std::fill_n(v.begin(), 200 * a.e, 2.0f);
  a.k = {k.data(), 0, tokens * a.d, a.d}, a.v = {v.data(), 0, tokens * a.e, a.e};
  a.length = &length;
  const auto result = [&](const CacheKernel& kernel) {
    std::vector<int8_t> keys(kHeads * kPlaces * a.d, 77), values(kHeads * kPlaces * a.e, -77);
    std::vector<float> scales(2 * kHeads * kPlaces, NAN), y(4 * kHeads * 5 * a.e);
    const auto run = [](size_t bytes, const auto& work) {
      std::vector<char> memory(bytes + 64);
      void* aligned = memory.data();
      size_t space = memory.size();
      work(static_cast<char*>(std::align(64, bytes, aligned, space)));
    };
    a.keys = {keys.data(), 0, kPlaces * a.d, a.d, scales.data(), 0, kPlaces};
    a.values = {values.data(), 0, kPlaces * a.e, a.e, scales.data() + kHeads * kPlaces, 0, kPlaces};
    for (int64_t head = 0; head < kHeads; ++head)
      run(kernel.append_bytes(a), [&](char* memory) { kernel.append(a, head, memory); });
    for (const int64_t m : {1, 5}) {
      CachedAttention p{};
      p.keys = a.keys, p.values = a.values, p.length = &tokens;
      Attention& call = p.call;
      call.b = 1, call.h = 2 * kHeads, call.g = kHeads, call.m = m, call.n = kPlaces;
      call.d = a.d, call.e = a.e, call.causal = true, call.unit = 300.0f;
      call.q = {q.data(), 0, m * a.d, a.d}, call.y = y.data() + (m > 1 ? call.h * a.e : 0);
      for (int64_t block = 0; block < CacheBlocks(call).count; ++block)
        run(kernel.scratch_bytes(p), [&](char* memory) { kernel.rows(p, block, nullptr, memory); });
    }
    return y;
  };
  return result(tier.cache) == result(portable.cache);
}

// Why a tier may not be used, or null; tried once a process.
const char* why_not(size_t index) {
  static const auto reasons = [] {
    std::array<const char*, std::size(kTiers)> found{};
    for (size_t i = 0; i < std::size(kTiers); ++i) {
      const Tier& tier = tiers()[i];
      found[i] = !tier.runs_here()           ? "this CPU lacks the instructions"
                 : !known_integers(tier)     ? "wrong integers in the known-answer test"
                 : !known_int16(tier)        ? "wrong 16-bit sums in the known-answer test"
                 : !known_int8_int4(tier)    ? "wrong sums of groups in the known-answer test"
                 : !known_floats(tier)       ? "wrong floats in the known-answer test"
                 : !known_steps(tier)        ? "wrong steps in the known-answer test"
                 : !known_convolutions(tier) ? "wrong convolutions in the known-answer test"
                 : !known_attention(tier)    ? "wrong attention in the known-answer test"
                 : !known_norms(tier)        ? "wrong norms in the known-answer test"
                 : !known_cache(tier)        ? "wrong attention to a cache in the known-answer test"
                                             : nullptr;
    }
    return found;
  }();
  return reasons[index];
}

}  // namespace

const Tier& best_tier() {
  static const Tier& best = []() -> const Tier& {
    for (size_t i = 0; i < std::size(kTiers); ++i) {
      if (why_not(i) == nullptr) return tiers()[i];
    }
    throw std::runtime_error("qnn: no kernel gives right results on this CPU.");
  }();
  return best;
}

const Tier& tier_called(const std::string& name) {
  for (size_t i = 0; i < std::size(kTiers); ++i) {
    if (name != kTiers[i]->name) continue;
    if (why_not(i) != nullptr)
      throw std::invalid_argument("qnn: tier '" + name + "' cannot run: " + why_not(i) + ".");
    return tiers()[i];
  }
  throw std::invalid_argument("qnn: unknown tier '" + name + "'.");
}

std::string cpu_tiers() {
  std::string text;
  for (size_t i = 0; i < std::size(kTiers); ++i) {
    const char* reason = why_not(i);
    text += std::string(i == 0 ? "" : ",") + kTiers[i]->name + ":" +
            (reason == nullptr ? "ok" : reason);
  }
  return text;
}

}  // namespace qnn
