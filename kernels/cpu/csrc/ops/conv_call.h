// What a call of a convolution on the CPU is made of, plain or transposed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "ops/arguments.h"
#include "ops/threads.h"
#include "tiers/tier_choice.h"

namespace qnn {
namespace {

using Ints = std::vector<int64_t>;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
constexpr int64_t kLimit = std::numeric_limits<int32_t>::max() / (127 * 128);
constexpr int64_t kFixedLimit = std::numeric_limits<int32_t>::max() / (255 * 128);

inline bool usable(float scale) {
  return scale >= std::numeric_limits<float>::min() && std::isfinite(scale);
}

inline std::string listed(const Ints& all) {
  std::string text;
  for (const int64_t each : all) text += (text.empty() ? "" : ", ") + std::to_string(each);
  return "[" + text + "]";
}

inline Ints sizes_of(const Tensor& t, int64_t from = 0) {
  Ints sizes;
  for (int64_t i = from; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

inline int64_t least(const Ints& of) { return *std::min_element(of.begin(), of.end()); }

// Parts of `_rule` in kernels/declare/conv.py.
inline void require_geometry(const Arguments& args, const Ints& stride, const Ints& dilation,
                             int64_t groups) {
  if (std::min({least(stride), least(dilation), groups}) < 1)
    args.fail("stride, dilation and groups must be at least 1, got " + listed(stride) + ", " +
              listed(dilation) + " and " + std::to_string(groups));
}

inline void require_products(const Arguments& args, const Ints& image, const Ints& w,
                             int64_t groups, int64_t products, int64_t limit) {
  if (std::min(least(Ints(image.begin() + 1, image.end())), least(w)) < 1)
    args.fail("only the batch may be empty, got an image " + listed(image) + " and kernels " +
              listed(w));
  if (image[1] % groups != 0 || w[0] % groups != 0)
    args.fail("groups must divide the channels, " + std::to_string(image[1]) + " and " +
              std::to_string(w[0]) + ", got " + std::to_string(groups));
  if (products > limit)
    args.fail("the products of an output must be at most " + std::to_string(limit) +
              ", beyond which an int32 sum can overflow, got " + std::to_string(products) +
              "; use the scheme int8_weight");
}

inline void require_result(const Arguments& args, const Ints& image, const Ints& w,
                           const Ints& stride, const Ints& padding, const Ints& dilation,
                           const Ints& out) {
  if (least(out) < 1)
    args.fail("kernels of " + listed({w.begin() + 2, w.end()}) + " with stride " + listed(stride) +
              ", padding " + listed(padding) + " and dilation " + listed(dilation) +
              " leave nothing of an image of " + listed({image.begin() + 2, image.end()}) +
              ": the result would be " + listed(out) +
              "; use a larger image, more padding or smaller kernels");
}

// Parts that a call is worth: a thread more from so many products, or values of x, to each.
inline int64_t parts_worth(const Conv& p) {
  constexpr int64_t kProducts = 1 << 20, kValues = 1 << 16;
  return std::max(p.pixels() * p.outputs * p.depth() * p.taps() / kProducts,
                  (p.batch * p.sample() + p.pixels() * p.outputs) / kValues);
}

// The largest magnitudes of the samples, as bits.
inline std::vector<int32_t> magnitudes(const ConvKernel& kernel, const Conv& p) {
  constexpr int64_t kValues = 1 << 16;
  const int parts = qnn::parts_of(p.batch * p.sample() / kValues);
  std::vector<int32_t> each(parts * p.batch);
  share(parts,
        [&](int part, int all) { kernel.magnitudes(p, part, all, each.data() + part * p.batch); });
  for (int64_t i = 0; i < p.batch; ++i) {
    for (int part = 1; part < parts; ++part) each[i] = std::max(each[i], each[part * p.batch + i]);
  }
  each.resize(p.batch);
  return each;
}

// In so many parts, or, where that is 0, as many as the work is worth.
inline void run_in_parts(const Arguments& args, const ConvKernel& kernel, const Conv& p,
                         int64_t wanted) {
  if (const char* why = why_not(p)) throw std::logic_error(std::string("qnn: a call of ") + why);
  with_memory(args, [&] {
    share(wanted == 0 ? parts_worth(p) : wanted, [&](int part, int parts) {
      kernel.run(p, part, parts, scratch_of_this_thread(kernel.scratch_bytes(p, parts)));
    });
  });
}

constexpr int32_t kInfinite = 0x7f800000;

// Of codes on a grid: the scale of each sample. One with NaN or inf has NaN, and the code of zero.
inline void mark_odd(const std::vector<int32_t>& odd, float scale, int32_t zero_point, int64_t size,
                     uint8_t* codes, float* to) {
  for (const int32_t is_odd : odd) {
    const bool good = is_odd == 0 && usable(scale);
    *to++ = good ? scale : kNan;
    if (!good) std::memset(codes, zero_point + 128, static_cast<size_t>(size));
    codes += size;
  }
}

}  // namespace
}  // namespace qnn
