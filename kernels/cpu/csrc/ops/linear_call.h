// One call of a linear layer, on torch's threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "linear/doubles.h"
#include "linear/linear.h"
#include "ops/threads.h"
#include "tiers/tiers.h"

namespace qnn {

inline void run_parallel(const Arguments& args, const Kernel& kernel, const Linear& p) {
  if (p.y_dtype == DType::float64) {
    const Tensor x = args.empty({has_double_rows(p) ? p.m * p.k : 0}, ScalarType::Float),
                 y = args.empty({p.m * p.n}, ScalarType::Float);
    auto *single_x = static_cast<float*>(x.data_ptr()),
         *single_y = static_cast<float*>(y.data_ptr());
    run_parallel(args, kernel, without_doubles(p, single_x, single_y));
    return finish_doubles(p, single_y);
  }
  // A thread more is worth its start, some µs, from about so many products, or so many bytes of w,
  // to each.
  constexpr int64_t kProducts = 1 << 20, kBytes = 1 << 17;
  const int64_t worth = std::max(p.m * p.n * p.k / kProducts, p.n * p.k / kBytes);
  if (const char* why = why_not(p))
    throw std::logic_error("qnn: a weight of " + text(p.weight) + ": " + why + ".");
  const size_t bytes = kernel.scratch_bytes(p);
  with_memory(args, [&] {
    share(worth,
          [&](int part, int parts) { kernel.run(p, part, parts, scratch_of_this_thread(bytes)); });
  });
}

// The scale of a grid, or NaN where it is none, as that of a layer that was never calibrated.
inline float usable_scale(float scale) {
  const bool usable = scale >= std::numeric_limits<float>::min() && std::isfinite(scale);
  return usable ? scale : std::numeric_limits<float>::quiet_NaN();
}

// The fixed grid of all rows; one of 16 bits has no zero point.
inline void set_grid(Linear& p, Arguments& args, const Tensor* sx, const Tensor* zx) {
  if (sx == nullptr) return;
  p.fixed = true;
  p.grid_scale = usable_scale(*args.data<float>(sx));
  if (zx != nullptr) p.zero_point = *args.data<int8_t>(zx);
}

// What runs an op of kWeightOps.
inline const Kernel& kernel_of(const Tier& tier, const WeightOp& op) {
  return op.quantizes ? tier.int8_int4 : tier.weight_only;
}

}  // namespace qnn
