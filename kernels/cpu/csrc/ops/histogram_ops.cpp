// The ops of kernels/declare/histogram.py on the CPU: how many values of a tensor lie where.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "ops/arguments.h"
#include "ops/threads.h"

namespace qnn {
namespace {

constexpr int kSideBits = 11, kSide = 1 << kSideBits, kBins = 2 * kSide;
constexpr int kLeast = -115, kGreatest = 128;  // exponents, as in kernels/reference/histogram.py

// Four values, which every CPU of the supported kinds has registers for. Wider ones would not help:
// most of the time goes into the tables.
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kWide = 4;

template <class To, class From>
To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The bins of values on a grid, of which all are within it where they are `kFinite`. Zeros have a
// bin of their own after the others.
template <bool kFinite>
struct GridBins {
  static constexpr int kBins = qnn::kBins + 1;
  float scale;
  Ints operator()(Floats x) const {
    Floats at = x * scale;
    if (!kFinite) {
      constexpr float kLast = kSide - 1;
      const Floats low = Floats{} - kSide, high = Floats{} + kLast;
      at = at > low ? at : (at == at ? low : Floats{});
      at = at < high ? at : high;
    }
    const Ints whole = __builtin_convertvector(at, Ints);  // rounds to zero
    // A comparison that is true is -1.
    const Ints bin = whole + (at < __builtin_convertvector(whole, Floats)) + kSide;
    return (x == 0.0f) ? Ints{} + qnn::kBins : bin;
  }
};

struct ExponentBins {
  static constexpr int kBins = 256;
  Ints operator()(Floats x) const { return (bits_of<Ints>(x) >> 23) & 255; }
};

// Four bins, two by two: SSE2 takes no more out of a vector at a time.
typedef uint64_t Pairs __attribute__((vector_size(16)));

// Values that follow each other are often in one bin, and an addition to memory waits for the one
// before: so they go to kWide tables in turn, where there are enough of them to be worth these.
constexpr int64_t kFew = 1 << 15, kWorth = 1 << 16, kMost = int64_t{1} << 32;

template <class Bins, class Table>
void add(const float* x, int64_t n, const Bins& bins_of, Table* table, int64_t stride) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    Floats values;
    std::memcpy(&values, x + i, sizeof(values));
    const auto pairs = bits_of<Pairs>(bins_of(values));
    for (int pair = 0; pair < kWide / 2; ++pair) {
      Table* both = table + 2 * pair * stride;
      ++both[static_cast<uint32_t>(pairs[pair])];
      ++both[stride + static_cast<int64_t>(pairs[pair] >> 32)];
    }
  }
  for (; i < n; ++i) ++table[bins_of(Floats{} + x[i])[0]];
}

// Adds to `y` how many of the `n` values are in which bin.
template <class Bins>
void count(const float* x, int64_t n, const Bins& bins_of, int64_t* y) {
  if (n < kFew) return add(x, n, bins_of, y, 0);
  constexpr int64_t kTables = int64_t{kWide} * Bins::kBins;
  for (int64_t first = 0; first < n; first += kMost) {  // as many as 32 bits can count
    const int64_t size = std::min(kMost, n - first);
    const auto bytes = [](int parts) { return parts * kTables * sizeof(uint32_t); };
    uint32_t* all = nullptr;
    int64_t tables = 0;
    share_memory(size / kWorth, bytes, [&](int begin, int end, int parts, char* scratch) {
      auto* held = reinterpret_cast<uint32_t*>(scratch);
      if (begin == 0) all = held, tables = int64_t{parts} * kWide;
      for (int part = begin; part < end; ++part) {
        const int64_t from = size * part / parts, to = size * (part + 1) / parts;
        uint32_t* mine = held + part * kTables;
        std::fill(mine, mine + kTables, 0);
        add(x + first + from, to - from, bins_of, mine, Bins::kBins);
      }
    });
    for (int64_t table = 0; table < tables; ++table)
      for (int bin = 0; bin < Bins::kBins; ++bin) y[bin] += all[table * Bins::kBins + bin];
  }
}

// The least and the greatest of values; both NaN where one is.
struct Ends {
  float low = INFINITY, high = -INFINITY;
  bool finite() const { return std::isfinite(low) && std::isfinite(high); }
  void widen(const Ends& other) {
    if (std::isnan(low) || std::isnan(other.low)) {
      low = high = NAN;
    } else {
      low = std::min(low, other.low), high = std::max(high, other.high);
    }
  }
};

Ends ends_of_part(const float* x, int64_t n) {
  constexpr int kTurns = 4;  // an operation waits for the one before
  Floats low[kTurns], high[kTurns];
  Ints nan[kTurns] = {};
  for (int turn = 0; turn < kTurns; ++turn)
    low[turn] = Floats{} + INFINITY, high[turn] = Floats{} - INFINITY;
  int64_t i = 0;
  for (; i + kTurns * kWide <= n; i += kTurns * kWide) {
    for (int turn = 0; turn < kTurns; ++turn) {
      Floats values;
      std::memcpy(&values, x + i + turn * kWide, sizeof(values));
      low[turn] = values < low[turn] ? values : low[turn];
      high[turn] = values > high[turn] ? values : high[turn];
      nan[turn] |= values != values;
    }
  }
  Ends all;
  const auto add = [&all](float low, float high) { all.widen({low, high}); };
  for (int turn = 0; turn < kTurns && i > 0; ++turn)
    for (int lane = 0; lane < kWide; ++lane)
      nan[turn][lane] != 0 ? add(NAN, NAN) : add(low[turn][lane], high[turn][lane]);
  for (; i < n; ++i) add(x[i], x[i]);
  return all;
}

Ends ends_of(const float* x, int64_t n) {
  std::vector<Ends> of_parts(parts_of(n / kWorth));
  share(n / kWorth, [&](int part, int parts) {
    const int64_t from = n * part / parts;
    of_parts[part] = ends_of_part(x + from, n * (part + 1) / parts - from);
  });
  Ends all;
  for (const Ends& each : of_parts) all.widen(each);
  return all;
}

// The least e with all values of a range below 2^e in magnitude.
int32_t exponent_of(const Ends& ends) {
  const float amax = std::max(-ends.low, ends.high);
  return std::clamp((bits_of<int32_t>(amax) >> 23) - 126, kLeast, kGreatest);
}

using Statistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Statistics histogram(const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& counts,
                     const Tensor& exponent, const Tensor& magnitudes) {
  static const Signature& signature = signature_of("histogram");
  Arguments args(signature, x, low, high, counts, exponent, magnitudes);
  const int64_t rows = x.size(0), n = x.size(1);
  const auto floats = [&] { return args.empty({rows}, ScalarType::Float); };
  Statistics all{floats(), floats(), args.empty({rows, kBins}, ScalarType::Long),
                 args.empty({rows}, ScalarType::Int),
                 args.empty({ExponentBins::kBins}, ScalarType::Long)};
  auto* least = static_cast<float*>(std::get<0>(all).data_ptr());
  auto* most = static_cast<float*>(std::get<1>(all).data_ptr());
  auto* result = static_cast<int64_t*>(std::get<2>(all).data_ptr());
  auto* larger = static_cast<int32_t*>(std::get<3>(all).data_ptr());
  auto* by_exponent = static_cast<int64_t*>(std::get<4>(all).data_ptr());
  const auto *least_before = args.data<float>(low), *most_before = args.data<float>(high);
  const auto* old = args.data<int32_t>(exponent);
  const auto* values = args.data<float>(x);
  const auto* before = args.data<int64_t>(counts);
  for (int64_t row = 0; row < rows; ++row, values += n) {
    const Ends ends = ends_of(values, n);
    Ends both{least_before[row], most_before[row]};
    both.widen(ends);
    least[row] = both.low, most[row] = both.high;
    const int32_t now = std::clamp(ends.finite() ? std::max(old[row], exponent_of(ends)) : old[row],
                                   kLeast, kGreatest);
    larger[row] = now;
    const auto shift =
        static_cast<int>(std::clamp(int64_t{now} - old[row], int64_t{0}, int64_t{31}));
    int64_t counted[kBins + 1] = {};
    for (int bin = 0; bin < kBins; ++bin)  // rounds down: to the bin that holds it
      counted[((bin - kSide) >> shift) + kSide] += before[row * kBins + bin];
    const auto scale = bits_of<float>((kSideBits - now + 127) << 23);
    if (ends.finite()) {
      count(values, n, GridBins<true>{scale}, counted);
    } else {
      count(values, n, GridBins<false>{scale}, counted);
    }
    std::copy(counted, counted + kBins, result + row * kBins);
  }
  std::copy_n(args.data<int64_t>(magnitudes), ExponentBins::kBins, by_exponent);
  count(args.data<float>(x), rows * n, ExponentBins{}, by_exponent);
  return all;
}

Tensor exponents(const Tensor& x, const Tensor& counts) {
  static const Signature& signature = signature_of("exponents");
  Arguments args(signature, x, counts);
  Tensor y = args.empty({ExponentBins::kBins}, ScalarType::Long);
  auto* counted = static_cast<int64_t*>(y.data_ptr());
  std::copy_n(args.data<int64_t>(counts), ExponentBins::kBins, counted);
  count(args.data<float>(x), x.numel(), ExponentBins{}, counted);
  return y;
}

[[maybe_unused]] const bool added = add_ops({
    {"histogram", TORCH_BOX(&histogram)},
    {"exponents", TORCH_BOX(&exponents)},
});

}  // namespace
}  // namespace qnn
