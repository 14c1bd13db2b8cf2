// The tiers against plain loops, on random calls, of which two in eight are of a recurrent layer,
// two of a convolution, one of attention, and one is a lookup in a table or a norm; without torch.
//
//   kernel_test                           the tiers that this CPU can run, one a line
//   kernel_test TIERS CASES SEED [KIND]   CASES calls of each tier, or those of one KIND alone,
//   conv
//                                         or attention; TIERS: all, or names and commas
//
// Every operand, and the scratch memory, ends at a page that may not be touched, or begins behind
// one; operands are read-only. With QNN_HEAP they lie on the heap instead, in blocks of exactly
// their size, for the sanitizers. Call i is drawn from SEED + i alone, so that a failure repeats
// with the seed that it names and one case.
//
// Results are held between two bounds that go through the layer's arithmetic together. Where that
// is fixed to the bit they are equal; an activation moves them apart by what its polynomial may
// err, float32 sums over K by what their order may.
#if !defined(QNN_HEAP)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "linear/doubles.h"
#include "tiers/tiers.h"

namespace {

using qnn::Activation;
using qnn::Decoder;
using qnn::DType;
using qnn::kTiers;
using qnn::Linear;
using qnn::Tier;
using qnn::WeightFormat;
using qnn::whole;

constexpr int64_t kLongestRow = 132104;   // 128 · 127 · K stays below 2^31
constexpr int64_t kLongestFixed = 65793;  // 255 · 128 · K does

// -- float formats, by arithmetic on doubles ------------------------------------------------------

struct Format {
  const char* name;
  int bytes, digits, lowest, highest;  // digits of the significand; exponents of normal numbers
  double most() const { return std::ldexp(2 - std::ldexp(1, 1 - digits), highest); }
};

constexpr Format kFormats[] = {{"float32", 4, 24, -126, 127},
                               {"bfloat16", 2, 8, -126, 127},
                               {"float16", 2, 11, -14, 15},
                               {"float64", 8, 53, -1022, 1023}};

const Format& format_of(DType dtype) { return kFormats[static_cast<int>(dtype)]; }

// To nearest, ties to even.
double rounded(double x, const Format& f) {
  if (f.bytes == 8 || x == 0 || !std::isfinite(x)) return x;
  if (f.bytes == 4) return static_cast<float>(x);
  const int step = std::max(std::ilogb(x), f.lowest) - f.digits + 1;
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -step)), step);
  return std::fabs(y) > f.most() ? std::copysign(HUGE_VAL, x) : y;
}

// A value that `rounded` has left, in memory.
void encode(double x, const Format& f, char* to) {
  if (f.bytes == 8) return static_cast<void>(std::memcpy(to, &x, 8));
  if (f.bytes == 4) {
    const auto single = static_cast<float>(x);
    return static_cast<void>(std::memcpy(to, &single, 4));
  }
  const int special = (f.highest - f.lowest + 2) << (f.digits - 1);
  int bits = 0;
  if (std::isnan(x)) {
    bits = special | 1 << (f.digits - 2);
  } else if (std::isinf(x)) {
    bits = special;
  } else if (x != 0) {
    const int exponent = std::max(std::ilogb(x), f.lowest);
    bits = ((exponent - f.lowest) << (f.digits - 1)) +
           static_cast<int>(std::ldexp(std::fabs(x), f.digits - 1 - exponent));
  }
  const auto half = static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0));
  std::memcpy(to, &half, 2);
}

double decode(const char* from, const Format& f) {
  double value;
  if (f.bytes == 8) return std::memcpy(&value, from, 8), value;
  if (f.bytes == 4) {
    float single;
    return std::memcpy(&single, from, 4), single;
  }
  uint16_t half;
  std::memcpy(&half, from, 2);
  const int exponent = (half & 0x7fff) >> (f.digits - 1),
            fraction = half & ((1 << (f.digits - 1)) - 1);
  if (exponent == f.highest - f.lowest + 2) {
    value = fraction == 0 ? HUGE_VAL : NAN;
  } else {
    const int whole = exponent == 0 ? fraction : fraction + (1 << (f.digits - 1));
    value = std::ldexp(whole, std::max(exponent, 1) - 1 + f.lowest - f.digits + 1);
  }
  return half & 0x8000 ? -value : value;
}

// -- formats of weights ---------------------------------------------------------------------------

double value_of_e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude = (code & 127) == 127 ? NAN
                           : exponent == 0     ? std::ldexp(mantissa, -9)
                                               : std::ldexp(8 + mantissa, exponent - 10);
  return code & 128 ? -magnitude : magnitude;
}

double value_of_e2m1(int code) {
  static const double kMagnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -kMagnitudes[code & 7] : kMagnitudes[code & 7];
}

// -- memory ---------------------------------------------------------------------------------------

class Memory {
 public:
  Memory(size_t bytes, [[maybe_unused]] bool at_end, int fill) {
#if defined(QNN_HEAP)
    if (posix_memalign(&base_, 64, std::max<size_t>(bytes, 1)) != 0) std::abort();
    data_ = static_cast<char*>(base_);
#else
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    pages_ = (bytes + page - 1) / page * page;
    all_ = pages_ + 2 * page;
    base_ = mmap(nullptr, all_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) std::abort();
    first_ = static_cast<char*>(base_) + page;
    if (pages_ > 0 && mprotect(first_, pages_, PROT_READ | PROT_WRITE) != 0) std::abort();
    data_ = at_end ? first_ + pages_ - bytes : first_;
#endif
    std::memset(data_, fill, bytes);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
#if defined(QNN_HEAP)
    std::free(base_);
#else
    munmap(base_, all_);
#endif
  }

  char* data() const { return data_; }
  void make_read_only() const {
#if !defined(QNN_HEAP)
    if (pages_ > 0 && mprotect(first_, pages_, PROT_READ) != 0) std::abort();
#endif
  }

 private:
  void* base_;
  char* data_;
#if !defined(QNN_HEAP)
  char* first_;
  size_t pages_, all_;
#endif
};

// -- one call -------------------------------------------------------------------------------------

// What is drawn; floats are held as the doubles that they are, rounded to their dtype.
struct Call {
  uint64_t seed = 0;
  bool weight_only = false, codes = false, fixed = false, at_end = false;
  bool wide = false;  // codes of x have 16 bits
  int zero_point = 0;
  float grid_scale = 0;
  int parts = 1;
  WeightFormat weight = qnn::kInt8;
  int64_t m = 0, k = 0, n = 0;
  DType x_dtype{}, bias_dtype{}, y_dtype{};
  Activation activation{};
  std::vector<double> x, bias, residual;  // the last two: empty, or given
  std::vector<int16_t> xq;
  std::vector<int8_t> w;             // bytes of any format
  std::vector<uint8_t> group_codes;  // scales of e2m1's groups, or zero points
  std::vector<float> group_scales;
  std::vector<double> values;  // of a weight that is not int8
  std::vector<float> sx, sw;

  int64_t groups() const { return weight.groups(k); }
  // int8 rows times int4.
  bool sums_of_groups() const { return !weight_only && weight.decoder == Decoder::int4; }

  std::string text() const {
    char line[500], grid[80] = "";
    if (fixed) std::snprintf(grid, sizeof grid, " fixed %g from %d", grid_scale, zero_point);
    std::snprintf(
        line, sizeof line,
        "%s%s m=%lld k=%lld n=%lld x=%s bias=%s residual=%s activation=%s y=%s parts=%d, "
        "operands %s "
        "(repeat with 1 case and seed %llu)",
        (sums_of_groups() ? "int8 times " + qnn::text(weight)
         : weight_only    ? "weight of " + qnn::text(weight)
         : wide           ? "int16"
                          : "int8")
            .c_str(),
        grid, static_cast<long long>(m), static_cast<long long>(k), static_cast<long long>(n),
        codes ? "codes" : format_of(x_dtype).name,
        bias.empty() ? "none" : format_of(bias_dtype).name, residual.empty() ? "none" : "given",
        qnn::kActivations[static_cast<int>(activation)], format_of(y_dtype).name, parts,
        at_end ? "end at a page" : "begin at a page", static_cast<unsigned long long>(seed));
    return line;
  }
};

class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}

  Call call(uint64_t seed) {
    Call c;
    c.seed = seed;
    sizes(c);
    c.weight_only = one_in(2);
    if (c.weight_only) format(c);
    if (c.weight.decoder == Decoder::int4) {
      c.weight_only = one_in(2);
    } else if (!c.weight_only) {
      c.codes = one_in(3);
      c.wide = !c.codes && one_in(3);
      if (!c.codes && one_in(2)) grid(c);
    }
    c.at_end = !one_in(3);
    c.parts = one_in(2) ? 1 : between(2, 5);
    c.x_dtype = dtype();
    c.y_dtype = c.codes ? dtype() : c.x_dtype;
    c.bias_dtype = dtype();
    c.activation = one_in(3) ? Activation::none : static_cast<Activation>(between(1, 7));
    weight(c);
    rows(c);
    if (!one_in(3)) c.bias = floats(c.n, format_of(c.bias_dtype));
    if (one_in(2)) c.residual = floats(c.m * c.n, format_of(c.y_dtype));
    return c;
  }

 protected:
  int between(int first, int last) {
    return std::uniform_int_distribution<int>(first, last)(random_);
  }
  bool one_in(int n) { return between(1, n) == 1; }
  double normal() { return normal_(random_); }
  DType dtype() { return static_cast<DType>(between(0, 3)); }

  // Small ones, the edges of blocks, and any.
  int64_t size(int most) {
    static const int kBlocks[] = {4, 8, 16, 48, 64, 96, 256, 512, 1024};
    switch (between(0, 3)) {
      case 0:
        return between(1, std::min(most, 20));
      case 1:
        return between(1, most);
      default: {
        const int block = kBlocks[between(0, 8)];
        return std::clamp(between(1, std::max(1, most / block)) * block + between(-1, 1), 1, most);
      }
    }
  }

  void sizes(Call& c) {
    const int64_t most = one_in(30) ? int64_t{1} << 26 : int64_t{1} << 22;
    do {
      c.m = size(300), c.k = size(1100), c.n = size(1100);
    } while (c.m * c.k * c.n > most);
    if (one_in(40)) c.m = 0;
    if (one_in(40)) c.k = 0;
    if (one_in(60))
      c.m = between(1, 20), c.n = between(1, 20),
      c.k = one_in(2) ? kLongestRow : between(2000, kLongestRow);
  }

  // Bytes of any kind; few codes of NaN, which spoil a column of y each.
  uint8_t e4m3() {
    const auto code = static_cast<uint8_t>(random_() >> 56);
    return (code & 127) == 127 && !one_in(30) ? code ^ 1 : code;
  }

  void format(Call& c) {
    const WeightFormat kFormats[] = {qnn::kInt8, qnn::kE4m3, qnn::kE2m1};
    const int which = between(0, 4);
    c.weight = which < 3 ? kFormats[which] : qnn::int4_in_groups(32 << between(0, 2), one_in(2));
    if (which > 2) c.k = (c.k + c.weight.group - 1) / c.weight.group * c.weight.group;
  }

  // Codes of any kind, and what they stand for.
  void decoded_weight(Call& c) {
    const bool e4m3 = c.weight.decoder == Decoder::e4m3, e2m1 = c.weight.decoder == Decoder::e2m1;
    const int64_t stride = c.weight.row_bytes(c.k), groups = c.groups();
    c.w.resize(c.n * stride);
    c.group_codes.resize(e2m1 || c.weight.zero_points ? c.n * groups : 0);
    c.group_scales.resize(c.weight.decoder == Decoder::int4 ? c.n * groups : 0);
    c.values.resize(c.n * c.k);
    for (int8_t& byte : c.w)
      byte = static_cast<int8_t>(e4m3 ? this->e4m3() : static_cast<uint8_t>(random_() >> 56));
    for (uint8_t& code : c.group_codes)
      code = e2m1 ? this->e4m3() : static_cast<uint8_t>(between(0, 15));
    for (float& scale : c.group_scales) scale = this->scale();
    for (int64_t j = 0; j < c.n; ++j) {
      // Of long rows few are without a NaN.
      const bool clean = !one_in(6);
      if (!c.group_scales.empty() && groups > 0 && !clean && one_in(3))
        c.group_scales[j * groups + between(0, static_cast<int>(groups) - 1)] = NAN;
      for (int64_t l = 0; l < c.k; ++l) {
        int8_t& byte = c.w[j * stride + (e4m3 ? l : l / 2)];
        double& value = c.values[j * c.k + l];
        if (e4m3) {
          if (clean && (byte & 127) == 127) byte ^= 1;
          value = value_of_e4m3(static_cast<uint8_t>(byte));
          continue;
        }
        const int64_t group = j * groups + l / c.weight.group;
        const int code = byte >> (l % 2 * 4) & 15;
        if (e2m1) {
          uint8_t& scale = c.group_codes[group];
          if (clean && (scale & 127) == 127) scale ^= 1;
          value = value_of_e2m1(code) * value_of_e4m3(scale);
        } else {
          value = code - (c.weight.zero_points ? c.group_codes[group] : 8);
          value *= c.group_scales[group];
        }
      }
    }
    if (c.weight.grouped()) {
      const float all = c.weight.decoder == Decoder::int4 || c.sw.empty() ? 1.0f : c.sw[0];
      std::fill(c.sw.begin(), c.sw.end(), all);
    }
  }

  float scale() {
    static const float kOdd[] = {0, -0.5f, 1e-38f, 1e30f};
    return one_in(20)   ? kOdd[between(0, 3)]
           : one_in(10) ? 1
                        : static_cast<float>(1e-3 + 2e-2 * std::fabs(normal()));
  }

  void grid(Call& c) {
    static const float kOdd[] = {NAN, FLT_MIN, 1e30f, 1, 0.5f};
    c.fixed = true;
    c.k = std::min(c.k, kLongestFixed);
    c.zero_point = c.wide || one_in(3) ? 0
                   : one_in(3)         ? (one_in(2) ? -128 : 127)
                                       : between(-128, 127);
    c.grid_scale = one_in(3) ? kOdd[between(0, 4)] : static_cast<float>(0.03 * std::exp(normal()));
  }

  void weight(Call& c) {
    c.w.resize(c.n * c.k);
    c.sw.resize(c.n);
    for (int64_t j = 0; j < c.n; ++j) {
      int8_t* row = c.w.data() + j * c.k;
      const int kind = between(0, 9);
      for (int64_t l = 0; l < c.k; ++l) {
        row[l] = static_cast<int8_t>(kind == 0   ? -128
                                     : kind == 1 ? 127
                                     : kind == 2 ? (l % 2 ? 127 : -128)
                                                 : random_() >> 56);
      }
      c.sw[j] = scale();
    }
    if (c.weight.decoder != Decoder::int8) decoded_weight(c);
  }

  void rows(Call& c) {
    const Format& f = format_of(c.x_dtype);
    c.xq.resize(c.m * c.k);
    c.sx.resize(c.m);
    if (!c.codes) c.x.resize(c.m * c.k);
    for (int64_t i = 0; i < c.m; ++i) {
      const int kind = between(0, 15);
      if (c.codes) {
        for (int64_t l = 0; l < c.k; ++l)
          c.xq[i * c.k + l] =
              static_cast<int16_t>(kind < 2 ? (kind ? 127 : -127) : between(-127, 127));
        c.sx[i] = kind == 2 ? NAN : kind == 3 ? INFINITY : static_cast<float>(std::fabs(normal()));
        continue;
      }
      double* row = c.x.data() + i * c.k;
      // Subnormal scales, overflow in float32, and what float64 alone holds.
      static const int kPowers[] = {-320, -44, -40, -38, -20, 20, 36, 38, 300};
      const double unit = kind < 3   ? std::pow(10, kPowers[between(0, 8)])
                          : kind < 8 ? std::exp(4 * normal())
                                     : 1;
      for (int64_t l = 0; l < c.k; ++l) {
        // Halves in a row whose scale is 1: ties. Else any number, with zeros of either sign.
        row[l] = kind == 8    ? 0
                 : kind == 9  ? between(-253, 253) * 0.5
                 : kind == 10 ? 1
                              : normal() * unit;
        if (kind == 11 && one_in(2)) row[l] = one_in(2) ? 0.0 : -0.0;
      }
      if (c.k == 0) continue;
      const int64_t at = between(0, static_cast<int>(c.k) - 1);
      if (kind == 9) row[at] = 127;
      if (kind == 12) row[at] = one_in(2) ? NAN : -NAN;
      if (kind == 13) row[at] = one_in(2) ? HUGE_VAL : -HUGE_VAL;
      for (int64_t l = 0; l < c.k; ++l) row[l] = rounded(row[l], f);
    }
  }

  std::vector<double> floats(int64_t count, const Format& f) {
    std::vector<double> values(count);
    const double unit = one_in(4) ? 100 : 1;
    for (double& v : values) v = rounded(normal() * unit, f);
    if (count > 0 && one_in(8))
      values[between(0, static_cast<int>(count) - 1)] = one_in(2) ? NAN : -HUGE_VAL;
    return values;
  }

  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
};

// -- what is right --------------------------------------------------------------------------------

// As kernels/int8_static.py says it.
void quantize_on_grid(Call& c) {
  const float inverse = 1 / c.grid_scale;
  for (int64_t i = 0; i < c.m; ++i) {
    bool good = std::isfinite(c.grid_scale);
    for (int64_t l = 0; l < c.k; ++l)
      good = good && std::isfinite(static_cast<float>(c.x[i * c.k + l]));
    c.sx[i] = good ? c.grid_scale : NAN;
    for (int64_t l = 0; good && l < c.k; ++l) {
      const float q = std::nearbyint(static_cast<float>(c.x[i * c.k + l]) * inverse);
      const float high = c.wide ? 32767.0f : 127.0f, low = c.wide ? -32767.0f : -128.0f;
      c.xq[i * c.k + l] =
          static_cast<int16_t>(std::clamp(q + static_cast<float>(c.zero_point), low, high));
    }
  }
}

// As kernels/int8.py says it.
void quantize(Call& c) {
  if (c.fixed) return quantize_on_grid(c);
  const float most = c.wide ? 32767.0f : 127.0f;
  for (int64_t i = 0; i < c.m; ++i) {
    const double* row = c.x.data() + i * c.k;
    float amax = 0;
    for (int64_t l = 0; l < c.k; ++l) {
      const float magnitude = std::fabs(static_cast<float>(row[l]));
      if (!(magnitude <= amax)) amax = magnitude;
      if (std::isnan(amax)) break;
    }
    const float scale = amax == 0 ? 1 : std::isnan(amax) ? amax : std::max(amax / most, FLT_MIN);
    const float inverse = 1 / scale;
    for (int64_t l = 0; l < c.k; ++l) {
      const float q =
          std::isfinite(scale) ? std::nearbyint(static_cast<float>(row[l]) * inverse) : 0;
      c.xq[i * c.k + l] = static_cast<int16_t>(std::clamp(q, -most, most));
    }
    c.sx[i] = scale;
  }
}

struct Bounds {
  double low, high;
  bool any = false;     // overflow that depends on the order of a sum
  bool fixed = false;   // to the bit, the sign of a zero included
  bool or_nan = false;  // of an inf in x, which NaN may stand for

  template <class Function>
  void apply(const Function& f) {
    const double a = f(low), b = f(high);
    low = std::min(a, b), high = std::max(a, b);
    // NaN on one side only, as where a bound overflows and meets an inf of the other sign.
    if (std::isnan(a) != std::isnan(b)) any = true;
    if (std::isnan(a)) low = high = a;
  }
};

Bounds integer_sum(const Call& c, int64_t i, int64_t j) {
  const int16_t* x = c.xq.data() + i * c.k;
  const int8_t* w = c.w.data() + j * c.k;
  int64_t sum = 0;
  for (int64_t begin = 0; begin < c.k; begin += 256) {
    int32_t some = 0;
    for (int64_t l = begin; l < std::min(begin + 256, c.k); ++l)
      some += (x[l] - c.zero_point) * w[l];
    sum += some;
  }
  const double value = static_cast<float>(sum);
  return {value, value, false, c.activation <= Activation::relu};
}

// As kernels/reference/int8_int4.py says it.
Bounds group_sum(const Call& c, int64_t i, int64_t j) {
  const int16_t* x = c.xq.data() + i * c.k;
  float total = 0;
  for (int64_t group = 0; group < c.groups(); ++group) {
    const int64_t at = j * c.groups() + group;
    const int zero = c.weight.zero_points ? c.group_codes[at] : 8;
    int32_t sum = 0;
    for (int64_t l = group * c.weight.group; l < (group + 1) * c.weight.group; ++l) {
      const int code = c.w[j * c.weight.row_bytes(c.k) + l / 2] >> (l % 2 * 4) & 15;
      sum += x[l] * (code - zero);
    }
    total = total + static_cast<float>(sum) * c.group_scales[at];
  }
  return {total, total, false, c.activation <= Activation::relu};
}

Bounds float_sum(const Call& c, int64_t i, int64_t j) {
  const double* x = c.x.data() + i * c.k;
  const int8_t* w = c.w.data() + j * c.k;
  double sum = 0, magnitude = 0;
  for (int64_t l = 0; l < c.k; ++l) {
    const double value = c.values.empty() ? w[l] : c.values[j * c.k + l];
    const double product = static_cast<double>(static_cast<float>(x[l])) * value;
    sum += product;
    if (std::isfinite(product)) magnitude += std::fabs(product);
  }
  const bool any = magnitude > FLT_MAX / 2;
  const bool infinite = std::any_of(x, x + c.k, [](double v) { return !std::isfinite(float(v)); });
  if (!std::isfinite(sum))
    return {sum, sum, any, false, c.weight.decoder == Decoder::int4 && infinite};
  // K roundings, each of at most half a unit in the last place of a partial sum, or of the smallest
  // number; e4m3 may be summed as 1/256 of its value.
  const int smallest = c.weight.decoder == Decoder::e4m3 ? -142 : -150;
  double error =
      static_cast<double>(c.k + 1) * (std::ldexp(magnitude, -24) + std::ldexp(1, smallest));
  // Of more than 12 rows the products may be of bfloat16. There x is in up to three parts, which
  // are added for every 32 codes, and 2^-86 of the largest of a row may count as 0, in x, products
  // and sums.
  if (c.m > 12) {
    double most = 0, weights = 0, unit = 1;
    for (int64_t l = 0; l < c.k; ++l) {
      if (std::isfinite(static_cast<float>(x[l]))) most = std::max(most, std::fabs(x[l]));
      weights += std::fabs(c.values.empty() ? w[l] : c.values[j * c.k + l]);
    }
    for (int64_t g = 0; g < c.groups() && !c.group_scales.empty(); ++g)
      unit = std::max(unit, std::fabs(double{c.group_scales[j * c.groups() + g]}));
    error += static_cast<double>(c.k / 8 + 2) * std::ldexp(magnitude, -24) +
             std::ldexp(most, -86) * (weights + 4 * unit * static_cast<double>(c.k + 2));
  }
  // Of int4 x may be rounded too: by 2^-23 of the largest of its eight, or by 2^-127.
  for (int64_t l = 0; c.weight.decoder == Decoder::int4 && l < c.k; l += 8) {
    double most = 0, weights = 0;
    for (int64_t i = l; i < l + 8; ++i) {
      most = std::max(most, std::fabs(x[i]));
      weights += std::fabs(c.values[j * c.k + i]);
    }
    error += (std::ldexp(most, -23) + std::ldexp(1, -127)) * weights;
  }
  return {static_cast<float>(sum - error), static_cast<float>(sum + error), any};
}

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < 0 ? 0 : x;
    case Activation::gelu:
      return 0.5 * x * (1 + std::erf(x * M_SQRT1_2));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::relu6:
      return x < 0 ? 0 : x > 6 ? 6 : x;
    case Activation::hardswish:
      return x * activated(Activation::relu6, x + 3) / 6;
    case Activation::hardsigmoid:
      return activated(Activation::relu6, x + 3) / 6;
  }
  return x;
}

void activate(Bounds& y, Activation activation, const Format& f) {
  if (activation <= Activation::relu)
    return y.apply([&](double x) { return activated(activation, x); });
  if (!std::isfinite(y.low) || !std::isfinite(y.high)) {
    if (y.low != y.high && !std::isnan(y.low)) y.any = true;
    return y.apply([&](double x) { return activated(activation, x); });
  }
  // Six times x comes before the division.
  const double largest = std::max(std::fabs(y.low), std::fabs(y.high));
  if (activation == Activation::hardswish && f.bytes != 8 && largest > FLT_MAX / 6.001)
    y.any = true;
  // The slopes are at most 1.5. The polynomials err by a share of x, not of the result, which may
  // be far smaller.
  const bool moved = activation >= Activation::hardswish;  // of x + 3
  const double error =
      0.75 * (y.high - y.low) + (moved ? largest + 3 : largest) * (f.bytes == 8 ? 1e-15 : 5e-7);
  const double middle = activated(activation, (y.low + y.high) / 2);
  y.low = rounded(middle - error, f), y.high = rounded(middle + error, f);
}

Bounds expected(const Call& c, int64_t i, int64_t j) {
  const Format& f = format_of(c.y_dtype);
  const auto single = [](double x) { return static_cast<float>(x); };
  Bounds y = c.weight_only        ? float_sum(c, i, j)
             : c.sums_of_groups() ? group_sum(c, i, j)
                                  : integer_sum(c, i, j);
  y.apply([&](double v) { return single(v) * c.sw[j]; });
  if (!c.weight_only) y.apply([&](double v) { return single(v) * c.sx[i]; });
  if (!c.bias.empty()) y.apply([&](double v) { return single(v) + single(c.bias[j]); });
  y.apply([&](double v) { return rounded(v, f); });
  activate(y, c.activation, f);
  if (!c.residual.empty()) {
    const double residual = c.residual[i * c.n + j];
    y.apply([&](double v) {
      return f.bytes == 8 ? v + residual : rounded(single(v) + single(residual), f);
    });
  }
  return y;
}

bool holds(const Bounds& want, double got) {
  if (want.any || (want.or_nan && std::isnan(got))) return true;
  if (std::isnan(want.low)) return std::isnan(got);
  if (want.fixed && std::signbit(got) != std::signbit(want.low)) return false;
  return want.low <= got && got <= want.high;
}

// -- running --------------------------------------------------------------------------------------

char running[900];  // the call, for the last words

#if !defined(QNN_HEAP)
void last_words(int signal) {
  const char* name = signal == SIGILL ? "\nillegal instruction: " : "\nmemory out of bounds: ";
  if (write(2, name, std::strlen(name)) + write(2, running, std::strlen(running)) +
          write(2, "\n", 1) <
      0)
    _exit(2);
  _exit(1);
}
#endif

// Read-only, each at a page.
class Operands {
 public:
  explicit Operands(bool at_end) : at_end_(at_end) {}

  const char* place(const void* data, size_t bytes) {
    placed_.push_back(std::make_unique<Memory>(bytes, at_end_, 0xff));
    if (bytes > 0) std::memcpy(placed_.back()->data(), data, bytes);
    placed_.back()->make_read_only();
    return placed_.back()->data();
  }
  const char* place_floats(const std::vector<double>& values, DType dtype) {
    const Format& f = format_of(dtype);
    std::vector<char> bytes(values.size() * f.bytes);
    for (size_t i = 0; i < values.size(); ++i) encode(values[i], f, bytes.data() + i * f.bytes);
    return place(bytes.data(), bytes.size());
  }
  void place_weight(const Call& c, Linear& p) {
    p.weight = c.weight;
    p.w = reinterpret_cast<const int8_t*>(place(c.w.data(), c.w.size()));
    const char* codes = place(c.group_codes.data(), c.group_codes.size());
    const char* floats = place(c.group_scales.data(), c.group_scales.size() * sizeof(float));
    if (c.weight.grouped() && c.k > 0)
      p.group_scale = c.weight.scale == qnn::ScaleKind::e4m3 ? codes : floats;
    if (c.weight.zero_points && c.k > 0) p.zero_points = reinterpret_cast<const uint8_t*>(codes);
    const size_t scales = c.weight.grouped() ? std::min<size_t>(1, c.sw.size()) : c.sw.size();
    p.sw = reinterpret_cast<const float*>(place(c.sw.data(), scales * sizeof(float)));
  }

 private:
  bool at_end_;
  std::vector<std::unique_ptr<Memory>> placed_;
};

void run(const Tier& tier, const Call& c, char* y) {
  Operands operands(c.at_end);
  Linear p{};
  p.m = c.m, p.k = c.k, p.n = c.n;
  const std::vector<int8_t> codes_of_x(c.xq.begin(), c.xq.end());
  p.x = c.codes ? operands.place(codes_of_x.data(), codes_of_x.size())
                : operands.place_floats(c.x, c.x_dtype);
  p.x_dtype = c.x_dtype;
  if (c.codes)
    p.row_scale =
        reinterpret_cast<const float*>(operands.place(c.sx.data(), c.sx.size() * sizeof(float)));
  p.fixed = c.fixed, p.grid_scale = c.grid_scale, p.zero_point = c.zero_point;
  operands.place_weight(c, p);
  if (!c.bias.empty()) p.bias = operands.place_floats(c.bias, c.bias_dtype);
  p.bias_dtype = c.bias_dtype;
  if (!c.residual.empty()) p.residual = operands.place_floats(c.residual, c.y_dtype);
  p.activation = c.activation;
  p.y = y;
  p.y_dtype = c.y_dtype;

  if (const char* why = c.m > 0 && c.n > 0 ? qnn::why_not(p) : nullptr) {
    std::printf("%s\n  not a call: %s\n", running, why);
    std::exit(1);
  }
  const qnn::Kernel& kernel = c.weight_only        ? tier.weight_only
                              : c.sums_of_groups() ? tier.int8_int4
                              : c.wide             ? tier.int16
                                                   : tier.int8;
  const Linear given = p;
  std::vector<float> single_x, single_y;
  if (p.y_dtype == DType::float64) {
    single_x.resize(qnn::has_double_rows(p) ? c.m * c.k : 0), single_y.resize(c.m * c.n);
    p = qnn::without_doubles(p, single_x.data(), single_y.data());
  }
  const size_t bytes = kernel.scratch_bytes(p);
  std::vector<std::unique_ptr<Memory>> scratches;
  std::vector<std::thread> threads;
  for (int part = 0; part < c.parts; ++part) {
    scratches.push_back(std::make_unique<Memory>(bytes, c.at_end, 0xff));
    char* scratch = scratches.back()->data();
    if (c.parts == 1) {
      kernel.run(p, 0, 1, scratch);
    } else {
      threads.emplace_back(
          [&kernel, &p, &c, part, scratch] { kernel.run(p, part, c.parts, scratch); });
    }
  }
  for (std::thread& thread : threads) thread.join();
  if (given.y_dtype == DType::float64) qnn::finish_doubles(given, single_y.data());
}

// What `call` leaves in y, [rows, columns], is held against what is wanted.
template <class Run>
bool passes(const std::vector<Bounds>& want, DType dtype, bool at_end, int64_t columns,
            const Run& call) {
  const Format& f = format_of(dtype);
#if defined(QNN_HEAP)
  std::fprintf(stderr, "%s\n", running);  // a sanitizer ends the process: the last line says where
#endif
  const Memory y(want.size() * f.bytes, at_end, 0xff);
  call(y.data());
  size_t wrong = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double got = decode(y.data() + i * f.bytes, f);
    if (holds(want[i], got)) continue;
    if (wrong++ == 0) {
      std::printf("%s\n  y[%lld, %lld] = %.17g, not from %.17g to %.17g\n", running,
                  static_cast<long long>(i) / static_cast<long long>(columns),
                  static_cast<long long>(i) % static_cast<long long>(columns), got, want[i].low,
                  want[i].high);
    }
  }
  if (wrong > 0) std::printf("  %zu of %zu values are wrong\n", wrong, want.size());
  return wrong == 0;
}

bool passes(const Tier& tier, const Call& c, const std::vector<Bounds>& want) {
  std::snprintf(running, sizeof running, "%s: %s", tier.name, c.text().c_str());
  return passes(want, c.y_dtype, c.at_end, c.n, [&](char* y) { run(tier, c, y); });
}

std::vector<Tier> tiers_called(const std::string& names) {
  std::vector<Tier> found;
  for (const Tier* tier : kTiers) {
    const bool named =
        ("," + names + ",").find("," + std::string(tier->name) + ",") != std::string::npos;
    if (!named && names != "all") continue;
    if (tier->runs_here()) {
      found.push_back(whole(*tier));
    } else if (named) {
      std::printf("%s: this CPU lacks the instructions\n", tier->name);
      std::exit(2);
    }
  }
  return found;
}

}  // namespace

#include "attention_case.h"
#include "cache_case.h"
#include "conv_case.h"
#include "lookup_case.h"
#include "norm_case.h"
#include "recurrent_case.h"

int main(int argc, char** argv) {
  if (argc == 1) {
    for (const Tier* tier : kTiers) {
      if (tier->runs_here()) std::printf("%s\n", tier->name);
    }
    return 0;
  }
  const std::string kind = argc == 5 ? argv[4] : "";
  const bool convolutions = kind == "conv", attention = kind == "attention";
  if (argc != 4 && !convolutions && !attention) {
    std::fprintf(stderr, "usage: kernel_test [TIERS CASES SEED [conv | attention]]\n");
    return 2;
  }
#if !defined(QNN_HEAP)
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL}) std::signal(signal, last_words);
#endif
  const std::vector<Tier> tiers = tiers_called(argv[1]);
  const uint64_t cases = std::strtoull(argv[2], nullptr, 10),
                 seed = std::strtoull(argv[3], nullptr, 10);
  std::vector<uint64_t> failed(tiers.size());
  for (uint64_t i = 0; i < cases; ++i) {
    if (attention || (!convolutions && (seed + i) % 8 == 6)) {
      const AttentionCase c = AttentionDraw(seed + i).next(seed + i);
      const std::vector<Bounds> want = PlainAttention(c).run();
      for (size_t t = 0; t < tiers.size(); ++t)
        failed[t] += !passes(tiers[t], c, want) || !passes_by_a_cache(tiers[t], c, want);
      continue;
    }
    if (convolutions || (seed + i) % 4 == 1) {
      const ConvCase c = ConvDraw(seed + i).next(seed + i);
      for (size_t t = 0; t < tiers.size(); ++t) failed[t] += !passes(tiers[t], c);
      continue;
    }
    if ((seed + i) % 4 == 0) {
      const RecurrentCase c = RecurrentDraw(seed + i).next(seed + i);
      const std::vector<double> want = PlainRecurrent(c).run();
      for (size_t t = 0; t < tiers.size(); ++t) failed[t] += !passes(tiers[t], c, want);
      continue;
    }
    if ((seed + i) % 16 == 10) {
      const NormCase c = NormDraw(seed + i).next(seed + i);
      const NormResults want = PlainNorm(c).run();
      for (size_t t = 0; t < tiers.size(); ++t) failed[t] += !passes(tiers[t], c, want);
      continue;
    }
    if ((seed + i) % 8 == 2) {
      const LookupCase c = LookupDraw(seed + i).next(seed + i);
      std::vector<Bounds> want;
      for (size_t row = 0; row < c.results(); ++row) {
        for (int64_t column = 0; column < c.table.k; ++column)
          want.push_back(expected(c, row, column));
      }
      for (size_t t = 0; t < tiers.size(); ++t) failed[t] += !passes(tiers[t], c, want);
      continue;
    }
    Call c = Draw(seed + i).call(seed + i);
    if (!c.weight_only && !c.codes) quantize(c);
    std::vector<Bounds> want;
    for (int64_t row = 0; row < c.m; ++row) {
      for (int64_t column = 0; column < c.n; ++column) want.push_back(expected(c, row, column));
    }
    for (size_t t = 0; t < tiers.size(); ++t) failed[t] += !passes(tiers[t], c, want);
  }
  bool good = !tiers.empty();
  for (size_t t = 0; t < tiers.size(); ++t) {
    std::printf("%s: %llu cases, %llu failed\n", tiers[t].name,
                static_cast<unsigned long long>(cases), static_cast<unsigned long long>(failed[t]));
    good = good && failed[t] == 0;
  }
  return good ? 0 : 1;
}
